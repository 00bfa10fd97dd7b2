"""Answers requests with TensorRT-LLM's LLM API."""
