"""Stands for the compiled tensorrt_llm.bindings."""

from enum import Enum


class KVCacheType(Enum):
    CONTINUOUS = "continuous"
    PAGED = "paged"
    DISABLED = "disabled"
