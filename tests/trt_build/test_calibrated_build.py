"""Engines whose codes GPTQ solved over a text: the codes are carried over, named in engine.json and checked."""

from __future__ import annotations

import errno
import json
import logging
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from checkpoints import write_phixtral_checkpoint
from engine_faults import FAULTS, with_fault
from mixtral_checkpoints import write_mixtral_checkpoint
from safetensors.numpy import load_file, save_file

from cli.main import main
from export.calibration import store
from export.calibration.work import work_of
from export.checkpoint.folder import open_checkpoint
from export.errors import ConfigError, OutputError, QuantizationError
from export.families import read_model
from export.files.resume import discard_interrupted
from export.quantize.solved import open_solved
from trt_build.calibration import Calibration
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.planning.prepare import EngineOptions, prepare_build, solvable
from trt_build.ort.questions.graph import ask_about_graph
from trt_build.ort.questions.stored_weights import open_stored_weights
from trt_build.ort.questions.weights import ask_about_weights

KERNELS = ["onnxruntime", pytest.param("moeship", marks=pytest.mark.needs_kernels)]
BUILD_WRITES = "trt_build.ort.build.write_export"
WORDS = ("the", "ferry", "left", "late", "because", "tide", "was", "low", "and", "nobody", "minded", "1", "23", "!")


def write_phixtral(folder):
    return write_phixtral_checkpoint(
        folder, seed=3, num_experts=3, experts_per_token=2, hidden_size=128, num_heads=4, rotary_dim=16, ffn_size=192
    )


def write_mixtral(folder):
    return write_mixtral_checkpoint(
        folder, seed=1, spelling="published", hidden_size=128, num_heads=4, num_kv_heads=2, ffn_size=192
    )


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    generator = np.random.default_rng(2)
    path.write_text(" ".join(generator.choice(WORDS, 1500)))
    return path


def build(checkpoint, output, text, kernels="onnxruntime", provider="cpu", **options):
    calibration = Calibration(texts=(text,), num_tokens=512, **options)
    return build_engine(
        BuildOptions(
            checkpoint=str(checkpoint), output=output, kernels=kernels, provider=provider, calibration=calibration
        )
    )


@pytest.mark.parametrize(
    ("kernels", "provider"),
    [("onnxruntime", "cpu"), ("onnxruntime", "cuda"), pytest.param("moeship", "cpu", marks=pytest.mark.needs_kernels)],
)
@pytest.mark.parametrize("write", [write_phixtral, write_mixtral])
def test_an_engine_has_the_codes_that_were_solved(tmp_path, text, kernels, provider, write):
    checkpoint = write(tmp_path / "model")
    engine = build(checkpoint, tmp_path / "engine", text, kernels, provider, codes=tmp_path / "codes")
    model, codes = read_model(open_checkpoint(checkpoint)), open_solved(tmp_path / "codes")
    stored = open_stored_weights(engine, model)
    for name, matrix in codes.matrices.items():
        spec = model.weights.table[name]
        for place in range(matrix.shape[0]):
            group = place if spec.stacks_experts else 0
            found = stored.part_rows(name, group, 0, 40)
            turns = len(spec.groups[group])
            expected = codes.rows(name, place, 0, 40 * turns).values()
            for turn, values in enumerate(found):
                assert (values == expected[turn::turns]).all(), name
    assert ask_about_weights(engine, model).failures == ()
    record = engine.manifest.calibration
    assert record["codes"] == codes.digest
    assert record["tokens"] == 512
    assert record["text"]["names"] == [str(text)]
    assert not (tmp_path / ".engine.codes").exists()
    if provider == "cpu":
        ids = np.random.default_rng(1).integers(0, 250, 48).tolist()
        assert ask_about_graph(engine, model, ids, lambda _: None, None).failures == ()


