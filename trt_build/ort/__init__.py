"""ONNX Runtime: the engine that runs on any CPU."""
