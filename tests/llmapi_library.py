"""The stand-in of TensorRT-LLM's LLM API for tests that run in this process, under a name of its own."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

STANDIN = Path(__file__).parent / "triton_repo" / "llmapi_standin"


def load_standin() -> ModuleType:
    """The stand-in's module: another of the same name serves the engine's tests."""
    spec = importlib.util.spec_from_file_location("llmapi_standin", STANDIN / "tensorrt_llm" / "__init__.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
