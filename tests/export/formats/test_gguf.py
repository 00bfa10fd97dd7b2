"""GGUF files of llama.cpp's own converter and quantiser as checkpoints, and files that are refused."""

from __future__ import annotations

import math
import shutil
import struct
from pathlib import Path

import gguf
import gguf.quants
import numpy as np
import pytest
from checkpoints import write_phi_checkpoint, write_tokenizer
from gguf_files import write_file
from mixtral_checkpoints import write_llama_tokenizer, write_mixtral_checkpoint

from export.checkpoint.folder import open_checkpoint
from export.errors import CheckpointError, ConfigError, MoeshipError
from export.families import read_model
from export.formats.gguf_file import read_gguf
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.questions.stored_weights import open_stored_weights

GOLDEN = Path(__file__).parent / "golden"
# The checkpoints that ci/packers/gguf_model.py converted.
ORIGINALS = {
    "mixtral": lambda folder: write_mixtral_checkpoint(
        folder, seed=7, spelling="published", hidden_size=64, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=16,
        ffn_size=96, num_experts=2, vocab_size=371,
    ),
    "phi": lambda folder: write_phi_checkpoint(
        folder, seed=7, hidden_size=64, num_layers=1, num_heads=2, ffn_size=256, rotary_dim=16
    ),
}  # fmt: skip
# Relative error of each type: at most that of its rounding, and far below that of rows in another order.
ERRORS = {"F16": 3e-4, "Q8_0": 8e-3, "Q4_0": 0.11}


def relative_errors(found, expected):
    for name in expected.table:
        wanted = expected.load(name)
        yield np.linalg.norm(found.load(name) - wanted) / np.linalg.norm(wanted)


@pytest.mark.parametrize("family", ORIGINALS)
@pytest.mark.parametrize("kind", ERRORS)
def test_a_converted_model_is_the_original(tmp_path, family, kind):
    original = read_model(open_checkpoint(ORIGINALS[family](tmp_path / "original")))
    found = read_model(open_checkpoint(GOLDEN / f"{family}-{kind}.gguf"))
    assert found.family.name == original.family.name
    for field in ("hidden_size", "num_heads", "num_kv_heads", "head_size", "ffn_size", "rotary_dim", "rope_base",
                  "norm_epsilon", "num_experts", "experts_per_token", "max_positions", "vocab_size"):  # fmt: skip
        assert getattr(found.architecture, field) == getattr(original.architecture, field)
    errors = list(relative_errors(found.weights, original.weights))
    assert max(errors) < ERRORS[kind]


@pytest.mark.parametrize("family", ORIGINALS)
def test_codes_of_blocks_with_a_float16_scale_are_kept(tmp_path, family):
    for kind, precision in (("Q4_0", "int4"), ("Q8_0", "int8")):
        folder = tmp_path / kind
        folder.mkdir()
        path = shutil.copy(GOLDEN / f"{family}-{kind}.gguf", folder / "model.gguf")
        write_llama_tokenizer(folder) if family == "mixtral" else write_tokenizer(folder)
        engine = build_engine(
            BuildOptions(checkpoint=str(path), output=folder / "engine", precision=precision, kernels="onnxruntime")
        )
        model = read_model(open_checkpoint(path))
        stored = open_stored_weights(engine, model)
        for name, spec in model.weights.table.items():
            if model.weights.grid(name) is not None:
                assert (stored.load(name) == model.weights.load(name)).all()
                assert engine.manifest.packed[str(spec.role)].codes_kept
        assert set(engine.manifest.source.digests) == {"model.gguf"}


