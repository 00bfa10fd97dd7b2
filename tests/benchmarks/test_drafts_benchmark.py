"""benchmarks/drafts.py on the tests' small engine."""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import pytest

import drafts
from export.errors import ConfigError
from export.tokenizer.loading import load_tokenizer
from trt_build.ort.engine import open_engine
from trt_build.ort.session import Session


def test_both_sides_take_the_given_answer_or_write_the_same(tiny_engine):
    session, tokenizer = Session(open_engine(tiny_engine)), load_tokenizer(tiny_engine)
    text = tokenizer.encode("x = [1, 2, 3]\n" * 4)
    given = drafts.Task(name="given", prompt=text, answer=text[:40])
    own = drafts.Task(name="own", prompt=text, answer=())
    results = list(drafts.measure(session, [given, own], most_tokens=30, rounds=2))
    assert [(each["task"], each["output_tokens"], each["same_tokens"]) for each in results] == [
        (name, 30, True) for name in ("given", "given", "own", "own")
    ]
    assert all(each["ratio"] > 0 and each["accepted"] <= each["drafted"] for each in results)
    assert results[0]["accepted"] > 0
    lines = drafts.table(results).splitlines()
    assert len(lines) == 1 + 4 + 2
    assert "OTHER TOKENS" not in drafts.table(results)
    assert "OTHER TOKENS" in drafts.table([{**results[0], "same_tokens": False}])


def test_an_edit_whose_history_is_not_there_is_one_error(tmp_path, monkeypatch, tiny_engine):
    monkeypatch.setattr(drafts, "ROOT", tmp_path)
    options = SimpleNamespace(scenarios=["edit"], own=False, prompt_tokens=100)
    with pytest.raises(ConfigError, match="by git.*expected the history of this repository"):
        drafts.read_tasks(load_tokenizer(tiny_engine), options)
    with pytest.raises(ConfigError, match="found the scenarios song, expected edit or prose"):
        drafts.benchmark(argparse.Namespace(scenarios=["song"]))
