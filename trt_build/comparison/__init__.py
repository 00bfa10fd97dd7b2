"""Comparison of an engine with its reference: the evaluation text, the figures, and transformers' models for tests."""
