"""Stands for tensorrt_llm/commands/__init__.py."""
