"""Runs engines on ONNX Runtime: devices, sessions, and moeship's CPU kernels."""
