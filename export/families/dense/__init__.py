"""Families without experts, which merges make mixtures of."""
