"""Builds of TensorRT-LLM engines as tests ask for them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from trt_build.trtllm.build import Outcome, build_trtllm
from trt_build.trtllm.options import TrtllmOptions


def options_of(checkpoint: Path | str, output: Path, **options: Any) -> TrtllmOptions:
    """The options of a build. Few tokens are compared, since the stand-in computes each of them together with all
    tokens before it."""
    return TrtllmOptions(checkpoint=str(checkpoint), output=output, **{"verify_tokens": 24, **options})


def build(checkpoint: Path, output: Path, **options: Any) -> Outcome:
    """In this process."""
    return build_trtllm(options_of(checkpoint, output, **options))


def words(checkpoint: Path, output: Path, *more: str) -> list[str]:
    """The command line of a build, after the program's name."""
    return ["--backend", "tensorrt-llm", "--checkpoint", str(checkpoint), "--output", str(output), *more]


def manifest_of(folder: Path) -> dict[str, Any]:
    """engine.json."""
    manifest: dict[str, Any] = json.loads((folder / "engine.json").read_text())
    return manifest
