"""Answers many requests at once: every step of the engine computes tokens of all sequences that run."""
