"""Building: what an engine directory holds, what is refused, and what a build costs in memory."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import onnx
import onnxruntime
import pytest
from checkpoints import write_phixtral_checkpoint
from conftest import QUANTIZABLE
from onnx import helper
from onnx.external_data_helper import load_external_data_for_model
from safetensors.numpy import load_file, save_file

from cli.main import main
from conversion import watch
from export.errors import CheckpointError, ConfigError, ExportError, OutputError, QuantizationError
from export.quantize.grid import dequantize_blocks, unpack
from trt_build.errors import EngineError
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.engine import open_engine
from trt_build.ort.session import Session

SCRIPT = Path(__file__).parents[2] / "trt_build" / "build_engine.py"
BUILT = (
    ("fp32", "cpu"), ("int4", "cpu", "onnxruntime"), ("int4", "cpu", "moeship"), ("fp16", "cuda"), ("int4", "cuda"),
)  # fmt: skip


def build(checkpoint, output, **options):
    return build_engine(BuildOptions(checkpoint=str(checkpoint), output=output, **options))


@pytest.fixture
def unlinked_engines(tmp_path, tiny_engines):
    """What `tiny_engines` takes -> a copy: onnx refuses files that other tests have packaged by hard links."""

    def copy(*built):
        return Path(shutil.copytree(tiny_engines(*built), tmp_path / "-".join(built), dirs_exist_ok=True))

    return copy


def initializers(engine_folder):
    model = onnx.load(str(engine_folder / "model.onnx"), load_external_data=False)
    load_external_data_for_model(model, str(engine_folder))
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def test_graphs_pass_onnx_own_checker(unlinked_engines):
    for built in BUILT:
        for name in ("model.onnx", "model_serving.onnx", "model_scoring.onnx"):
            model = onnx.load(str(unlinked_engines(*built) / name), load_external_data=False)
            assert len(model.graph.node) > 20
            # The least that has the opset: each release of ONNX writes a later one, which older runtimes refuse.
            [opset] = [entry for entry in model.opset_import if not entry.domain]
            assert model.ir_version == helper.find_min_ir_version_for([opset])
            onnx.checker.check_model(str(unlinked_engines(*built) / name))


# What each operator would also take, and why it bears on nothing here.
UNWRITTEN = {
    "GroupQueryAttention": {
        "causal", "qk_output", "sliding_window_cache",  # 1, none and off are the only values with this meaning
        "k_quant_type", "v_quant_type", "kv_cache_bit_width",  # the cache is not quantised
        "qk_norm_epsilon", "q_norm_epsilon", "k_norm_epsilon",  # no such norms
    },
    "QMoE": {
        "activation_alpha", "activation_beta", "swiglu_limit", "swiglu_limit_after_activation",  # of swiglu
        "fc1_expert_weight_bits", "fc2_expert_weight_bits", "fc3_expert_weight_bits",  # expert_weight_bits is written
    },
    "MoE": {"activation_alpha", "activation_beta", "swiglu_limit", "swiglu_limit_after_activation"},
    "MatMulNBits": set(),
    "GatherBlockQuantized": set(),
    "FusedMatMul": set(),
}  # fmt: skip


def test_every_attribute_that_bears_on_the_result_is_written(tiny_engines):
    schemas = {
        schema.name: set(schema.attributes)
        for schema in onnxruntime.capi.onnxruntime_pybind11_state.get_all_operator_schema()
        if schema.domain == "com.microsoft"
    }
    unwritten = {}
    for built in BUILT:
        for node in onnx.load(str(tiny_engines(*built) / "model.onnx"), load_external_data=False).graph.node:
            if node.domain == "com.microsoft":
                absent = schemas[node.op_type] - {attribute.name for attribute in node.attribute}
                unwritten.setdefault(node.op_type, set()).update(absent)
    assert unwritten == UNWRITTEN


@pytest.mark.parametrize(("precision", "bits", "relative_error"), [("int8", 8, 0.006), ("int4", 4, 0.1)])
def test_stored_experts_stand_in_the_manifests_order_with_the_grids_error(
    tiny_checkpoint, unlinked_engines, precision, bits, relative_error
):
    folder = unlinked_engines(precision, "cpu", "onnxruntime")
    found, outside = initializers(folder), load_file(tiny_checkpoint / "model.safetensors")
    order = open_engine(folder).manifest.expert_order
    assert order == (4, 3, 2, 1, 0)
    name = "transformer.h.2.moe.mlp.fc2.weight"
    restored = dequantize_blocks(unpack(found[f"{name}.codes"], bits), found[f"{name}.scales"], bits)
    for place, expert in enumerate(order):
        expected = outside[f"transformer.h.2.moe.mlp.{expert}.fc2.weight"]
        assert np.std(restored[place] - expected) <= relative_error * np.std(expected)
        assert (
            found["transformer.h.2.moe.gate.weight"][place] == outside["transformer.h.2.moe.gate.weight"][expert]
        ).all()


def test_router_norms_and_biases_stay_float32(unlinked_engines):
    for name, values in initializers(unlinked_engines("int4", "cpu", "onnxruntime")).items():
        if name.endswith((".bias", "gate.weight", ".ln.weight")):
            assert values.dtype == np.float32


def test_the_manifest_counts_the_bits_that_the_data_file_holds(unlinked_engines):
    engine = unlinked_engines("int4", "cpu", "onnxruntime")
    manifest = open_engine(engine).manifest
    stored = sum(values.nbytes for name, values in initializers(engine).items() if "." in name)
    num_weights = sum(values.size for values in initializers(unlinked_engines("fp32")).values())
    small = {"rotary/cos_cache", "rotary/sin_cache"}
    num_weights -= sum(v.size for n, v in initializers(unlinked_engines("fp32")).items() if "." not in n or n in small)
    assert manifest.precision.average_bits_per_weight == pytest.approx(8 * stored / num_weights, abs=1e-3)
    # 4 bits and a float32 scale for 64 weights are 4.5 bits; the ends at 8 bits, norms and biases add the rest.
    assert 4.5 < manifest.precision.average_bits_per_weight < 5.3


def test_the_script_builds_without_the_command_line_of_moeship(tmp_path, tiny_checkpoint):
    output = tmp_path / "engine"
    words = ["--checkpoint", tiny_checkpoint, "--backend", "onnxruntime", "--precision", "int8", "--output", output]
    done = subprocess.run([sys.executable, SCRIPT, *words, "--json"], capture_output=True, text=True, check=True)
    assert json.loads(done.stdout)["precision"]["name"] == "int8"
    assert open_engine(output).manifest.family == "phixtral"


def test_two_builds_of_one_checkpoint_are_equal_byte_for_byte(tmp_path, tiny_checkpoint, tiny_engine):
    again = build(tiny_checkpoint, tmp_path / "again", precision="int4")
    assert again.manifest.files == open_engine(tiny_engine).manifest.files


def test_experts_per_token_can_be_overridden(tmp_path, tiny_checkpoint, tiny_engine):
    three = build(tiny_checkpoint, tmp_path / "three", experts_per_token=3)
    assert three.manifest.architecture.experts_per_token == 3
    logits = [
        session.run(session.new_cache(), [1, 2, 3]) for session in (Session(three), Session(open_engine(tiny_engine)))
    ]
    assert np.abs(logits[0] - logits[1]).max() > 0.1


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"precision": "int5"}, QuantizationError, "'int5' is unknown; did you mean int"),
        ({"max_sequence": 9999}, ConfigError, "found 9999 tokens, expected 1 to 640"),
        ({"max_sequence": 0}, ConfigError, "found 0 tokens, expected 1 to 640"),
        ({"experts_per_token": 0}, ConfigError, "found 0, expected 1 to 5"),
    ],
)
def test_an_option_out_of_range_is_refused_and_nothing_is_written(tmp_path, tiny_checkpoint, options, error, text):
    with pytest.raises(error, match=text):
        build(tiny_checkpoint, tmp_path / "engine", **options)
    assert list(tmp_path.iterdir()) == []


def test_an_output_that_exists_is_kept(tmp_path, tiny_checkpoint):
    (tmp_path / "engine").mkdir()
    (tmp_path / "engine" / "precious").write_text("kept")
    with pytest.raises(OutputError, match=r"engine exists already; name another output or remove it first"):
        build(tiny_checkpoint, tmp_path / "engine")
    assert (tmp_path / "engine" / "precious").read_text() == "kept"


NOT_UTF8 = os.fsdecode(b"caf\xe9")  # as Latin-1 has it


def test_names_that_no_manifest_can_hold_are_refused(tmp_path, tiny_checkpoint, tiny_engine):
    """What was built of such a checkpoint could not be opened, since no JSON text holds half of a surrogate pair."""
    source = Path(shutil.copytree(tiny_checkpoint, tmp_path / NOT_UTF8))
    with pytest.raises(CheckpointError, match="is not UTF-8; rename it"):
        build(source, tmp_path / "engine")
    source.rename(tmp_path / "source")
    with pytest.raises(OutputError, match="is not UTF-8; rename it"):
        build(tmp_path / "source", tmp_path / NOT_UTF8)
    weights = tmp_path / "source" / "model.safetensors"
    weights.rename(weights.with_name(f"{NOT_UTF8}.safetensors"))
    with pytest.raises(CheckpointError, match="is not UTF-8; rename it"):
        build(tmp_path / "source", tmp_path / "engine")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
    with pytest.raises(EngineError, match="is not UTF-8; rename it"):
        open_engine(shutil.copytree(tiny_engine, tmp_path / NOT_UTF8))


def test_an_output_in_a_folder_that_is_not_there_is_refused(tmp_path, tiny_checkpoint):
    with pytest.raises(OutputError, match=r"the folder .*absent does not exist; create it first"):
        build(tiny_checkpoint, tmp_path / "absent" / "engine")


def test_a_build_that_fails_half_way_leaves_nothing(tmp_path, tiny_checkpoint):
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["lm_head.linear.bias"][3] = np.nan  # the last tensor to be written
    save_file(tensors, checkpoint / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head.linear.bias .* 1 of 352 values are NaN"):
        build(checkpoint, tmp_path / "engine")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_build_that_is_interrupted_before_its_first_part_leaves_nothing(tmp_path, tiny_checkpoint):
    def interrupt(_progress):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        build_engine(BuildOptions(checkpoint=str(tiny_checkpoint), output=tmp_path / "engine"), interrupt)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_told_and_leaves_nothing(tmp_path, tiny_checkpoint, monkeypatch):
    def full(*_arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.pwrite", full)
    with pytest.raises(OutputError, match=r"writing the engine to .*engine: No space left on device"):
        build(tiny_checkpoint, tmp_path / "engine")
    assert list(tmp_path.iterdir()) == []


def test_sizes_that_the_kernels_do_not_take_are_refused_before_anything_is_written(tmp_path):
    small_heads = write_phixtral_checkpoint(tmp_path / "a", seed=1, num_experts=2, experts_per_token=2)
    with pytest.raises(ExportError, match="head size 8 and the rotary dimension 4, .* takes multiples of 16"):
        build(small_heads, tmp_path / "engine", precision="fp32")
    sizes = {**QUANTIZABLE, "ffn_size": 72}
    odd_width = write_phixtral_checkpoint(tmp_path / "b", seed=1, num_experts=2, experts_per_token=2, **sizes)
    with pytest.raises(QuantizationError, match=r"fc1.weight: 192 and 72 input features are not a multiple"):
        build(odd_width, tmp_path / "engine", kernels="onnxruntime")  # one block size for both matrices
    with pytest.raises(QuantizationError, match=r"fc2.weight: 72 input features are not a multiple"):
        build(odd_width, tmp_path / "engine", kernels="moeship")
    assert not (tmp_path / "engine").exists()


def test_a_checkpoint_without_tokenizer_is_refused(tmp_path, tiny_checkpoint):
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    (checkpoint / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match=r"no tokenizer.json; save one beside the weights"):
        build(checkpoint, tmp_path / "engine")


def test_the_end_token_falls_back_to_the_tokenizers_own(tmp_path, tiny_checkpoint, caplog):
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    config = json.loads((checkpoint / "config.json").read_text())
    del config["eos_token_id"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    assert build(checkpoint, tmp_path / "engine").manifest.eos_token_ids == (256,)
    (checkpoint / "tokenizer_config.json").unlink()
    with caplog.at_level("WARNING"):
        engine = build(checkpoint, tmp_path / "other")
    assert engine.manifest.eos_token_ids == ()
    assert "no file names one, so every answer runs to its limit of tokens" in caplog.text
    genai = json.loads((engine.folder / "genai_config.json").read_text())["model"]
    assert (genai["eos_token_id"], genai["bos_token_id"], "pad_token_id" in genai) == ([], 256, False)


@pytest.mark.parametrize(
    ("found", "text"),
    [
        *((found, "expected a token id or a list of them") for found in ("abc", [1.5], -1, True, {"a": 1})),
        (352, "eos_token_id holds 352, expected token ids below 352"),
        ([256, 300], "eos_token_id holds 300, and the tokenizer has ids below 257 alone"),
    ],
)
def test_an_end_token_that_is_never_produced_is_refused(tmp_path, tiny_checkpoint, found, text):
    checkpoint = Path(shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint"))
    config = json.loads((checkpoint / "config.json").read_text())
    del config["eos_token_id"]
    (checkpoint / "config.json").write_text(json.dumps(config))
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": found}))
    with pytest.raises(ConfigError, match=text):
        build(checkpoint, tmp_path / "engine")
    assert not (tmp_path / "engine").exists()
    (checkpoint / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 256]}))
    assert build(checkpoint, tmp_path / "engine").manifest.eos_token_ids == (3, 256)


def test_a_disk_without_room_is_told_before_anything_is_written(tmp_path, tiny_checkpoint, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _path: SimpleNamespace(free=10_000))
    with pytest.raises(OutputError, match=r"writing the engine: it takes .* GB, .* has 0.00 GB free; make room"):
        build(tiny_checkpoint, tmp_path / "engine")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", [[sys.executable, SCRIPT], [sys.executable, "-m", "cli.main", "build"]])
def test_what_the_system_refuses_ends_with_status_2_and_one_line(tmp_path, tiny_checkpoint, command):
    words = ["--checkpoint", tiny_checkpoint, "--output", tmp_path / ("x" * 300)]
    done = subprocess.run([*command, *words], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert "File name too long" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_long_output_name_is_no_obstacle(tmp_path, tiny_checkpoint):
    assert build(tiny_checkpoint, tmp_path / ("e" * 250)).folder.is_dir()


def test_errors_end_the_command_with_status_2_and_one_line(tmp_path, tiny_checkpoint, capsys):
    status = main(["build", "--checkpoint", str(tmp_path / "nowhere"), "--output", str(tmp_path / "engine")])
    output = capsys.readouterr()
    assert (status, output.out) == (2, "")
    assert output.err.startswith("CheckpointError: opening the checkpoint")


def test_a_builds_memory_does_not_grow_with_its_model(tmp_path):
    sizes = {"hidden_size": 1024, "num_heads": 16, "ffn_size": 2048, "rotary_dim": 32, "dtype": "float16"}
    peaks = []
    for layers in (2, 6):  # of 42 MB each
        folder = tmp_path / f"{layers} layers"
        write_phixtral_checkpoint(folder, seed=1, num_experts=4, experts_per_token=2, num_layers=layers, **sizes)
        words = ["build", "--checkpoint", str(folder), "--output", str(tmp_path / f"engine-{layers}")]
        words += ["--method", "search"]  # calibration takes minutes; tests/trtllm/test_checkpoint.py holds its memory
        peaks.append(watch([sys.executable, "-m", "cli.main", *words])["peak_bytes"])
    assert peaks[1] <= 1.1 * peaks[0]
