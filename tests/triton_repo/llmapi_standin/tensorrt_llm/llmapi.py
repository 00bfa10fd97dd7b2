"""The names that the library has in tensorrt_llm/llmapi/__init__.py."""

from tensorrt_llm import GuidedDecodingParams

__all__ = ["GuidedDecodingParams"]
