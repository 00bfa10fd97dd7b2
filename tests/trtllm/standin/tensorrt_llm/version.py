"""Stands for tensorrt_llm/version.py."""

__version__ = "1.2.0"
