"""Answers one generation request on an engine: options, sampling, detokenising, stop words. Knows no Triton."""
