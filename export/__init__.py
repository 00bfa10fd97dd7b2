"""Checkpoint in, ONNX graph with quantised weights out: read, merge, quantise, write."""
