"""Answers requests on TensorRT-LLM's LLM API."""
