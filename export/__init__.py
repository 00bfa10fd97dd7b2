"""Reads, merges and quantises checkpoints, and writes them as ONNX graphs or TensorRT-LLM checkpoints."""
