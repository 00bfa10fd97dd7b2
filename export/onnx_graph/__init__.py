"""Builds ONNX graphs from a tensor table, with the weights in an external data file."""
