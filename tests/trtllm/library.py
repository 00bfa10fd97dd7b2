"""The stand-in of TensorRT-LLM on the path, for as long as somebody asks for it and no longer."""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent.parent
STANDIN = Path(__file__).parent / "standin"
NETWORK = "trt_build.trtllm.phixtral"


@contextlib.contextmanager
def standin() -> Iterator[ModuleType]:
    """tensorrt_llm and our network in it, importable inside the block and forgotten after it."""

    def is_ours(name: str) -> bool:
        return name.split(".")[0] in ("tensorrt_llm", "models") or name == NETWORK

    kept = {name: sys.modules.pop(name) for name in list(sys.modules) if is_ours(name)}
    sys.path.insert(0, str(STANDIN))
    try:
        yield importlib.import_module("tensorrt_llm")
    finally:
        sys.path.remove(str(STANDIN))
        for name in [name for name in sys.modules if is_ours(name)]:
            del sys.modules[name]
        sys.modules.update(kept)


def install_programs(folder: Path, monkeypatch: pytest.MonkeyPatch, python: Path) -> Path:
    """Put the stand-in's programs into a new folder on PATH, as pip would for `python`, and its package where these
    find it; returns trtllm-build."""
    programs = shutil.copytree(STANDIN / "bin", folder)
    program = programs / "trtllm-build"
    _, _, body = program.read_text(encoding="utf-8").partition("\n")
    program.write_text(f"#!{python}\n{body}", encoding="utf-8")
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", f"{STANDIN}{os.pathsep}{ROOT}")
    return program
