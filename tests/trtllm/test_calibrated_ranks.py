"""Group-wise rank files from the codes that GPTQ solved: written without a second rounding, and computed by the
stand-in as the reference computes the dequantised model."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
from mixtral_checkpoints import write_mixtral_checkpoint
from trtllm.building import build, options_of
from trtllm.ranks import Ranks, relative_difference, shares, understood

from cli.main import main
from export.calibration.overlay import Overlay
from export.calibration.store import CalibrationText, solve_codes
from export.reference.model import Reference
from export.trtllm.checkpoint import CheckpointOptions, plan_checkpoint, write_checkpoint
from trt_build.calibration import Calibration, calibration_record, text_record
from trt_build.errors import EngineError, VerificationFailed
from trt_build.trtllm.build import command_of
from trt_build.trtllm.plan import solvable
from trt_build.trtllm.questions.rank_weights import open_rank_weights
from trt_build.trtllm.questions.weights import RankFolder, ask_about_weights

IDS = np.random.default_rng(8).integers(0, 277, 48).tolist()
BAR = 1e-5  # the largest difference of a logit over the largest logit: both sides sum in float32


def calibration_text():
    ids = np.random.default_rng(1).integers(0, 277, (4, 48)).tolist()
    return CalibrationText(windows=ids, record={"names": ["random"], "bytes": 0, "sha256": ""})


@pytest.fixture(scope="module")
def solved(tmp_path_factory):
    """Where codes that were solved once are kept."""
    return tmp_path_factory.mktemp("solved")


@pytest.mark.usefixtures("network")
@pytest.mark.parametrize(
    ("precision", "dtype", "moe_tp", "moe_ep"),
    [
        ("int4_gptq", None, 1, 1),
        ("int4_gptq", None, 2, 1),
        ("int4_gptq", None, 1, 2),
        ("int4_gptq", "bfloat16", 2, 1),
        ("int4_awq", None, 2, 1),
    ],
)
def test_rank_files_hold_the_codes_that_were_solved(
    tmp_path, packable_phixtral, solved, precision, dtype, moe_tp, moe_ep
):
    model, text = understood(packable_phixtral), calibration_text()
    options = CheckpointOptions(
        precision=precision, dtype=dtype, group_size=64, parallel=shares(moe_tp, moe_ep), calibration=text_record(text)
    )
    plan = plan_checkpoint(model, options)
    solved_before = solved / f"{precision}-{plan.config['dtype']}"  # taken up there, whatever the ranks
    codes = solve_codes(solved_before, model, solvable(plan), text)
    folder = tmp_path / "ranks"
    plan = write_checkpoint(model, options, folder, solved=codes, record=calibration_record(codes))
    ranks = RankFolder(plan=plan, folder=folder, max_sequence=64)
    assert ask_about_weights(ranks).failures == ()
    assert set(open_rank_weights(plan, folder).checksums) == set(codes.matrices)
    assert all(open_rank_weights(plan, folder).checksums.values())
    if dtype is not None:  # whose floats, which the reference does not round, are rounded
        return
    rows = {
        name: {place: codes.rows(name, place, 0, matrix.shape[1]) for place in range(matrix.shape[0])}
        for name, matrix in codes.matrices.items()
    }
    assert len(rows) == 4 * model.architecture.num_layers
    own = model.weights
    dequantised = Overlay(checkpoint=own.checkpoint, table=own.table, solved=rows)
    expected = next(iter(Reference(dataclasses.replace(model, weights=dequantised)).run([IDS])))[0]
    assert relative_difference(Ranks(folder).logits(IDS), expected) <= BAR


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    words = ["the", "ferry", "left", "late", "because", "tide", "was", "low", "1", "23", "!"]
    path.write_text(" ".join(np.random.default_rng(2).choice(words, 600)))
    return path


def test_a_build_solves_codes_over_a_text_and_finds_altered_ones(tmp_path, packable_phixtral, text):
    options = {
        "precision": "int4_gptq", "group_size": 64, "until": "checkpoint",
        "calibration": Calibration(texts=(text,), num_tokens=256),
    }  # fmt: skip
    outcome = build(packable_phixtral, tmp_path / "engine", **options)
    folder = outcome.checkpoint
    manifest = json.loads((folder / "checkpoint.json").read_text())
    assert manifest["settings"]["calibration"]["tokens"] == manifest["calibration"]["tokens"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["engine.checkpoint", "text.txt"]
    build(packable_phixtral, tmp_path / "engine", **options)  # it is there already
    rank = folder / "rank0.safetensors"
    data = bytearray(rank.read_bytes())
    header = int.from_bytes(data[:8], "little")
    place = json.loads(data[8 : 8 + header])["transformer.layers.0.mlp.fc.weight"]["data_offsets"][0]
    data[8 + header + place] ^= 1
    rank.write_bytes(data)
    with pytest.raises(VerificationFailed, match="layer 0, expert, .*not those that were solved"):
        build(packable_phixtral, tmp_path / "engine", **options)


def test_flags_of_the_method_are_in_the_command_that_finishes_a_build(tmp_path, packable_phixtral, text):
    calibration = Calibration(method="gptq", texts=(text,), num_tokens=512, codes=tmp_path / "codes")
    command = command_of(options_of(packable_phixtral, tmp_path / "engine", calibration=calibration))
    start = command.index("--method")
    expected = ["--method", "gptq", "--calibrate", str(text), "--calibrate-tokens", "512"]
    assert command[start : start + 8] == [*expected, "--codes", str(tmp_path / "codes")]


def test_gptq_is_for_group_wise_precisions(tmp_path, packable_phixtral, text):
    with pytest.raises(EngineError, match="are for --precision int4_gptq and int4_awq, .* found int4"):
        build(packable_phixtral, tmp_path / "engine", precision="int4", calibration=Calibration(texts=(text,)))


def test_plan_says_what_gptq_takes_as_for_onnx_runtime(tmp_path, capsys):
    """A Mixtral whose matrices GPTQ solves in both backends: the same rows, so the same words and figures."""
    checkpoint = write_mixtral_checkpoint(
        tmp_path / "model", seed=1, spelling="published", hidden_size=128, num_heads=4, num_kv_heads=2, ffn_size=256
    )

    def planned(*flags):
        assert main(["plan", str(checkpoint), *flags]) == 0
        return [line.strip() for line in capsys.readouterr().out.splitlines() if line.strip().startswith("codes  ")]

    library = ("--backend", "tensorrt-llm", "--gpu-sm", "90")
    for method in ("gptq", "search"):
        said = planned(*library, "--precision", "int4_gptq", "--method", method)
        assert [line.split() for line in said] == [line.split() for line in planned("--method", method)]
        assert f"{'by gptq' if method == 'gptq' else '--method gptq solves them'} over 16,384 tokens" in said[0]
    assert planned(*library, "--precision", "int8") == []