@pytest.mark.parametrize(
    ("kernels", "provider", "precision"),
    [("onnxruntime", "cuda", "int4"), ("onnxruntime", "cuda", "int8"),
     pytest.param("moeship", "cpu", "int8", marks=pytest.mark.needs_kernels)],
)  # fmt: skip
@pytest.mark.parametrize("method", ["gptq", "search"])
def test_rows_whose_scales_are_small_for_float16_are_sound(tmp_path, text, kernels, provider, precision, method):
    """Queries on CUDA carry a factor, which takes digits away from the scales of small rows."""
    checkpoint = write_mixtral(tmp_path / "model")
    tensors = load_file(checkpoint / "model.safetensors")
    for name in tensors:
        if name.endswith(("q_proj.weight", "w2.weight")):
            tensors[name][3:6] *= np.array([1e-3, 1e-5, 1e-6], dtype=np.float32)[:, None]
    save_file(tensors, checkpoint / "model.safetensors")
    calibration = Calibration(texts=(text,), num_tokens=512) if method == "gptq" else Calibration(method=method)
    engine = build_engine(
        BuildOptions(
            checkpoint=str(checkpoint), output=tmp_path / "engine", kernels=kernels, provider=provider,
            precision=precision, calibration=calibration,
        )
    )  # fmt: skip
    model = read_model(open_checkpoint(checkpoint))
    assert ask_about_weights(engine, model).failures == ()
    network = model.family.network(model.weights.checkpoint.config)
    wrong = with_fault(engine, tmp_path / "wrong", FAULTS["two rows of experts' first swapped"], network)
    assert ask_about_weights(wrong, model).failures


@pytest.mark.parametrize("kernels", KERNELS)
def test_a_code_that_was_altered_shows(tmp_path, text, kernels):
    checkpoint = write_phixtral(tmp_path / "model")
    engine = build(checkpoint, tmp_path / "engine", text, kernels)
    model = read_model(open_checkpoint(checkpoint))
    network = model.family.network(model.weights.checkpoint.config)
    for name in ("one code off by one", "one block's scale times 1.05", "two rows of experts' first swapped"):
        failures = " ".join(
            ask_about_weights(with_fault(engine, tmp_path / "wrong", FAULTS[name], network), model).failures
        )
        assert "found codes or scales that are not those that were solved" in failures, name


def test_the_command_builds_the_same_engine_again_from_the_codes(tmp_path, text, capsys, caplog):
    checkpoint = write_phixtral(tmp_path / "model")
    flags = ["--kernels", "onnxruntime", "--calibrate", str(text), "--calibrate-tokens", "512"]
    flags += ["--codes", str(tmp_path / "codes")]
    with caplog.at_level(logging.INFO):
        assert main(["build", str(checkpoint), "--output", str(tmp_path / "one"), *flags]) == 0
        assert "solved the codes of layer 0000 (1 of" in caplog.text
        caplog.clear()
        assert main(["build", str(checkpoint), "--output", str(tmp_path / "two"), *flags]) == 0
        assert "solved the codes" not in caplog.text
    one, two = (tmp_path / name / "engine.json" for name in ("one", "two"))
    assert json.loads(one.read_text())["files"] == json.loads(two.read_text())["files"]
    assert json.loads(one.read_text())["precision"]["roles"]["expert"]["methods"] == ["gptq"]


def test_codes_that_an_interrupted_build_left_are_used_or_made_anew(tmp_path, text, caplog, monkeypatch):
    checkpoint = write_phixtral(tmp_path / "model")

    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("os.pwrite", full)
        with pytest.raises(OutputError, match="No space left"):
            build(checkpoint, tmp_path / "engine", text)
    assert (tmp_path / ".engine.codes/codes.json").exists()
    with caplog.at_level(logging.INFO):
        build(checkpoint, tmp_path / "engine", text)
        assert f"the codes of {checkpoint} are those of {tmp_path}/.engine.codes" in caplog.text
        assert "solved the codes of layer" not in caplog.text
        (tmp_path / ".again.codes").mkdir()
        (tmp_path / ".again.codes/codes.json").write_text("{}")
        build(checkpoint, tmp_path / "again", text)
        assert "those of an interrupted build do not fit" in caplog.text
    assert not list(tmp_path.glob(".*.codes"))


@pytest.mark.parametrize("stage", ["solving", "writing"])
def test_a_build_by_another_method_removes_what_a_killed_one_left(tmp_path, text, monkeypatch, stage):
    checkpoint, output = write_phixtral(tmp_path / "model"), tmp_path / "engine"

    class KilledError(BaseException):
        pass

    def kill(*arguments):
        raise KilledError

    with monkeypatch.context() as patch:
        patch.setattr("export.calibration.store.Solver.head" if stage == "solving" else BUILD_WRITES, kill)
        with pytest.raises(KilledError):
            build(checkpoint, output, text)
    left = tmp_path / ("..engine.codes.partial" if stage == "solving" else ".engine.codes")
    assert left.is_dir()
    build_engine(
        BuildOptions(
            checkpoint=str(checkpoint), output=output, kernels="onnxruntime", calibration=Calibration(method="search")
        )
    )
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine", "model", "text.txt"]


