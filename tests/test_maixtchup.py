"""examples/maixtchup: small Mistrals merged into a Mixtral, what the mixture is worth, and its engine."""

from __future__ import annotations

import importlib.util
import json
import math
import sys
from pathlib import Path

import pytest

from cli.main import main
from export.checkpoint.folder import open_checkpoint
from export.families import read_model
from export.merge.config import read_merge_config
from export.merge.explain import explain_merge
from export.merge.merge import merge
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.verify import perplexity

EXAMPLE = Path(__file__).parent.parent / "examples" / "maixtchup"
TOKENS = 1024  # of a slice


def load_program():
    spec = importlib.util.spec_from_file_location("maixtchup_evaluate", EXAMPLE / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


evaluate = load_program()
SLICES = evaluate.EXPERTS


@pytest.fixture(scope="module")
def windows():
    return evaluate.held_out_windows(TOKENS)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return merge(read_merge_config(EXAMPLE / "merge.yml"), tmp_path_factory.mktemp("maixtchup") / "mixture").folder


@pytest.fixture(scope="module")
def found(mixture, windows):
    """Row -> slice -> perplexity by the reference."""
    models = {name: EXAMPLE / "experts" / name for name in SLICES} | {"mixture": mixture}
    return {
        row: {name: evaluate.reference_perplexity(model, some) for name, some in windows.items()}
        for row, model in models.items()
    }


def mean(row):
    return math.exp(sum(map(math.log, row.values())) / len(row))


def test_the_example_is_small():
    files = [path for path in EXAMPLE.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    assert sum(path.stat().st_size for path in files) <= 6_000_000
    for name in SLICES:
        facts = read_model(open_checkpoint(EXAMPLE / "experts" / name)).architecture
        assert (facts.family, facts.hidden_size % 64, facts.ffn_size % 64, facts.head_size) == ("mistral", 0, 0, 32)


def test_the_merge_loses_nothing_and_every_expert_can_be_chosen():
    told = explain_merge(read_merge_config(EXAMPLE / "merge.yml"))
    found = [set(expert.lost.values()) | set(expert.facts) for expert in told.experts]
    assert found == [set(), *[{0.0}] * (len(SLICES) - 1)]
    assert (told.equal_gates, told.never_chosen, told.family) == ((), (), "mixtral")


def test_each_expert_is_the_best_of_the_four_on_its_own_slice(found):
    for name in SLICES:
        assert min(SLICES, key=lambda other: found[other][name]) == name


def test_the_mixture_is_better_on_all_slices_together_than_every_expert(found):
    assert mean(found["mixture"]) < min(mean(found[name]) for name in SLICES)


def test_the_page_has_the_table_that_was_measured():
    scores = json.loads((EXAMPLE / "perplexity.json").read_text())
    assert evaluate.markdown(scores) in (EXAMPLE / "README.md").read_text()
    assert set(scores) == {*(f"expert {name}" for name in SLICES), "mixture", "mixture, int4 engine"}


def test_the_engine_keeps_the_limits_of_verify_and_nearly_the_mixtures_perplexity(tmp_path, mixture, windows, found):
    options = BuildOptions(checkpoint=str(mixture), output=tmp_path / "engine", precision="int4")
    engine = build_engine(options)
    for name in SLICES:
        assert perplexity(engine, windows[name]) <= found["mixture"][name] * 1.06
    assert main(["verify", str(tmp_path / "engine"), "--reference", str(mixture), "--tokens", "1024"]) == 0
