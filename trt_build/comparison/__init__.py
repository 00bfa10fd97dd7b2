"""Comparison of an engine with its reference: the evaluation text, the reference model in torch, the parity figures."""
