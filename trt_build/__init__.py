"""ONNX graph or TensorRT-LLM checkpoint in, verified engine directory out."""
