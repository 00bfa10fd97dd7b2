"""The peer's model: its shape, the file that is written, and what a token reads of it and of an engine."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import onnx
import pytest

from decode import published
from decode.engine_bytes import EngineBytes, count_bytes
from decode.entrants import gguf_path, prepare
from decode.gguf_model import read_contents, write_model
from decode.shape import ARCHITECTURES, Weights, count_weights, llama_model, mixtral_of_equal_weights, tensors
from export.errors import CheckpointError, ConfigError, OutputError
from synthetic_checkpoint import GPT_OSS, GRANITE, MODELS, OLMOE, PHIXTRAL, QWEN3, shortened
from trt_build.ort.planning.plan import plan_engine
from trt_build.ort.planning.prepare import EngineOptions, prepare_build

KINDS = gguf.GGMLQuantizationType
# Unequal sizes, so that no swapped axis fits.
SMALL = replace(
    PHIXTRAL, family="mixtral", hidden_size=256, num_layers=2, num_heads=4, num_kv_heads=2, head_size=64, rotary_dim=64,
    ffn_size=512, vocab_size=320, num_experts=3, max_positions=128,
)  # fmt: skip


def types_of(model):
    """Q4_0, the head at 8 bits, norms and router plain."""
    kinds = {tensor.name: KINDS.F32 if tensor.is_plain else KINDS.Q4_0 for tensor in tensors(model)}
    return {**kinds, "output.weight": KINDS.Q8_0}


def pack(rows, kind):
    return gguf.quantize(rows, kind).view(np.uint8)


@pytest.fixture(scope="module")
def small_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("gguf") / "small.gguf"
    write_model(path, SMALL, types_of(SMALL), pack, file_type=2)
    return path


def test_the_peer_of_phixtral_has_its_sizes_and_experts_of_two_thirds_the_width():
    peer = mixtral_of_equal_weights(PHIXTRAL)
    assert peer == replace(PHIXTRAL, family="mixtral", ffn_size=6912, rotary_dim=80)  # 2/3 of 10240 is 6826.7
    # By hand: a layer has attention 4*2560*2560, router 4*2560, experts 4*2*2560*10240 or 4*3*2560*6912, half of them
    # active; 32 layers; embedding and head 51200*2560 each. The head is active, the embedding is not.
    assert count_weights(PHIXTRAL) == Weights(total=7_812_218_880, active=4_325_703_680)
    assert count_weights(peer) == Weights(total=7_896_104_960, active=4_367_646_720)


def test_a_mixtral_keeps_its_own_width():
    assert mixtral_of_equal_weights(SMALL) == SMALL


def test_shapes_that_have_no_peer_are_refused():
    with pytest.raises(ConfigError, match="after a phi: expected a mixture of the families phixtral, mixtral"):
        mixtral_of_equal_weights(replace(PHIXTRAL, family="phi"))
    with pytest.raises(ConfigError, match="hidden size 192: its K-quants need rows of a multiple of 256"):
        mixtral_of_equal_weights(replace(PHIXTRAL, hidden_size=192))
    with pytest.raises(ConfigError, match="transformers-bf16 runs a Mixtral, found a olmoe; leave it out"):
        prepare("transformers-bf16", None, OLMOE, Path("nowhere"), scaled_layers=1)


def small(facts, **changes):
    """Two layers of a published model, small and of unequal sizes."""
    return replace(
        shortened(facts, 2), hidden_size=256, num_heads=4, num_kv_heads=2, head_size=96, rotary_dim=96, ffn_size=64,
        vocab_size=320, num_experts=3, experts_per_token=2, max_positions=128, **changes,
    )  # fmt: skip


@pytest.mark.parametrize("facts", [QWEN3, OLMOE, GRANITE, GPT_OSS], ids=lambda facts: facts.family)
def test_llama_cpp_runs_the_other_families_in_their_own_shape_and_names(facts):
    assert llama_model(facts) == facts
    [kind] = [kind for kind, name in gguf.MODEL_ARCH_NAMES.items() if name == ARCHITECTURES[facts.family]]
    known = {gguf.TENSOR_NAMES[tensor] for tensor in gguf.MODEL_TENSORS[kind]}
    ours = {tensor.name.rpartition(".")[0].replace("blk.0.", "blk.{bid}.") for tensor in tensors(shortened(facts, 1))}
    assert ours <= known
    # What gguf knows beside: tables of frequencies, joined matrices, and heads that are tied or not.
    spare = {"rope_freqs", "output", "blk.{bid}.attn_qkv", "blk.{bid}.attn_rot_embd", "blk.{bid}.ffn_gate_up_exps"}
    dense = {f"blk.{{bid}}.ffn_{name}{kind}" for name in ("gate", "down", "up") for kind in ("", "_shexp")}
    assert {name for name in known - ours if "rope" not in name} <= spare | dense


def test_the_weights_are_as_many_as_the_models_publish():
    # Model cards: OLMoE 7B with 1B active, Qwen3 30.5B with 3.3B, Granite 3.3B with 0.8B, gpt-oss 21B with 3.6B.
    published = {"olmoe-1b-7b": (6.9, 1.3), "qwen3-30b-a3b": (30.5, 3.3), "granite-3.1-3b-a800m": (3.3, 0.9),
                 "gpt-oss-20b": (20.9, 3.6)}  # fmt: skip
    for name, (total, active) in published.items():
        weights = count_weights(MODELS[name])
        assert weights.total / 1e9 == pytest.approx(total, abs=0.05)
        # Cards count the embedding or the head beside the layers, as some do not: by at most that much.
        assert weights.active / 1e9 == pytest.approx(active, abs=0.4)


def test_a_gpt_oss_has_biases_sinks_windows_and_yarn(tmp_path):
    model = small(GPT_OSS)
    path = tmp_path / "gpt-oss.gguf"
    kinds = {tensor.name: KINDS.F32 if tensor.is_plain else KINDS.Q8_0 for tensor in tensors(model)}
    write_model(path, model, kinds, pack, file_type=7)
    reader = gguf.GGUFReader(path)
    shapes = {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in reader.tensors}
    # Heads of 96: queries 384, keys 192. Experts 3 of width 64.
    expected = {
        "attn_sinks.weight": (4,), "attn_q.bias": (384,), "attn_k.bias": (192,), "attn_v.bias": (192,),
        "attn_output.bias": (256,), "ffn_gate_inp.bias": (3,), "ffn_gate_exps.bias": (3, 64),
        "ffn_up_exps.bias": (3, 64), "ffn_down_exps.bias": (3, 256), "post_attention_norm.weight": (256,),
    }  # fmt: skip
    assert {name: shapes[f"blk.1.{name}"] for name in expected} == expected
    assert "blk.1.ffn_norm.weight" not in shapes
    keys = {name: reader.fields[f"gpt-oss.{name}"].contents() for name in (
        "attention.sliding_window", "rope.scaling.type", "rope.scaling.factor", "rope.scaling.original_context_length",
        "expert_feed_forward_length", "attention.key_length",
    )}  # fmt: skip
    assert list(keys.values()) == [128, "yarn", 32.0, 4096, 64, 96]
    values = {tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type) for tensor in reader.tensors}
    assert 0.1 < np.std(values["blk.0.attn_q.bias"]) < 0.4
    # Of experts and their biases two of three are read.
    layer = 4 * (4 + 384 + 192 + 192 + 256 + 3 + 2 * 256 + 3 * 256) + 34 * 256 * (2 * 384 + 2 * 192) // 32
    experts = 2 * (34 * 3 * 64 * 256 // 32 + 4 * (64 + 64 + 256))
    contents = read_contents(path, model)
    assert contents.bytes_read_per_token == 2 * (layer + experts) + 4 * 256 + 34 * 256 * 321 // 32


def test_a_granite_has_its_factors_and_a_tied_head_is_read_whole(tmp_path):
    model = small(GRANITE)
    path = tmp_path / "granite.gguf"
    kinds = {tensor.name: KINDS.F32 if tensor.is_plain else KINDS.Q8_0 for tensor in tensors(model)}
    write_model(path, model, kinds, pack, file_type=7)
    reader = gguf.GGUFReader(path)
    assert "output.weight" not in {tensor.name for tensor in reader.tensors}
    keys = {name: reader.fields[f"granitemoe.{name}"].contents() for name in (
        "embedding_scale", "residual_scale", "attention.scale", "logit_scale",
    )}  # fmt: skip
    assert list(keys.values()) == pytest.approx([12.0, 0.22, 0.015625, 6.0])
    layer = 4 * (2 * 256 + 3 * 256) + 34 * 256 * (2 * 384 + 2 * 192) // 32 + 2 * 34 * 3 * 64 * 256 // 32
    assert read_contents(path, model).bytes_read_per_token == 2 * layer + 4 * 256 + 34 * 256 * 320 // 32


def test_norms_of_queries_and_keys_are_of_heads_or_of_the_width():
    def norms(facts):
        return [tensor.shape for tensor in tensors(small(facts)) if tensor.name.startswith("blk.0.attn_") and
                tensor.name.endswith(("q_norm.weight", "k_norm.weight"))]  # fmt: skip

    assert norms(QWEN3) == [(96,), (96,)]
    assert norms(OLMOE) == [(384,), (192,)]
    assert norms(GRANITE) == []


def test_some_layers_have_their_share_of_the_vocabulary():
    whole = published.share_of(QWEN3, 48)
    assert whole is QWEN3
    part = published.share_of(QWEN3, 3)
    assert (part.num_layers, part.vocab_size) == (3, 9504)  # 151936 / 16 is 9496, and 9504 the next multiple of 16
    assert published.share_of(OLMOE, 4).vocab_size == 12576  # 50304 / 4, a multiple of 16
    assert published.share_of(GPT_OSS, 3).full_layers == (1,)
    assert published.share_of(OLMOE, 1).vocab_size == 3152
    assert published.share_of(PHIXTRAL, 1).vocab_size == 2048  # the tokenizer's tokens need more than 1600
    with pytest.raises(ConfigError, match="found 49 layers, expected 1 to 48"):
        published.share_of(QWEN3, 49)


def test_the_file_is_read_by_gguf_with_the_names_shapes_and_keys_of_a_mixtral(small_file):
    reader = gguf.GGUFReader(small_file)
    shapes = {tensor.name: tuple(int(size) for size in reversed(tensor.shape)) for tensor in reader.tensors}
    assert len(shapes) == 23
    assert shapes["token_embd.weight"] == shapes["output.weight"] == (320, 256)
    assert shapes["blk.1.attn_k.weight"] == (128, 256)
    assert shapes["blk.1.ffn_gate_inp.weight"] == (3, 256)
    assert shapes["blk.0.ffn_up_exps.weight"] == (3, 512, 256)
    assert shapes["blk.0.ffn_down_exps.weight"] == (3, 256, 512)
    keys = {name: reader.fields[f"llama.{name}"].contents() for name in (
        "block_count", "expert_count", "expert_used_count", "attention.head_count_kv", "rope.dimension_count",
        "vocab_size",
    )}  # fmt: skip
    assert list(keys.values()) == [2, 3, 2, 2, 64, 320]
    assert reader.fields["tokenizer.ggml.model"].contents() == "no_vocab"


def test_matrices_have_the_scale_of_their_width_and_tensors_differ(small_file):
    values = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in gguf.GGUFReader(small_file).tensors}
    assert np.std(values["blk.0.ffn_down_exps.weight"]) == pytest.approx(512**-0.5, rel=0.02)
    assert np.std(values["blk.0.ffn_gate_inp.weight"]) == pytest.approx(256**-0.5, rel=0.1)
    assert np.std(values["token_embd.weight"]) == pytest.approx(1, rel=0.02)
    assert (values["blk.1.ffn_norm.weight"] == 1).all()
    first, second = values["blk.0.ffn_up_exps.weight"], values["blk.1.ffn_up_exps.weight"]
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(first[0].ravel(), first[1].ravel())[0, 1]) < 0.02


def test_a_files_bytes_are_those_worked_by_hand(small_file):
    contents = read_contents(small_file, SMALL)
    # Q4_0 has 18 bytes for 32 weights, Q8_0 34. A layer: attention 256*256*2 + 128*256*2 and experts 3*3*512*256, in
    # Q4_0; router 3*256 and norms 2*256, in float32. Embedding in Q4_0, head in Q8_0: 320*256 each; a norm of 256.
    assert contents.bytes_of_type == {"Q4_0": 1_594_368, "F32": 11_264, "Q8_0": 87_040}
    assert contents.tensors_of_type == {"Q4_0": 15, "F32": 7, "Q8_0": 1}
    assert contents.weight_bytes == 1_692_672
    # A token reads two of three experts and one row of the embedding.
    assert contents.bytes_read_per_token == 2 * (110_592 + 442_368 + 5_120) + 144 + 1_024 + 87_040


def test_a_file_of_another_model_is_refused(small_file):
    with pytest.raises(CheckpointError, match=r"6 tensors are not those .* blk.0.ffn_down_exps.weight: found \(3, 256"):
        read_contents(small_file, replace(SMALL, ffn_size=768))


def test_a_row_that_is_no_whole_block_and_a_disk_too_small_leave_nothing(tmp_path):
    odd = replace(SMALL, ffn_size=40)
    with pytest.raises(CheckpointError, match=r"blk.0.ffn_down_exps.weight: rows of 40, Q4_0 needs a multiple of 32"):
        write_model(tmp_path / "odd.gguf", odd, types_of(odd), pack, file_type=2)
    endless = replace(SMALL, vocab_size=1 << 24, hidden_size=1 << 22)
    with pytest.raises(OutputError, match="GB free; make room"):
        write_model(tmp_path / "endless.gguf", endless, types_of(endless), pack, file_type=2)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_writing_leaves_no_file(tmp_path):
    def fail(rows, kind):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_model(tmp_path / "small.gguf", SMALL, types_of(SMALL), fail, file_type=2)
    assert list(tmp_path.iterdir()) == []


def test_every_size_of_the_model_is_in_a_files_name(tmp_path):
    others = [replace(SMALL, **{name: getattr(SMALL, name) * 2}) for name in (
        "hidden_size", "num_layers", "num_heads", "num_kv_heads", "head_size", "ffn_size", "vocab_size", "num_experts",
        "experts_per_token",
    )]  # fmt: skip
    assert len({gguf_path(tmp_path, model, "q4_0") for model in [SMALL, *others]}) == 10


def constant(name, kind, *dims):
    return onnx.TensorProto(name=name, data_type=kind, dims=dims)


def test_an_engines_bytes_are_those_worked_by_hand(tmp_path):
    kinds = onnx.TensorProto
    make = onnx.helper.make_node
    nodes = [
        make("GatherBlockQuantized", ["embedding", "input_ids", "embedding_scales"], ["a"], domain="com.microsoft"),
        make("Gather", ["tied", "input_ids"], ["b"]),
        make("Embedding", ["input_ids", "groups", "group_scales"], ["g"], domain="moeship"),
        make("LayerNormalization", ["a", "norm"], ["c"]),
        make("GroupQueryAttention", ["c", "", "", "", "", "", "", "cosines"], ["d"], domain="com.microsoft"),
        make("QMoE", ["d", "routed", "codes", "scales", "", "packed"], ["e"], domain="com.microsoft"),
        make("MatMul", ["e", "tied"], ["logits"]),
    ]
    constants = [
        constant("embedding", kinds.UINT8, 10, 8), constant("embedding_scales", kinds.FLOAT, 10, 1),
        constant("tied", kinds.FLOAT, 10, 4), constant("norm", kinds.FLOAT, 8),
        constant("cosines", kinds.FLOAT, 2048, 16), constant("codes", kinds.UINT8, 4, 6, 8),
        constant("scales", kinds.FLOAT16, 4, 6, 1), constant("packed", kinds.UINT4, 4, 3, 5),
        constant("groups", kinds.UINT8, 3, 2, 192), constant("group_scales", kinds.FLOAT16, 3, 2, 16),
        constant("unused", kinds.FLOAT, 100),
    ]  # fmt: skip
    caches = [
        onnx.helper.make_tensor_value_info(f"past_key_values.0.{kind}", kinds.FLOAT16, ["B", 2, "C", 16])
        for kind in ("key", "value")
    ]
    model = onnx.helper.make_model(onnx.helper.make_graph(nodes, "g", caches, [], constants))
    (tmp_path / "model.onnx").write_bytes(model.SerializeToString())
    # Rows: embedding 8 and its scale 4, cosines 64, of three groups of 16 rows 1152 / 48 codes and 192 / 48 of scales.
    # Halves: codes 96, scales 24, packed 15. Whole: norm 32, and what embedding and head share, 160.
    assert count_bytes(tmp_path / "model.onnx", num_experts=4, experts_per_token=2) == EngineBytes(
        weight_bytes=80 + 40 + 160 + 32 + 131_072 + 192 + 48 + 30 + 1_152 + 192 + 400,
        read_per_token=403 + 24 + 4,
        cache_per_position=128,
    )


@pytest.mark.parametrize("precision", ["int4", "fp32"])
def test_an_engines_bytes_are_those_that_its_plan_foretold(precision, tiny_checkpoint, tiny_engines, tmp_path):
    entrant = prepare("ours", tiny_engines(precision), PHIXTRAL, tmp_path, scaled_layers=1)
    plan = plan_engine(prepare_build(EngineOptions(checkpoint=str(tiny_checkpoint), precision=precision)))
    # The rotary tables and a dozen numbers of the graph's shape are constants too, and no weights.
    tables = 2 * 640 * 8 * 4
    assert entrant.weight_bytes == pytest.approx(plan.weights_bytes + tables, abs=200)
    assert entrant.read_per_token == pytest.approx(plan.weights_bytes_per_token, abs=300)
    assert entrant.cache_per_position == plan.kv_bytes_per_token


def test_contenders_that_cannot_run_say_why(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match="'vllm' is unknown. There are: ours, llama-q4_0"):
        prepare("vllm", None, PHIXTRAL, tmp_path, scaled_layers=1)
    with pytest.raises(ConfigError, match="'ours' needs an engine; name one with --engine"):
        prepare("ours", None, PHIXTRAL, tmp_path, scaled_layers=1)
    monkeypatch.setattr("decode.machine.memory", lambda key: 2_000_000_000)
    with pytest.raises(ConfigError, match=r"even 8 layers take 8.7 GB, 0.5 GB are free; ask for fewer --scaled-layers"):
        prepare("transformers-fp32", None, PHIXTRAL, tmp_path, scaled_layers=8)


def test_a_model_that_memory_does_not_hold_is_measured_with_fewer_layers_and_scaled(tmp_path, monkeypatch):
    monkeypatch.setattr("decode.machine.memory", lambda key: 20_000_000_000)
    entrant = prepare("transformers-fp32", None, PHIXTRAL, tmp_path, scaled_layers=8)
    assert entrant.model.num_layers == 8
    assert entrant.notes["scaled"].startswith("32 layers take 31.6 GB, 18.5 GB are free: measured with 8 layers")
    # By hand: a layer has 132_392_960 active weights, the head 131_072_000.
    assert entrant.decode_scale == pytest.approx((8 * 132_392_960 + 131_072_000) / 4_367_646_720)
    assert entrant.prefill_scale == pytest.approx(1 / 4)
    assert entrant.read_per_token == 4 * 4_367_646_720
    monkeypatch.setattr("decode.machine.memory", lambda key: 40_000_000_000)
    whole = prepare("transformers-fp32", None, PHIXTRAL, tmp_path, scaled_layers=8)
    assert (whole.model.num_layers, whole.decode_scale, dict(whole.notes)) == (32, 1.0, {})