def test_a_gguf_without_a_tokenizer_asks_for_the_original_files(tmp_path):
    path = shutil.copy(GOLDEN / "phi-Q4_0.gguf", tmp_path / "model.gguf")
    with pytest.raises(ConfigError, match=r"reading the tokenizer of .*; put the original model's tokenizer.json"):
        build_engine(BuildOptions(checkpoint=str(path), output=tmp_path / "engine"))
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"pass a GGUF file itself as the checkpoint: model.gguf"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize("kind", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_each_type_is_dequantised_as_the_package_does(tmp_path, kind):
    values = np.random.default_rng(1).standard_normal((8, 64)).astype(np.float32)
    number = gguf.GGMLQuantizationType[kind]
    packed = gguf.quants.quantize(values, number)
    path = tmp_path / "m.gguf"
    write_file(path)
    writer = gguf.GGUFWriter(str(path), "llama")
    for key in ("context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count"):
        writer.add_uint32(f"llama.{key}", 64)
    writer.add_float32("llama.attention.layer_norm_rms_epsilon", 1e-5)
    writer.add_tensor("token_embd.weight", packed, raw_dtype=number)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    checkpoint = open_checkpoint(path)
    found = checkpoint.read_float32("model.embed_tokens.weight")
    assert (found == gguf.quants.dequantize(packed, number)).all()
    assert (checkpoint.read_float32("model.embed_tokens.weight", slice(3, 5)) == found[3:5]).all()
    assert checkpoint.packed["model.embed_tokens.weight"].label == f"gguf {kind}"


def test_a_written_file_is_read(tmp_path):
    model = read_model(open_checkpoint(write_file(tmp_path / "m.gguf")))
    assert model.family.name == "llama"
    assert model.architecture.tied_head


def test_experts_may_be_stored_one_by_one(tmp_path):
    """As llama.cpp's converter did before experts were stacked."""
    single = {f"blk.0.ffn_{kind}.{expert}.weight": (32, 32) for kind in ("gate", "up", "down") for expert in range(2)}
    facts = {"expert_count": 2, "expert_used_count": 1, "without": ("blk.0.ffn_gate.w", "blk.0.ffn_up.w",
             "blk.0.ffn_down.w")}  # fmt: skip
    path = write_file(tmp_path / "m.gguf", tensors={"blk.0.ffn_gate_inp.weight": (2, 32), **single}, **facts)
    weights = read_model(open_checkpoint(path)).weights
    tensors = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    both = weights.load("model.layers.0.mlp.experts.gate_up.weight")
    for expert in range(2):
        assert (both[expert, 0::2] == tensors[f"blk.0.ffn_gate.{expert}.weight"]).all()
        assert (both[expert, 1::2] == tensors[f"blk.0.ffn_up.{expert}.weight"]).all()
    down = weights.load("model.layers.0.mlp.experts.down.weight")
    assert (down[1] == tensors["blk.0.ffn_down.1.weight"]).all()


@pytest.mark.parametrize("fused", [True, False])
def test_phi2_has_its_query_key_and_value_in_one_tensor_or_in_three(tmp_path, fused):
    shapes = {"attn_qkv": (96, 32)} if fused else dict.fromkeys(("attn_q", "attn_k", "attn_v"), (32, 32))
    layer = {**shapes, "attn_output": (32, 32), "ffn_up": (128, 32), "ffn_down": (32, 128)}
    tensors = {f"blk.0.{name}.weight": shape for name, shape in layer.items()}
    tensors |= {f"blk.0.{name}.bias": shape[:1] for name, shape in layer.items()}
    tensors |= dict.fromkeys(("blk.0.attn_norm.weight", "blk.0.attn_norm.bias", "output_norm.bias"), (32,))
    tensors |= {"output.weight": (40, 32), "output.bias": (40,)}
    single = ("blk.0.attn_q.", "blk.0.attn_k.", "blk.0.attn_v.")
    path = write_file(
        tmp_path / "m.gguf", tensors=tensors, architecture="phi2", feed_forward_length=128,
        without=("blk.0.ffn_gate", "blk.0.ffn_norm", *(single if fused else ())),
        **{"attention.layer_norm_rms_epsilon": None, "attention.layer_norm_epsilon": 1e-5, "rope.dimension_count": 16},
    )  # fmt: skip
    model = read_model(open_checkpoint(path))
    assert model.architecture.rotary_dim == 16
    stored = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    names = ["attn_qkv"] if fused else ["attn_q", "attn_k", "attn_v"]
    for kind in ("weight", "bias"):
        wanted = np.concatenate([stored[f"blk.0.{name}.{kind}"] for name in names])
        assert (model.weights.load(f"transformer.h.0.mixer.Wqkv.{kind}") == wanted).all()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"architecture": "qwen2"}, "its architecture is 'qwen2', moeship reads GGUF files of phi2 and llama"),
        ({"embedding_length": None}, "its metadata lack llama.embedding_length"),
        ({"attention.head_count": "two"}, "llama.attention.head_count is 'two', expected a whole number"),
        ({"vocab_size": 41}, "llama.vocab_size says 41 tokens, the embedding has 40 rows; the file contradicts itself"),
        ({"tokenizer.ggml.tokens": ["a", "b"]}, "tokenizer.ggml.tokens says 2 tokens, the embedding has 40 rows"),
        ({"rope.other": 3}, "llama.rope.other is 3, which moeship does not support in a GGUF file"),
        ({"attention.value_length": 8}, "the lengths of keys, values and rotary embedding differ, expected 16"),
        ({"split.count": 3}, "it is one of 3 files; join them with llama-gguf-split --merge"),
        ({"block_count": 2}, "model.layers.1.input_layernorm.weight is missing"),
        ({"feed_forward_length": 48}, "found [32, 32], config.json says [48, 32]"),
        ({"expert_count": 4, "expert_used_count": 2, "tensors": {"blk.0.ffn_up_exps.weight": (3, 32, 32)}},
         "blk.0.ffn_up_exps.weight stacks 3 experts, llama.expert_count says 4; the file contradicts itself"),
        ({"tensors": {"rope_factors.weight": (8,)}}, "rope_factors.weight: moeship does not know what is computed"),
        ({"tensors": {"blk.0.attn_q.weight": (33, 32)}}, "blk.0.attn_q.weight has 33 rows, no even number"),
    ],
)  # fmt: skip
def test_metadata_that_contradict_the_tensors_are_refused(tmp_path, changes, said):
    path = write_file(tmp_path / "m.gguf", **changes)
    with pytest.raises(MoeshipError) as caught:
        read_model(open_checkpoint(path))
    assert said in str(caught.value)


