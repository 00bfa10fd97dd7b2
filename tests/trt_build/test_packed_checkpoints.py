"""Engines of checkpoints whose weights other tools packed: codes that fit are kept, others are quantised anew."""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
from checkpoints import write_phixtral_checkpoint
from engine_faults import FAULTS, with_fault
from mixtral_checkpoints import write_mixtral_checkpoint
from packed_checkpoints import pack_awq, pack_compressed, pack_gptq, pack_int8, pack_nf4

from export.checkpoint.folder import open_checkpoint
from export.checkpoint.tensor_table import Role, Weights
from export.families import read_model
from trt_build.calibration import Calibration
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.planning.plan import plan_engine
from trt_build.ort.planning.prepare import EngineOptions, prepare_build
from trt_build.ort.questions.graph import ask_about_graph
from trt_build.ort.questions.stored_weights import open_stored_weights
from trt_build.ort.questions.weights import ask_about_weights

KERNELS = ["onnxruntime", pytest.param("moeship", marks=pytest.mark.needs_kernels)]
PACKED = (Role.ATTENTION, Role.EXPERT)


def write_phixtral(folder):
    return write_phixtral_checkpoint(
        folder, seed=3, num_experts=3, experts_per_token=2, hidden_size=128, num_heads=4, rotary_dim=16, ffn_size=192
    )


def write_mixtral(folder):
    return write_mixtral_checkpoint(folder, seed=1, spelling="published", hidden_size=128, ffn_size=192)


def errors_by_role(engine, checkpoint):
    """The largest difference of the stored values from the checkpoint's, by role."""
    model = read_model(open_checkpoint(checkpoint))
    stored, found = open_stored_weights(engine, model), {}
    for name, spec in model.weights.table.items():
        difference = float(np.abs(stored.load(name) - model.weights.load(name)).max())
        found[spec.role] = max(found.get(spec.role, 0.0), difference)
    return found


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("write", [write_phixtral, write_mixtral])
@pytest.mark.parametrize(
    ("options", "precision"),
    [
        ({"sym": True, "group_size": 64}, "int4"),
        ({"sym": False, "group_size": 64}, "int4"),
        ({"sym": False, "group_size": 32}, "int4"),
        ({"sym": False, "group_size": 128}, "int4"),  # 192 input features are one group and a half
        ({"sym": False, "bits": 3, "group_size": 64}, "int4"),
        ({"sym": True, "bits": 3, "group_size": 32}, "int4"),
        ({"sym": False, "group_size": 32}, "int8"),
        ({"sym": False, "bits": 8, "group_size": 64}, "int8"),
    ],
)
def test_codes_that_fit_are_kept_exactly(tmp_path, kernels, write, options, precision):
    checkpoint = pack_gptq(write(tmp_path / "packed"), **options)
    engine = build_engine(
        BuildOptions(checkpoint=str(checkpoint), output=tmp_path / "engine", precision=precision, kernels=kernels)
    )
    found = errors_by_role(engine, checkpoint)
    assert [found[role] for role in PACKED] == [0.0, 0.0]
    assert found[Role.HEAD] > 0  # stored as floats in the checkpoint, and quantised by us
    for role in PACKED:
        record = engine.manifest.packed[str(role)]
        assert (record.quantised_anew, record.relative_error) == (0, "0.000e+00")
        stored = engine.manifest.precision.roles[str(role)]
        assert stored.methods == ("kept",)
        bits = options.get("bits", 4)
        assert stored.bits == (4 if bits == 3 and kernels == "onnxruntime" else bits,)  # which has no 3 bits
        assert record.codes_kept > 0


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize(("pack", "precision"), [(pack_awq, "int4"), (pack_compressed, "int4"), (pack_int8, "int8")])
def test_codes_of_other_formats_are_kept(tmp_path, kernels, pack, precision):
    groups = {} if pack is pack_int8 else {"group_size": 32}
    checkpoint = pack(write_mixtral(tmp_path / "packed"), **groups)
    engine = build_engine(
        BuildOptions(checkpoint=str(checkpoint), output=tmp_path / "engine", precision=precision, kernels=kernels)
    )
    found = errors_by_role(engine, checkpoint)
    for role in PACKED:
        record = engine.manifest.packed[str(role)]
        assert (record.quantised_anew, record.codes_kept) == (0, 4)
        # bitsandbytes' scales are float32. moeship's kernels store float16, and the engine says what that loses.
        rounded = pack is pack_int8 and kernels == "moeship"
        assert 0 < float(record.relative_error) < 2.0**-11 if rounded else found[role] < 1e-7