def test_codes_that_another_process_solves_stay(tmp_path):
    partial = tmp_path / "..engine.codes.partial"
    partial.mkdir(mode=0o700)
    code = (
        "import fcntl, os, sys; fcntl.flock(os.open(sys.argv[1], os.O_RDWR | os.O_CREAT), fcntl.LOCK_EX); "
        "print(flush=True); sys.stdin.read()"
    )
    words = [sys.executable, "-c", code, str(partial / "lock")]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        discard_interrupted(tmp_path / ".engine.codes")
        assert partial.is_dir()
        other.stdin.close()
    discard_interrupted(tmp_path / ".engine.codes")
    assert not partial.exists()


def test_starved_experts_are_named(tmp_path, text, caplog, monkeypatch):
    monkeypatch.setattr(store, "Solver", partial(store.Solver, fewest_tokens=100.0))
    checkpoint = write_phixtral(tmp_path / "model")
    with caplog.at_level(logging.WARNING):
        engine = build(checkpoint, tmp_path / "engine", text)
    assert "too few tokens of the calibration text reach" in caplog.text
    fallen = engine.manifest.calibration["fallen_back"]
    assert fallen["transformer.h.0.moe.mlp.fc1.weight"] == [0, 1, 2]
    assert ask_about_weights(engine, read_model(open_checkpoint(checkpoint))).failures == ()


def test_what_a_method_does_not_take_is_refused(tmp_path, text):
    checkpoint = write_phixtral(tmp_path / "model")
    with pytest.raises(ConfigError, match="choosing the method: found 'awq', expected one of nearest, search, gptq"):
        build(checkpoint, tmp_path / "engine", text, method="awq")
    with pytest.raises(ConfigError, match="search takes no calibration text; leave out --calibrate"):
        build(checkpoint, tmp_path / "engine", text, method="search")
    (tmp_path / "short.txt").write_text("too short")
    with pytest.raises(ConfigError, match=r"short.txt: it has \d+ tokens, expected at least 64, a window of text"):
        build(checkpoint, tmp_path / "engine", tmp_path / "short.txt")
    with pytest.raises(ConfigError, match="it cannot be read"):
        build(checkpoint, tmp_path / "engine", tmp_path / "absent.txt")
    with pytest.raises(ConfigError, match="it is a folder, a pipe or a device"):
        build(checkpoint, tmp_path / "engine", Path("/dev/zero"))
    with pytest.raises(ConfigError, match="search takes no calibration text"):
        planned(checkpoint, method="search", num_tokens=0)
    for flags in ({"method": "gptq"}, {"codes": tmp_path / "codes", "automatic": True}):
        options = {"precision": "fp32", "calibration": Calibration(**flags)}
        with pytest.raises(ConfigError, match="fp32 stores every matrix as floats"):
            prepare_build(EngineOptions(checkpoint=str(checkpoint), **options))
    few = Calibration(num_tokens=-5, automatic=True)
    with pytest.raises(ConfigError, match="asked for -5 tokens"):
        build_engine(BuildOptions(checkpoint=str(checkpoint), output=tmp_path / "engine", calibration=few))
    assert not (tmp_path / "engine").exists()


@pytest.mark.parametrize("kernels", KERNELS)
def test_nearest_rounds_to_the_scale_of_the_largest_value(tmp_path, kernels):
    checkpoint = write_phixtral(tmp_path / "model")
    options = {"kernels": kernels, "calibration": Calibration(method="nearest")}
    engine = build_engine(BuildOptions(checkpoint=str(checkpoint), output=tmp_path / "engine", **options))
    model, name = read_model(open_checkpoint(checkpoint)), "transformer.h.0.mixer.Wqkv.weight"
    stored = open_stored_weights(engine, model).recipe(name)
    weights, half = model.weights.load(name).reshape(384, -1, stored.block), 2 ** (stored.bits - 1)
    signed = np.take_along_axis(weights, np.abs(weights).argmax(axis=2)[..., None], axis=2) / -half
    scales = signed.astype(np.float16).astype(np.float32) if kernels == "moeship" else signed
    expected = (np.clip(np.rint(weights / scales), -half, half - 1) * scales).reshape(384, 128)
    assert np.abs(open_stored_weights(engine, model).load(name) - expected).max() < 1e-6
    assert ask_about_weights(engine, model).failures == ()


def planned(checkpoint, **options):
    options = EngineOptions(checkpoint=str(checkpoint), kernels="onnxruntime", calibration=Calibration(**options))
    return prepare_build(options)


