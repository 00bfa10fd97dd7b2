"""Tensor table in, ONNX graph with external data out."""
