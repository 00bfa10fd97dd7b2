"""Converts a checkpoint to a TensorRT-LLM checkpoint: config.json and one safetensors file a rank."""