def edited(path, place, data):
    content = bytearray(path.read_bytes())
    content[place : place + len(data)] = data
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("place", "data", "said"),
    [
        (0, b"GGML", "it does not begin with GGUF"),
        (4, struct.pack("<I", 9), "it has version 9 of GGUF, moeship reads 2 and 3"),
        (8, struct.pack("<Q", 1 << 60), f"says that it has {1 << 60} tensors, more than a file of"),
        (16, struct.pack("<Q", 60_000), "says that it has 60000 metadata entries, more than a file of"),
        (24, struct.pack("<Q", 1 << 62), f"has a text of {1 << 62} bytes"),
        (24, struct.pack("<Q", 1 << 22), "its header needs 4194304 bytes at byte 32"),
    ],
)
def test_hostile_headers_are_refused(tmp_path, place, data, said):
    path = write_file(tmp_path / "m.gguf")
    edited(path, place, data)
    with pytest.raises(CheckpointError, match=r"opening .*m\.gguf") as caught:
        open_checkpoint(path)
    assert said in str(caught.value)


def place_of(path, name):
    """The byte behind a tensor's name in the header: its number of dimensions."""
    content = path.read_bytes()
    return content.rindex(name.encode()) + len(name)


@pytest.mark.parametrize(
    ("offset", "data", "said"),
    [
        (0, struct.pack("<I", 77), "has 77 dimensions, expected 1 to 4"),
        (4, struct.pack("<Q", 1 << 50), "which no tensor has"),
        (4, struct.pack("<Q", 1 << 33), "ends at byte"),
        (4, struct.pack("<Q", 0), "which no tensor has"),
        (20, struct.pack("<I", 999), "has the type 999, which the package gguf does not know"),
        (20, struct.pack("<I", 28), "has the type F64, which the package gguf does not dequantise; convert the model"),
        (20, struct.pack("<I", 24), "has the type I8, which the package gguf does not dequantise"),
        (20, struct.pack("<I", 9), "has the type Q8_1, which the package gguf does not dequantise"),
        (24, struct.pack("<Q", 1 << 50), "ends at byte"),
        (24, struct.pack("<Q", 8), "is at byte"),
        (24, struct.pack("<Q", 32), "overlap"),
    ],
)
def test_hostile_tensors_are_refused(tmp_path, offset, data, said):
    path = write_file(tmp_path / "m.gguf")
    edited(path, place_of(path, "blk.0.attn_q.weight") + offset, data)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    assert said in str(caught.value)


def test_every_cut_is_refused(tmp_path):
    path = write_file(tmp_path / "m.gguf")
    whole = path.read_bytes()
    header = read_gguf(path).data_offset
    cuts = [*range(1, header, 7), header + 1, len(whole) - 1 - len(whole) % 32]
    last = max(tensor.offset + tensor.num_bytes for tensor in read_gguf(path).tensors)
    for cut in {min(cut, last - 1) for cut in cuts}:
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError):
            open_checkpoint(path)


def test_any_damage_of_a_header_is_read_or_refused(tmp_path):
    path = write_file(tmp_path / "m.gguf")
    whole, header = path.read_bytes(), read_gguf(path).data_offset
    rng, refused = np.random.default_rng(3), 0
    for _ in range(600):
        content = bytearray(whole)
        for place in rng.integers(0, header, rng.integers(1, 4)).tolist():
            content[place] = int(rng.choice([0, 1, 2, 8, 32, 127, 128, 255, int(rng.integers(256))]))
        path.write_bytes(content)
        try:
            read_model(open_checkpoint(path))
        except MoeshipError:
            refused += 1
    assert refused > 300


def test_the_parser_agrees_with_the_package():
    for path in GOLDEN.glob("*.gguf"):
        ours, theirs = read_gguf(path), gguf.GGUFReader(path)
        assert ours.data_offset == theirs.data_offset
        found = {one.name: (one.shape, one.kind, one.offset, one.num_bytes) for one in ours.tensors}
        assert found == {
            one.name: (tuple(reversed(one.shape.tolist())), int(one.tensor_type), one.data_offset, one.n_bytes)
            for one in theirs.tensors
        }
        assert sum(math.prod(tensor.shape) for tensor in ours.tensors) > 10_000
