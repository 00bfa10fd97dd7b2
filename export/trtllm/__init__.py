"""A checkpoint in, a TensorRT-LLM checkpoint out: config.json and one safetensors file a rank."""