@pytest.mark.parametrize("sym", [True, False])
def test_on_cuda_experts_keep_codes_without_zero_points_alone(tmp_path, sym):
    checkpoint = pack_gptq(write_phixtral(tmp_path / "packed"), group_size=64, sym=sym)
    engine = build_engine(BuildOptions(checkpoint=str(checkpoint), output=tmp_path / "engine", provider="cuda"))
    assert engine.manifest.packed["attention"].codes_kept == 6
    assert engine.manifest.packed["expert"].codes_kept == (6 if sym else 0)
    found = errors_by_role(engine, checkpoint)
    assert found[Role.ATTENTION] == 0
    assert (found[Role.EXPERT] == 0) is sym
    assert ask_about_weights(engine, read_model(open_checkpoint(checkpoint))).failures == ()


@pytest.mark.parametrize("name", ["one code off by one", "one block's scale times 1.05"])
def test_kept_codes_may_not_differ_at_all(tmp_path, name):
    checkpoint = pack_gptq(write_mixtral(tmp_path / "packed"), group_size=64)
    engine = build_engine(BuildOptions(checkpoint=str(checkpoint), output=tmp_path / "e", kernels="onnxruntime"))
    model = read_model(open_checkpoint(checkpoint))
    network = model.family.network(model.weights.checkpoint.config)
    failures = ask_about_weights(with_fault(engine, tmp_path / "wrong", FAULTS[name], network), model).failures
    assert ": found relative error" in failures[0]
    assert failures[0].endswith("allowed 1e-05")


def test_nf4_is_quantised_anew(tmp_path):
    checkpoint = pack_nf4(write_phixtral(tmp_path / "packed"))
    engine = build_engine(BuildOptions(checkpoint=str(checkpoint), output=tmp_path / "engine", kernels="onnxruntime"))
    assert engine.manifest.packed["expert"].quantised_anew == 6
    assert float(engine.manifest.packed["expert"].relative_error) > 0.01
    assert ask_about_weights(engine, read_model(open_checkpoint(checkpoint))).failures == ()


def test_of_solved_codes_no_error_is_claimed(tmp_path, caplog):
    checkpoint = pack_nf4(write_phixtral(tmp_path / "packed"))
    options = {"kernels": "onnxruntime", "calibration": Calibration(method="gptq", num_tokens=512)}
    with caplog.at_level(logging.INFO):
        engine = build_engine(BuildOptions(checkpoint=str(checkpoint), output=tmp_path / "engine", **options))
    assert engine.manifest.packed["expert"].quantised_anew == 6
    assert engine.manifest.packed["expert"].relative_error is None
    assert json.loads((engine.folder / "engine.json").read_text())["packed"]["expert"]["relative_error"] is None
    assert "the relative error that this adds" not in caplog.text


def test_codes_that_should_have_been_kept_are_missed(tmp_path, monkeypatch):
    checkpoint = pack_gptq(write_phixtral(tmp_path / "packed"), group_size=64)
    with monkeypatch.context() as patched:
        patched.setattr(Weights, "grids", lambda self: {})
        engine = build_engine(
            BuildOptions(checkpoint=str(checkpoint), output=tmp_path / "engine", kernels="onnxruntime")
        )
    failures = ask_about_weights(engine, read_model(open_checkpoint(checkpoint))).failures
    assert any("attention" in failure and "relative error" in failure for failure in failures)
    assert any("expert 1" in failure and "relative error" in failure for failure in failures)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("write", [write_phixtral, write_mixtral])
def test_an_engine_with_kept_codes_and_zero_points_passes_its_verification(tmp_path, kernels, write):
    checkpoint = pack_gptq(write(tmp_path / "packed"), group_size=64)
    engine = build_engine(BuildOptions(checkpoint=str(checkpoint), output=tmp_path / "engine", kernels=kernels))
    model = read_model(open_checkpoint(checkpoint))
    for answer in (ask_about_weights(engine, model), ask_about_graph(engine, model, list(range(5, 45)))):
        assert answer.failures == ()


