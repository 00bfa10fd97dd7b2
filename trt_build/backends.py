"""The one place that chooses between the backends. Only the chosen backend is imported."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from export.conversion.writer import Progress
from trt_build.errors import EngineError
from trt_build.manifest import ORT_BACKEND, TRTLLM_BACKEND
from trt_build.results import Built, Planned


@dataclass(frozen=True, kw_only=True)
class Backend:
    """What `moeship build` and `moeship plan` need of a backend. Both functions take the flags of
    `engine_flags.add_engine_arguments`; `plan` takes those of the machine in cli/plan.py too."""

    build: Callable[[argparse.Namespace, Callable[[Progress], None] | None], Built]
    plan: Callable[[argparse.Namespace], Planned]


def choose_backend(name: str) -> Backend:
    """Import the backend of that name. Raises EngineError for an unknown name."""
    if name not in _BACKENDS:
        raise EngineError(f"choosing the backend: {name!r} is unknown. There are: {', '.join(_BACKENDS)}")
    return _BACKENDS[name]()


def _onnxruntime() -> Backend:
    from trt_build.ort import command

    return Backend(build=command.build, plan=command.plan)


def _tensorrt_llm() -> Backend:
    from trt_build.trtllm import command

    return Backend(build=command.build, plan=command.plan)


_BACKENDS: Mapping[str, Callable[[], Backend]] = {ORT_BACKEND: _onnxruntime, TRTLLM_BACKEND: _tensorrt_llm}
