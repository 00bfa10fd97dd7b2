"""Decisions of a build for ONNX Runtime, and what they come to, before a weight is converted."""