def test_the_method_is_chosen_by_what_gptq_takes_where_nobody_names_one(tmp_path, monkeypatch):
    checkpoint = write_phixtral(tmp_path / "model")
    (tmp_path / "own.yml").write_text("preset: int4\nrules: [{role: [attention, expert, head], method: search}]\n")
    assert planned(checkpoint).wanted_codes() == {}  # a program's default is the recipe's
    found = planned(checkpoint, automatic=True)
    assert set(found.wanted_codes()) == {
        name for name, spec in found.model.weights.table.items() if spec.role in ("attention", "expert", "head")
    }
    assert planned(checkpoint, automatic=True, method="search").wanted_codes() == {}
    own = EngineOptions(
        checkpoint=str(checkpoint), kernels="onnxruntime", recipe=tmp_path / "own.yml",
        calibration=Calibration(automatic=True),
    )  # fmt: skip
    assert prepare_build(own).wanted_codes() == {}
    monkeypatch.setattr("trt_build.ort.planning.prepare.MOST_PRODUCTS", found.work().products - 1)
    assert planned(checkpoint, automatic=True).wanted_codes() == {}


def test_plan_says_what_gptq_takes(tmp_path, capsys):
    """For one layer by hand: of K input features, N rows and T tokens T K^2 / 2 + K^3 / 6 + N K^2 + 4 T N K products,
    the last 5 T N K for an expert's first matrix, which the second needs without codes too."""
    checkpoint = write_phixtral(tmp_path / "model")
    assert main(["plan", str(checkpoint), "--kernels", "onnxruntime", "--calibrate-tokens", "600"]) == 0
    assert "by gptq over 600 tokens, under 20 s of one core and" in capsys.readouterr().out
    assert main(["plan", str(checkpoint), "--kernels", "onnxruntime", "--method", "search"]) == 0
    assert "without a text; --method gptq solves them over 16,384 tokens, under 20 s" in capsys.readouterr().out
    build = planned(checkpoint, num_tokens=600)
    name = "transformer.h.0.moe.mlp.fc1.weight"  # 3 experts, 192 by 128; two thirds of the tokens
    work = work_of(build.model, {name: solvable(build.export.jobs)[name]}, 600)
    each = 400 * 128**2 // 2 + 128**3 // 6 + 192 * 128**2 + 5 * 400 * 192 * 128
    assert work.products == 3 * each
    assert work.seconds == pytest.approx(3 * each / 4e10 + 3 * 192 * 128 * 1.2e-7)


def test_where_gptq_was_nobodys_wish_and_cannot_solve_codes_are_searched(tmp_path, caplog, monkeypatch):
    checkpoint = write_phixtral(tmp_path / "model")

    def refused(*arguments):
        raise QuantizationError("quantising a matrix by GPTQ: its inputs are beyond float32")

    monkeypatch.setattr("trt_build.calibration.solve_codes", refused)
    for automatic, method in ((True, "gptq"), (False, "gptq")):
        options = {"automatic": automatic, "method": method}
        with pytest.raises(QuantizationError, match="beyond float32"):
            build_engine(
                BuildOptions(checkpoint=str(checkpoint), output=tmp_path / "engine", calibration=Calibration(**options))
            )
    options = BuildOptions(
        checkpoint=str(checkpoint), output=tmp_path / "engine", calibration=Calibration(automatic=True)
    )
    with caplog.at_level(logging.WARNING):
        engine = build_engine(options)
    assert "the codes are searched without a calibration text, because GPTQ cannot solve them" in caplog.text
    assert engine.manifest.precision.roles["expert"].methods == ("search",)
    assert engine.manifest.calibration is None


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("values", [(-1, 1), (-1, 0, 0, 1), tuple(range(-7, 8))], ids=["two", "three", "four bits"])
def test_weights_that_lie_on_a_grid_of_their_own_are_sound(tmp_path, text, kernels, values):
    """All weights that are alike are stored too large or too small by the same part, so errors do not cancel out."""
    checkpoint, generator = write_phixtral(tmp_path / "model"), np.random.default_rng(4)
    tensors = load_file(checkpoint / "model.safetensors")
    for name, array in tensors.items():
        if array.ndim == 2 and "gate" not in name:
            drawn = generator.choice(values, array.shape) * (1 + generator.random((len(array), 1)))
            tensors[name] = (drawn / np.std(values) / np.sqrt(array.shape[1])).astype(array.dtype)
    save_file(tensors, checkpoint / "model.safetensors")
    engine = build(checkpoint, tmp_path / "engine", text, kernels)
    assert ask_about_weights(engine, read_model(open_checkpoint(checkpoint))).failures == ()
