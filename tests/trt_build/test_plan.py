"""What a plan says, against what a build then makes and takes."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from checkpoints import write_phi_checkpoint, write_phixtral_checkpoint
from conftest import QUANTIZABLE
from mixtral_checkpoints import SPELLINGS, write_mixtral_checkpoint

from conversion import watch
from export.errors import ConfigError
from trt_build.calibration import Calibration
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.planning.plan import plan_engine
from trt_build.ort.planning.prepare import EngineOptions, prepare_build


def plan(checkpoint, **options):
    return plan_engine(prepare_build(EngineOptions(checkpoint=str(checkpoint), **options)))


@pytest.mark.parametrize(
    "options",
    [
        {"precision": "int4"},
        {"precision": "int8", "max_sequence": 99},
        {"precision": "fp32", "experts_per_token": 3},
        {"precision": "int4", "provider": "cuda"},
        {"precision": "fp16", "provider": "cuda"},
        {"precision": "int4", "kernels": "onnxruntime"},
        {"precision": "int4", "kernels": "moeship"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
def test_every_file_of_the_engine_is_planned_to_the_byte(tmp_path, tiny_checkpoint, options):
    planned = plan(tiny_checkpoint, **options)
    built = build_engine(BuildOptions(checkpoint=str(tiny_checkpoint), output=tmp_path / "engine", **options))
    found = {path.name: path.stat().st_size for path in built.folder.iterdir()}
    assert planned.files == found
    assert planned.engine_bytes == sum(found.values())
    assert planned.average_bits_per_weight == pytest.approx(built.manifest.precision.average_bits_per_weight, abs=1e-3)


@pytest.mark.parametrize("provider", ["cpu", "cuda"])
def test_what_gptq_records_is_planned_but_for_digits_of_token_counts(tmp_path, tiny_checkpoint, provider):
    options = {"provider": provider, "calibration": Calibration(method="gptq", num_tokens=512)}
    planned = plan(tiny_checkpoint, **options)
    built = build_engine(BuildOptions(checkpoint=str(tiny_checkpoint), output=tmp_path / "engine", **options))
    found = {path.name: path.stat().st_size for path in built.folder.iterdir()}
    counts = built.manifest.calibration["tokens_by_expert"].values()
    assert built.manifest.calibration["fallen_back"] == {}
    off = sum(len(str(count)) - len(str(512 * 2 // len(own))) for own in counts for count in own)
    assert found.pop("engine.json") - planned.files["engine.json"] == off
    assert {name: size for name, size in planned.files.items() if name != "engine.json"} == found
    with pytest.raises(ConfigError, match="it cannot be read"):
        plan(tiny_checkpoint, calibration=Calibration(texts=(tmp_path / "absent.txt",)))


def test_a_dense_model_is_planned_to_the_byte(tmp_path):
    checkpoint = write_phi_checkpoint(tmp_path / "dense", seed=1, **QUANTIZABLE)
    planned = plan(checkpoint, precision="int8")
    built = build_engine(BuildOptions(checkpoint=str(checkpoint), output=tmp_path / "engine", precision="int8"))
    assert planned.files == {path.name: path.stat().st_size for path in built.folder.iterdir()}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("asked", [{"provider": "cpu"}, {"provider": "cuda"}, {"kernels": "onnxruntime"}], ids=str)
def test_a_mixtral_is_planned_to_the_byte_in_both_spellings(tmp_path, spelling, asked):
    sizes = {"hidden_size": 128, "num_heads": 8, "ffn_size": 192}
    checkpoint = write_mixtral_checkpoint(tmp_path / "c", seed=1, spelling=spelling, **sizes)
    options = {"precision": "int4", **asked}
    planned = plan(checkpoint, **options)
    built = build_engine(BuildOptions(checkpoint=str(checkpoint), output=tmp_path / "engine", **options))
    assert planned.files == {path.name: path.stat().st_size for path in built.folder.iterdir()}


@pytest.mark.parametrize(
    ("kernels", "scale_bytes", "block", "head_bits", "last_bits"),
    [("moeship", 2, 32, 6, 5), ("onnxruntime", 4, 64, 8, 4)],
)
def test_bytes_by_role_and_per_token_are_those_worked_by_hand(
    tiny_checkpoint, kernels, scale_bytes, block, head_bits, last_bits
):
    # H 192, F 448, V 352, E 5, K 2, L 3. A block of int4 is 64 weights of 4 bits and one scale, 32 for moeship's
    # kernels, since 128 divides neither width. The scale is float16 for moeship's kernels, and float32 for ONNX
    # Runtime's. moeship's kernels read 16 rows at a time, and every number of rows here is a multiple of 16. The first
    # matrices of the last layer's experts have 5 bits with moeship's kernels.
    planned = plan(tiny_checkpoint, precision="int4", kernels=kernels)
    expert = planned.roles["expert"]
    assert expert.num_weights == 3 * 5 * 2 * 448 * 192
    assert expert.codes_bytes == 5 * 448 * 192 * (5 * 4 + last_bits) // 8
    assert expert.scales_bytes == expert.num_weights // block * scale_bytes
    assert expert.bytes_per_token == (expert.codes_bytes + expert.scales_bytes) * 2 // 5
    embedding, head = planned.roles["embedding"], planned.roles["head"]
    assert (embedding.codes_bytes, embedding.scales_bytes) == (352 * 192, 352 * 192 // 64 * scale_bytes)
    assert embedding.bytes_per_token == 192 + 192 // 64 * scale_bytes  # one row
    assert head.codes_bytes == 352 * 192 * head_bits // 8
    assert head.bytes_per_token == head.total_bytes == head.codes_bytes + 352 * 192 // block * scale_bytes
    router = planned.roles["router"]
    assert router.bytes_per_token == router.plain_bytes == 3 * 5 * 192 * 4
    # Each layer has the biases of 5 experts, and a token reads those of 2. It reads all biases of out_proj and qkv.
    assert planned.roles["bias"].plain_bytes == 4 * (3 * (5 * (448 + 192) + 192 + 3 * 192) + 352)
    assert planned.roles["bias"].bytes_per_token == 4 * (3 * (2 * (448 + 192) + 192 + 3 * 192) + 352)
    assert planned.kv_bytes_per_token == 3 * 2 * 192 * 4
    assert planned.sequence_bytes == 640 * planned.kv_bytes_per_token


def test_a_cuda_engine_keeps_half_the_bytes_of_keys_and_values(tiny_checkpoint):
    assert plan(tiny_checkpoint, provider="cuda").kv_bytes_per_token == 3 * 2 * 192 * 2


def test_sequences_and_tokens_fit_beside_the_weights(tiny_checkpoint):
    planned = plan(tiny_checkpoint)
    data = planned.resident_bytes
    memory = data + 3 * planned.sequence_bytes
    assert [planned.sequences_in(memory + extra) for extra in (-1, 0, planned.sequence_bytes - 1)] == [2, 3, 3]
    assert planned.tokens_in(data + 7 * planned.kv_bytes_per_token) == 7
    assert planned.sequences_in(data - 1) < 0
    assert planned.tokens_in(data - 1) < 0


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    sizes = {"hidden_size": 1024, "num_heads": 16, "ffn_size": 4096, "num_layers": 3, "rotary_dim": 32}
    folder = tmp_path_factory.mktemp("large") / "checkpoint"
    return write_phixtral_checkpoint(folder, seed=1, num_experts=4, experts_per_token=2, dtype="float16", **sizes)


@pytest.mark.parametrize(
    "flags",
    [
        ["--precision", "int4", "--method", "search"],
        ["--precision", "int8", "--method", "search"],
        ["--precision", "fp32"],
        ["--kernels", "onnxruntime", "--method", "search"],
    ],
    ids=" ".join,
)
def test_the_planned_peak_memory_is_within_15_percent_of_a_builds(tmp_path, large, flags):
    command = [sys.executable, "-m", "cli.main"]
    words = [*command, "plan", large, *flags, "--json"]
    planned = json.loads(subprocess.run(words, capture_output=True, text=True, check=True).stdout)["conversion_bytes"]
    words = [*command, "build", "--checkpoint", large, *flags, "--output", tmp_path / "engine"]
    found = watch([str(word) for word in words])["peak_bytes"]
    assert abs(planned - found) <= 0.15 * found


def test_a_shorter_context_leaves_the_later_positions_out_of_the_rotary_tables(tiny_checkpoint):
    whole, short = plan(tiny_checkpoint), plan(tiny_checkpoint, max_sequence=40)
    tables = (640 - 40) * 16 // 2 * 2 * 4  # cosines and sines of half the 16 rotary dimensions
    assert whole.files["model.onnx"] - short.files["model.onnx"] == pytest.approx(tables, abs=16)
