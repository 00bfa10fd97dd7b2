"""Engines that are refused because the machine has too little memory for them."""

from __future__ import annotations

import pytest

from trt_build.errors import EngineError
from trt_build.ort.engine import open_engine
from trt_build.ort.memory import require_memory
from trt_build.ort.session import Session


def test_an_engine_that_does_not_fit_is_refused_with_the_context_that_would(tiny_engine):
    engine = open_engine(tiny_engine)
    weights = engine.resident_bytes
    assert weights == engine.manifest.files["model.onnx.data"].bytes
    per_token = 3 * 2 * 192 * 4
    require_memory(engine, weights + 640 * per_token)
    with pytest.raises(
        EngineError, match=r"for sequences of 640 tokens: found 0.00 GB .* --max-sequence 639, which fits"
    ):
        require_memory(engine, weights + 640 * per_token - 1)
    with pytest.raises(EngineError, match="build a lower precision: the weights alone do not fit"):
        require_memory(engine, weights)


def test_the_session_refuses_before_it_loads_anything(tiny_engine, monkeypatch):
    monkeypatch.setattr("trt_build.ort.memory.available_memory", lambda: 3_000_000)
    monkeypatch.setattr("trt_build.ort.session.load_graph", None)
    with pytest.raises(EngineError, match=r"loading .* for sequences of 640 tokens: found 0.00 GB of memory available"):
        Session(open_engine(tiny_engine))
