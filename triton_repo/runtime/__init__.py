"""Answers generation requests on an engine: options, sampling, detokenising, stop words. Imports nothing of Triton."""
