"""Stands for tensorrt_llm/runtime/__init__.py."""

from tensorrt_llm.runtime.model_runner_cpp import ModelRunnerCpp

__all__ = ["ModelRunnerCpp"]