@pytest.mark.parametrize(
    ("options", "precision", "reason"),
    [
        ({"ordered": True, "group_size": 64}, "int4", "they lie on no uniform grid of neighbouring input features"),
        ({"bits": 8, "group_size": 64}, "int4", "their codes have 8 bits and the engine's 4"),
        ({"bits": 4, "group_size": 16}, "int4", "their groups of 16 are no multiple of the kernels' blocks of 64"),
    ],
)
def test_what_does_not_fit_is_quantised_anew_and_said(tmp_path, caplog, options, precision, reason):
    checkpoint = pack_gptq(write_phixtral(tmp_path / "packed"), **options)
    with caplog.at_level(logging.INFO):
        engine = build_engine(
            BuildOptions(
                checkpoint=str(checkpoint), output=tmp_path / "engine", precision=precision, kernels="onnxruntime"
            )
        )
    model = read_model(open_checkpoint(checkpoint))
    stored = open_stored_weights(engine, model)
    for role in PACKED:
        rows = [name for name, spec in model.weights.table.items() if spec.role is role]
        wanted = [model.weights.load(name).astype(np.float64) for name in rows]
        error = sum(np.square(stored.load(name) - values).sum() for name, values in zip(rows, wanted, strict=True))
        expected = np.sqrt(error / sum(np.square(values).sum() for values in wanted))
        record = engine.manifest.packed[str(role)]
        assert (record.codes_kept, record.quantised_anew) == (0, len(rows))
        assert record.reasons == (reason.replace("they lie", "their values lie"),)
        assert float(record.relative_error) == pytest.approx(expected, rel=2e-3)
        said = f"{role}: {len(rows)} weights are quantised anew, because {record.reasons[0]}; the relative error"
        assert f"{said} that this adds is {float(record.relative_error):.2%}" in caplog.text


def test_a_plan_knows_the_bytes_and_says_what_will_become_of_the_weights(tmp_path):
    checkpoint = pack_gptq(write_phixtral(tmp_path / "packed"), group_size=64)
    plan = plan_engine(prepare_build(EngineOptions(checkpoint=str(checkpoint), kernels="onnxruntime")))
    engine = build_engine(BuildOptions(checkpoint=str(checkpoint), output=tmp_path / "engine", kernels="onnxruntime"))
    assert plan.files == {path.name: path.stat().st_size for path in engine.folder.iterdir() if path.is_file()}
    assert plan.source_bytes < (checkpoint / "model.safetensors").stat().st_size
    assert "the checkpoint packs its weights as gptq int4 in groups of 64: expert: the codes of 6 weights are kept " \
           "exactly" in plan.notes  # fmt: skip


def test_a_build_says_once_what_becomes_of_codes_that_are_kept(tmp_path, caplog):
    checkpoint = pack_gptq(write_phixtral(tmp_path / "packed"), group_size=64)
    with caplog.at_level(logging.INFO):
        build_engine(BuildOptions(checkpoint=str(checkpoint), output=tmp_path / "engine", kernels="onnxruntime"))
    assert caplog.text.count(": expert: the codes of 6 weights are kept exactly") == 1


def test_a_resumed_build_knows_the_errors_of_all_parts(tmp_path):
    checkpoint = pack_gptq(write_phixtral(tmp_path / "packed"), group_size=64, ordered=True)

    def build(output, progress=None):
        options = BuildOptions(checkpoint=str(checkpoint), output=tmp_path / output, kernels="onnxruntime")
        return build_engine(options, progress)

    def interrupt(progress):
        if progress.parts >= 9:
            raise KeyboardInterrupt

    whole = build("whole")
    with pytest.raises(KeyboardInterrupt):
        build("resumed", interrupt)
    assert build("resumed").manifest.packed == whole.manifest.packed
    assert float(whole.manifest.packed["expert"].relative_error) > 0.01


def test_a_float_engine_has_the_dequantised_values(tmp_path):
    checkpoint = pack_gptq(write_phixtral(tmp_path / "packed"), group_size=64, ordered=True)
    engine = build_engine(BuildOptions(checkpoint=str(checkpoint), output=tmp_path / "engine", precision="fp32"))
    assert set(errors_by_role(engine, checkpoint).values()) == {0.0}
    assert json.loads((engine.folder / "engine.json").read_text())["packed"]["expert"]["as_floats"] == 6
