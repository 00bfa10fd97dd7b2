"""Greedy decoding for tests: through our session, and through onnxruntime-genai's own runtime."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import pytest

from trt_build.ort.engine import open_engine
from trt_build.ort.kernels import is_usable, library
from trt_build.ort.planning.genai_config import with_library
from trt_build.ort.session import Session

# Precisions by whose kernels: every kind of engine for the CPU, and those that are quantised.
QUANTISED = (("int8", "onnxruntime"), ("int4", "onnxruntime"), ("int8", "moeship"), ("int4", "moeship"))
KINDS = (("fp32", "onnxruntime"), *QUANTISED)


def kinds_here() -> list[tuple[str, str]]:
    """Those of KINDS that this install can load."""
    return [kind for kind in KINDS if kind[1] != "moeship" or is_usable()]


def each(kinds: Iterable[Any], *, apart: bool = False) -> list[Any]:
    """Values for parametrize: kinds, as one argument or `apart` as two. Those of moeship's kernels need the library."""
    return [
        pytest.param(
            *(kind if apart else (kind,)), id=kind if isinstance(kind, str) else "-".join(kind),
            marks=[pytest.mark.needs_kernels] if kind[1] == "moeship" else [],
        )
        for kind in kinds
    ]  # fmt: skip


def greedy(session: Session, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """The likeliest tokens after `prompt`, whatever end token comes."""
    cache, produced = session.new_cache(), []
    logits = session.run(cache, prompt)
    for _ in range(num_tokens):
        produced.append(int(logits.argmax()))
        logits = session.run(cache, produced[-1:])
    return produced


def genai_greedy(model: Any, prompt: Sequence[int], num_tokens: int) -> list[int]:
    """What an onnxruntime_genai.Model produces; it stops at an end token."""
    import onnxruntime_genai as genai

    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=len(prompt) + num_tokens, do_sample=False)
    generator = genai.Generator(model, params)
    generator.append_tokens(list(prompt))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)][len(prompt) :]


def load_genai(folder: Path) -> Any:
    """An engine directory as onnxruntime-genai loads it."""
    import onnxruntime_genai as genai

    config = genai.Config(str(folder))
    if open_engine(folder, check_digests=False).has_own_kernels:
        config.overlay(json.dumps(with_library(library())))
    return genai.Model(config)
