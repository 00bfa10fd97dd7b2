"""Where a serving graph's difference begins, by what each layer's attention and MLP or experts give."""

from __future__ import annotations

import dataclasses
import shutil

import manifests
import numpy as np
import pytest
from dense_checkpoints import write_dense_checkpoint
from engine_faults import FAULTS, with_fault

from cli.main import main
from export.checkpoint.folder import open_checkpoint
from export.families import read_model
from trt_build.comparison.serving_ways import SERVING_LIMITS, ServingLimits, Way
from trt_build.engine_files import record_files
from trt_build.ort import served_as_scored
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.engine import open_engine
from trt_build.ort.questions import layer_outputs
from trt_build.ort.served_as_scored import compare_serving, where_it_begins
from trt_build.ort.session import ScoringSession, Session

TOKENS = np.random.default_rng(3).integers(0, 256, 96).tolist()
WAYS = ["decoding", "chunks", "a batch"]


def quiet(_text: str) -> None:
    pass


SIZES = {"hidden_size": 128, "ffn_size": 160, "num_layers": 2}


@pytest.fixture(scope="module")
def dense(made_once):
    """precision -> a Llama's engine, its reference's network, and the folder of the checkpoint."""
    source = made_once("dense-llama", lambda folder: write_dense_checkpoint(folder, seed=3, family="llama", **SIZES))
    model = read_model(open_checkpoint(source))

    def dense(precision):
        engine = made_once(
            f"dense-llama-{precision}",
            lambda folder: build_engine(BuildOptions(checkpoint=str(source), output=folder, precision=precision)),
        )
        return open_engine(engine), model.family.network(model.weights.checkpoint.config), source

    return dense


def located(engine, window=TOKENS) -> dict[str, str]:
    """What is said of each way that fails, with where it begins."""
    limits = SERVING_LIMITS[engine.manifest.precision.name]
    ways = compare_serving(engine, window, quiet)
    failed = {way.name for way in ways if way.failure(way.limits(limits))}
    found = where_it_begins(engine, window, ways, limits, quiet)
    return {way.name: way.failure(way.limits(limits)) for way in found if way.name in failed}


IN_A_LAYER = {
    "attention's scale times 1.03": "it begins in the attention of layer 1, norms included: found ",
    "another layer's queries": "it begins in the attention of layer 1, norms included: found ",
    "a residual taken twice": "it begins in the MLP of layer 1, norms included: found ",
}


@pytest.mark.parametrize("precision", ["fp32", "int4"])
@pytest.mark.parametrize("name", IN_A_LAYER)
def test_a_fault_in_one_layer_of_a_dense_model_is_told_by_layer_and_part(tmp_path, dense, precision, name):
    engine, network, _ = dense(precision)
    fault = dataclasses.replace(FAULTS[name], at="serving")
    told = located(with_fault(engine, tmp_path / "wrong", fault, network))
    precise = {way for way in told if precision == "fp32" or way.endswith("float32 activations")}
    assert len(precise) == 3
    assert [way for way in told if IN_A_LAYER[name] not in told[way]] == []


@pytest.mark.parametrize(
    ("name", "begin"),
    [
        ("one expert less in a layer", "it begins in the experts of layer 1, norms included: found "),
        ("attention's scale times 1.03", "it begins in the attention of layer 1, norms included: found "),
        ("head bias dropped", "what the layers give differs by no more than 1e-04 of the largest, so it begins behind"),
    ],
)
def test_a_fault_of_a_mixture_is_told_by_layer_and_part(tmp_path, tiny_checkpoint, tiny_engines, name, begin):
    model = read_model(open_checkpoint(tiny_checkpoint))
    network = model.family.network(model.weights.checkpoint.config)
    fault = dataclasses.replace(FAULTS[name], at="serving")
    told = located(with_fault(open_engine(tiny_engines("fp32")), tmp_path / "wrong", fault, network))
    assert len(told) == 3
    assert [way for way in told if begin not in told[way]] == []


def test_a_sum_of_a_parallel_layer_that_is_wrong_is_told(tmp_path, tiny_checkpoint, tiny_engines):
    """Where attention and experts add to one residual, both give what they should and the sum does not."""
    model = read_model(open_checkpoint(tiny_checkpoint))
    network = model.family.network(model.weights.checkpoint.config)
    fault = dataclasses.replace(FAULTS["a residual taken twice"], at="serving")
    told = located(with_fault(open_engine(tiny_engines("fp32")), tmp_path / "wrong", fault, network))
    assert "it begins in the residual's sum of layer 1, norms included: found " in told["chunks"]


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_the_parts_of_a_sound_engine_differ_by_a_tenth_of_the_limit_at_most(dense, tiny_engines, precision):
    for engine in (dense(precision)[0], open_engine(tiny_engines(precision))):
        ways = compare_serving(engine, TOKENS, quiet)
        ways = [way for way in ways if way.name in WAYS]
        for way in where_it_begins(engine, TOKENS, ways, ServingLimits(largest=-1.0, mean=-1.0), quiet):
            assert len(way.part_names) == 3 * engine.manifest.architecture.num_layers
            position = way.begins_at(ServingLimits(largest=-1.0, mean=-1.0))
            assert position is not None
            assert way.parts.shape[0] == len(way.part_names)
            assert position < way.parts.shape[1] <= len(way.places)
            assert way.parts.max() <= way.part_limit / 10


