"""Stands for tensorrt_llm/quantization/__init__.py."""

from tensorrt_llm.quantization.mode import GroupwiseQuantAlgo, QuantAlgo, QuantMode

__all__ = ["GroupwiseQuantAlgo", "QuantAlgo", "QuantMode"]