def test_parts_are_compared_in_groups_until_a_difference_shows(tmp_path, dense, monkeypatch):
    engine, network, _ = dense("fp32")
    fault = dataclasses.replace(FAULTS["attention's scale times 1.03"], at="serving")
    wrong = with_fault(engine, tmp_path / "wrong", fault, network)
    monkeypatch.setattr(layer_outputs, "PARTS_BYTES", 1)
    limits, told = SERVING_LIMITS["fp32"], []
    found = where_it_begins(wrong, TOKENS, compare_serving(wrong, TOKENS, quiet), limits, told.append)
    assert len(told) == 4  # three parts of layer 0, and attention of layer 1
    assert all(IN_A_LAYER["attention's scale times 1.03"] in way.failure(limits) for way in found)


def test_groups_go_on_until_the_position_that_is_told_shows_a_difference(dense, monkeypatch):
    """A difference of a position that is not judged, as of a near tie, ends nothing."""
    engine, _, _ = dense("fp32")
    differences, ties = np.zeros(20), np.zeros(20, dtype=bool)
    differences[:2], ties[0] = (0.9, 0.8), True
    places = tuple(f"position {place}" for place in range(20))
    way, asked = Way(name="chunks", differences=differences, places=places, ties=ties), []

    def compare(_engine, _window, _scoring, _serving, parts, until):
        assert until == {"chunks": 1}  # position 0 is a near tie
        asked.append(parts[0].name)
        rows = np.zeros((1, 20))
        rows[0, 0], rows[0, 1] = 1.0, float(len(asked) == 3)
        return (dataclasses.replace(way, parts=rows, part_names=(parts[0].name,)),)

    monkeypatch.setattr(layer_outputs, "PARTS_BYTES", 1)
    monkeypatch.setattr(served_as_scored, "_compare", compare)
    [found] = where_it_begins(engine, TOKENS, [way], SERVING_LIMITS["fp32"], quiet)
    assert asked == ["attention of layer 0", "MLP of layer 0", "residual's sum of layer 0"]
    assert "at position 1 it begins in the residual's sum of layer 0, norms" in found.failure(SERVING_LIMITS["fp32"])


def test_no_more_is_run_than_the_position_that_is_told_needs(dense, monkeypatch):
    """Tokens of the scoring graph, and of each step of the serving graph, for each way that fails alone."""
    engine, _, _ = dense("fp32")
    scored, stepped = [], []
    run, step = ScoringSession.run, Session.step

    def count_scored(self, tokens, *more):
        scored.append(len(tokens))
        return run(self, tokens, *more)

    def count_stepped(self, cache, rows, **more):
        stepped.append(sum(len(row.token_ids) for row in rows))
        return step(self, cache, rows, **more)

    ways = {way.name: way for way in compare_serving(engine, TOKENS, quiet)}
    monkeypatch.setattr(ScoringSession, "run", count_scored)
    monkeypatch.setattr(Session, "step", count_stepped)
    expected = {
        ("chunks", 1): ([3], [1, 2]),
        ("decoding", 0): ([96], [1, 2, 93, 1]),  # its first position is 31
        ("a batch", 3): ([11, 70, 23, 7, 33], [87]),
        ("a batch", 87): ([11, 70, 23, 7, 33], [87, 4]),
    }
    for (name, position), tokens in expected.items():
        differences = np.zeros(len(ways[name].places))
        differences[position] = 1.0
        way = dataclasses.replace(ways[name], differences=differences)
        [found] = where_it_begins(engine, TOKENS, [way], SERVING_LIMITS["fp32"], quiet)
        assert (scored, stepped) == tokens
        assert found.parts is not None
        assert found.parts.shape[1] > position
        scored.clear()
        stepped.clear()


def test_verify_of_a_dense_engine_names_the_layer_and_asks_no_more_of_a_sound_one(tmp_path, dense, capsys, monkeypatch):
    engine, network, source = dense("fp32")
    words = ["--reference", str(source), "--tokens", "64"]
    fault = dataclasses.replace(FAULTS["another layer's queries"], at="serving")
    wrong = with_fault(engine, tmp_path / "wrong", fault, network)
    files = manifests.read_values(wrong.folder)["files"] | {
        name: dataclasses.asdict(record) for name, record in record_files(wrong.folder).items() if name.endswith("onnx")
    }
    manifests.edit_manifest(wrong.folder, files=files)
    assert main(["-q", "verify", str(wrong.folder), *words]) == 1
    assert "it begins in the attention of layer 1, norms included" in capsys.readouterr().err
    monkeypatch.delattr(served_as_scored, "layer_parts")
    sound = shutil.copytree(engine.folder, tmp_path / "sound")
    assert main(["-q", "verify", str(sound), *words]) == 0
