"""Mixtral engines against transformers' MixtralForCausalLM: equal where they must be, caught where made wrong."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from cuda_kernels import check_types
from decoding import KINDS, QUANTISED, each, genai_greedy, greedy, kinds_here, load_genai
from mixtral_checkpoints import SPELLINGS, write_llama_tokenizer, write_mixtral_checkpoint
from safetensors.numpy import load_file, save_file
from torch_reference import ByTransformers, load_reference
from transformers import MixtralConfig, MixtralForCausalLM

from cli.main import main
from export.checkpoint.folder import open_checkpoint
from export.errors import ExportError
from export.families import read_model
from export.tokenizer.loading import load_tokenizer
from trt_build.comparison import parity
from trt_build.ort import verify
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.engine import open_engine
from trt_build.ort.session import Session

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-mixtral" / "checkpoint"
TOKENS = np.random.default_rng(3).integers(0, 365, 300).tolist()
FP32 = parity.THRESHOLDS["fp32"]
TEXT = (EXAMPLE.parent / "train.py").read_text()


def quiet(_text: str) -> None:
    pass


def outside(checkpoint):
    """transformers' own reading of a checkpoint; its grouped kernels do not take odd widths."""
    return MixtralForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()


def build(checkpoint, output, precision="fp32", kernels="onnxruntime", **options):
    return build_engine(
        BuildOptions(checkpoint=str(checkpoint), output=output, precision=precision, kernels=kernels, **options)
    )


def edited(source, folder, edit):
    """A copy of a checkpoint in the published spelling whose tensors and config went through `edit`."""
    shutil.copytree(source, folder)
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    edit(tensors, config)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """Five experts, top-2, odd widths; attention looks back on 40 positions, which is less than the tests' texts."""
    folder = tmp_path_factory.mktemp("mixtral") / "checkpoint"
    return write_mixtral_checkpoint(folder, seed=7, config={"sliding_window": 40})


@pytest.fixture(scope="module")
def engine(tmp_path_factory, checkpoint):
    return build(checkpoint, tmp_path_factory.mktemp("engine") / "fp32")


@pytest.fixture(scope="module")
def example_engines(tmp_path_factory):
    folder = tmp_path_factory.mktemp("example")
    built = {kind: build(EXAMPLE, folder / "-".join(kind), *kind) for kind in KINDS}
    return {"fp32": built[KINDS[0]], "int8": built[KINDS[1]], "int4": built[KINDS[2]], **built}


@pytest.mark.parametrize("packed", [False, True])
def test_what_transformers_saves_in_either_spelling_gives_its_logits(tmp_path, packed):
    config = MixtralConfig(
        vocab_size=371, hidden_size=96, intermediate_size=72, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, num_local_experts=4, num_experts_per_tok=2, max_position_embeddings=400,
        initializer_range=0.15, rope_parameters={"rope_type": "default", "rope_theta": 20000.0},
    )  # fmt: skip
    torch.manual_seed(5)
    model = MixtralForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "saved", save_original_format=not packed)
    write_llama_tokenizer(tmp_path / "saved")
    names = load_file(tmp_path / "saved" / "model.safetensors")
    assert ("model.layers.1.mlp.experts.gate_up_proj" in names) is packed
    assert ("model.layers.1.block_sparse_moe.experts.3.w2.weight" in names) is not packed

    report = verify.compare(build(tmp_path / "saved", tmp_path / "engine"), ByTransformers(model), [TOKENS], quiet)

    assert (report.num_tokens, report.num_decoded_tokens) == (300, 150)
    assert report.failures(FP32) == []


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(
    "sizes",
    [
        {"num_experts": 3, "experts_per_token": 1, "ffn_size": 37},
        {"num_experts": 5, "experts_per_token": 3, "num_kv_heads": 1},
        {"num_experts": 1, "experts_per_token": 1, "num_layers": 1},
        {"num_experts": 8, "experts_per_token": 8, "hidden_size": 53, "head_dim": 32},
        {"num_heads": 5, "num_kv_heads": 5, "head_dim": None, "tied": True},
        {"dtype": "float16", "num_layers": 3},
        {"dtype": "bfloat16", "num_experts": 7},
    ],
    ids=lambda sizes: " ".join(f"{key}={value}" for key, value in sizes.items()),
)
def test_fp32_engine_equals_transformers_at_odd_sizes(tmp_path, sizes, spelling):
    folder = write_mixtral_checkpoint(tmp_path / "checkpoint", seed=2, spelling=spelling, **sizes)
    report = verify.compare(build(folder, tmp_path / "engine"), ByTransformers(outside(folder)), [TOKENS[:120]], quiet)
    assert report.failures(FP32) == []


def test_the_reference_is_transformers_own_model_of_the_checkpoint(checkpoint):
    with torch.no_grad():
        ids = torch.tensor([TOKENS])
        found = load_reference(read_model(open_checkpoint(checkpoint)))(ids).logits
        assert (found - outside(checkpoint)(ids).logits).abs().max() <= 1e-5


def test_a_window_shorter_than_the_text_is_honoured_in_prefill_and_decoding(checkpoint, engine, tmp_path):
    report = verify.compare(engine, ByTransformers(outside(checkpoint)), [TOKENS], quiet)
    assert (report.num_tokens, report.num_decoded_tokens) == (300, 150)
    assert report.failures(FP32) == []
    wide = edited(checkpoint, tmp_path / "wide", lambda tensors, config: config.update(sliding_window=None))
    assert verify.compare(engine, ByTransformers(outside(wide)), [TOKENS[:40]], quiet).failures(FP32) == []
    assert verify.compare(engine, ByTransformers(outside(wide)), [TOKENS[:42]], quiet).failures(FP32)


def swap_gate_and_up(tensors, config):
    for name in [name for name in tensors if name.endswith("w1.weight")]:
        other = name.replace("w1", "w3")
        tensors[name], tensors[other] = tensors[other].copy(), tensors[name].copy()


def swap_two_experts(tensors, config):
    for matrix in ("w1", "w2", "w3"):
        first, second = (f"model.layers.1.block_sparse_moe.experts.{e}.{matrix}.weight" for e in (0, 3))
        tensors[first], tensors[second] = tensors[second].copy(), tensors[first].copy()


def turn_by_another_base(tensors, config):
    config["rope_theta"] = 10000.0


def route_to_one_expert_less(tensors, config):
    config["num_experts_per_tok"] -= 1


def ignore_the_window(tensors, config):
    config["sliding_window"] = None


def widen_the_window_by_one(tensors, config):
    config["sliding_window"] += 1


def scale_a_norm(tensors, config):
    tensors["model.layers.0.post_attention_layernorm.weight"] *= 1.01


@pytest.mark.parametrize(
    "fault",
    [
        swap_gate_and_up, swap_two_experts, turn_by_another_base, route_to_one_expert_less, ignore_the_window,
        widen_the_window_by_one, scale_a_norm,
    ],
)  # fmt: skip
def test_a_seeded_fault_in_the_reference_is_caught(tmp_path, checkpoint, engine, fault):
    faulty = outside(edited(checkpoint, tmp_path / "faulty", fault))
    report = verify.compare(engine, ByTransformers(faulty), [TOKENS[:128]], quiet)
    assert report.max_logit_difference > 1e-2
    assert report.failures(FP32)


@pytest.mark.parametrize("fault", [swap_gate_and_up, swap_two_experts, turn_by_another_base])
def test_a_seeded_fault_in_the_engine_is_caught_at_every_precision(tmp_path, fault):
    wrong, reference = edited(EXAMPLE, tmp_path / "wrong", fault_of_example(fault)), outside(EXAMPLE)
    window = load_tokenizer(EXAMPLE).encode_prompt(TEXT)[:384]
    for precision, kernels in kinds_here():
        engine = build(wrong, tmp_path / f"{precision}-{kernels}", precision, kernels)
        report = verify.compare(engine, ByTransformers(reference), [window], quiet)
        assert report.failures(parity.THRESHOLDS[precision])


def fault_of_example(fault):
    """The example's config is transformers 5's, which nests the rotary base."""

    def edit(tensors, config):
        fault(tensors, config)
        if "rope_theta" in config:
            config["rope_parameters"]["rope_theta"] = config.pop("rope_theta")

    return edit


@pytest.mark.parametrize(("precision", "kernels"), each(KINDS, apart=True))
def test_a_trained_mixtral_keeps_parity_at_every_precision(example_engines, precision, kernels):
    ids = load_tokenizer(EXAMPLE).encode_prompt(TEXT)
    windows = list(parity.split_windows(ids, 512, 2048))
    report = verify.compare(example_engines[precision, kernels], ByTransformers(outside(EXAMPLE)), windows, quiet)
    assert report.num_tokens > 1500
    assert report.reference_perplexity < 120  # of 1024 tokens: it did learn
    assert report.failures(parity.THRESHOLDS[precision]) == []


@pytest.mark.parametrize(("precision", "kernels"), each(KINDS, apart=True))
def test_equal_router_logits_go_to_the_lowest_expert_index(tmp_path, precision, kernels):
    def tie_every_gate(tensors, config):
        for name in tensors:
            if name.endswith("gate.weight"):
                tensors[name][:] = tensors[name][0]

    def keep_the_first_two(tensors, config):
        for name in [name for name in tensors if ".experts." in name and int(name.split(".")[5]) > 1]:
            del tensors[name]
        for name in tensors:
            if name.endswith("gate.weight"):
                tensors[name] = np.tile(tensors[name][:1], (2, 1))
        config["num_local_experts"] = 2

    sizes = {"hidden_size": 96, "ffn_size": 64, "head_dim": 32}
    source = write_mixtral_checkpoint(tmp_path / "source", seed=1, **sizes)
    checkpoint = edited(source, tmp_path / "tied", tie_every_gate)
    tied = build(checkpoint, tmp_path / "a", precision, kernels, keep_all_experts=True)
    two = build(edited(source, tmp_path / "two", keep_the_first_two), tmp_path / "b", precision, kernels)

    logits = [session.run(session.new_cache(), TOKENS[:50]).copy() for session in (Session(tied), Session(two))]

    np.testing.assert_allclose(*logits, atol=1e-5)
    if precision == "fp32":
        # The reference of the tied model itself would choose as torch.topk does, which promises nothing about equals.
        reference = load_reference(read_model(open_checkpoint(tmp_path / "two")))
        with torch.no_grad():
            np.testing.assert_allclose(logits[0], reference(torch.tensor([TOKENS[:50]])).logits[0, -1], atol=1e-4)


def test_greedy_text_is_that_of_transformers_generate(example_engines):
    tokenizer, session, reference = load_tokenizer(EXAMPLE), Session(example_engines["fp32"]), outside(EXAMPLE)
    for prompt in ("def main(", "import os\n", "Return the ", "class Queue:"):
        ids = tokenizer.encode_prompt(prompt)
        expected = reference.generate(
            torch.tensor([ids]), attention_mask=torch.ones(1, len(ids), dtype=torch.long), max_new_tokens=64,
            do_sample=False, eos_token_id=None, pad_token_id=0,
        )[0, len(ids):].tolist()  # fmt: skip
        assert greedy(session, ids, 64) == expected


@pytest.mark.parametrize("kind", each(["fp32", "int4", QUANTISED[-1]]))
def test_onnxruntime_genai_runs_the_engine_directory_to_the_same_tokens(example_engines, kind):
    model, session = load_genai(example_engines[kind].folder), Session(example_engines[kind])
    tokenizer = load_tokenizer(EXAMPLE)
    for prompt in ("def main(", "import os\n", "Return the "):
        ids = tokenizer.encode_prompt(prompt)
        found = genai_greedy(model, ids, 48)
        assert len(found) > 8
        assert found == greedy(session, ids, 48)[: len(found)]


def test_onnxruntime_genai_keeps_to_the_window(checkpoint, engine):
    model, session = load_genai(engine.folder), Session(engine)
    found = genai_greedy(model, TOKENS[:60], 48)
    assert found == greedy(session, TOKENS[:60], 48)[: len(found)]
    assert len(found) > 8


# What each operator would also take, and why it bears on nothing here.
UNWRITTEN = {
    "GroupQueryAttention": {
        "causal", "qk_output", "sliding_window_cache",  # 1, none and off are the only values with this meaning
        "k_quant_type", "v_quant_type", "kv_cache_bit_width",  # the cache is float32
        "qk_norm_epsilon", "q_norm_epsilon", "k_norm_epsilon",  # no such norms
    },
    "QMoE": {
        "fc1_expert_weight_bits", "fc2_expert_weight_bits", "fc3_expert_weight_bits",  # expert_weight_bits is written
        "swiglu_limit_after_activation",  # swiglu_limit is written, and has none
    },
    "MoE": {"swiglu_limit_after_activation"},
    "MatMulNBits": set(),
    "GatherBlockQuantized": set(),
    "FusedMatMul": set(),
    "SimplifiedLayerNormalization": set(),
}  # fmt: skip


def test_every_attribute_that_bears_on_the_result_is_written(example_engines):
    schemas = {
        schema.name: set(schema.attributes)
        for schema in onnxruntime.capi.onnxruntime_pybind11_state.get_all_operator_schema()
    }
    unwritten = {}
    for precision in ("fp32", "int4"):
        path = example_engines[precision].folder / "model.onnx"
        for node in onnx.load(str(path), load_external_data=False).graph.node:
            if node.op_type in UNWRITTEN:
                unwritten[node.op_type] = schemas[node.op_type] - {attribute.name for attribute in node.attribute}
    assert unwritten == UNWRITTEN


def test_no_bias_is_made_up(example_engines):
    for precision in ("fp32", "int4"):
        model = onnx.load(str(example_engines[precision].folder / "model.onnx"), load_external_data=False)
        assert not [tensor.name for tensor in model.graph.initializer if "bias" in tensor.name]
        assert len(example_engines[precision].manifest.files) > 5


def test_both_spellings_build_the_same_engine_but_for_the_record_of_what_was_read(tmp_path):
    sizes = {"hidden_size": 96, "ffn_size": 64, "head_dim": 32}
    files = []
    for spelling in SPELLINGS:
        folder = write_mixtral_checkpoint(tmp_path / spelling, seed=2, spelling=spelling, **sizes)
        files.append(dict(build(folder, tmp_path / f"engine-{spelling}", "int4").manifest.files))
    assert files[0].pop("weights.jsonl") != files[1].pop("weights.jsonl")
    assert files[0] == files[1]


def test_both_matrices_of_experts_have_blocks_that_divide_what_each_reads(tmp_path):
    """The first reads 128 features and gives twice 96, gate and up, the second reads 96: of 64 and 32 the latter."""
    sizes = {"hidden_size": 128, "ffn_size": 96, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32}
    folder = write_mixtral_checkpoint(tmp_path / "checkpoint", seed=1, **sizes)
    engine = build(folder, tmp_path / "engine", "int4")
    nodes = onnx.load(engine.folder / "model.onnx", load_external_data=False).graph.node
    blocks = [
        attribute.i
        for node in nodes
        if node.op_type in ("QMoE", "Experts")
        for attribute in node.attribute
        if attribute.name == "block_size"
    ]
    assert blocks == [32] * engine.manifest.architecture.num_layers


def test_head_sizes_that_the_kernel_does_not_take_are_refused_before_anything_is_written(tmp_path):
    folder = write_mixtral_checkpoint(tmp_path / "checkpoint", seed=1, head_dim=24)
    with pytest.raises(ExportError, match="head size 24 and the rotary dimension 24, .* takes multiples of 16"):
        build(folder, tmp_path / "engine")
    assert not (tmp_path / "engine").exists()


def test_the_commands_take_a_mixtral_from_inspect_to_verify(tmp_path, capsys):
    assert main(["inspect", str(EXAMPLE)]) == 0
    assert "experts           4, 2 per token" in capsys.readouterr().out
    words = ["--checkpoint", str(EXAMPLE), "--precision", "int8", "--output", str(tmp_path / "engine")]
    assert main(["build", *words, "--calibrate-tokens", "1024"]) == 0
    assert main(["verify", str(tmp_path / "engine"), "--reference", str(EXAMPLE), "--tokens", "600"]) == 0
    engine = open_engine(tmp_path / "engine")
    assert engine.manifest.family == "mixtral"
    assert engine.manifest.verification["reference_is_the_source"] is True
    assert engine.manifest.verification["failures"] == []


MEMORY_PROGRAM = """
import sys
from pathlib import Path
from trt_build.ort.build import BuildOptions, build_engine
small, large, output = sys.argv[1:]
def peak():  # of this process alone; ru_maxrss would start from its parent's
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) * 1024
build_engine(BuildOptions(checkpoint=small, output=Path(output) / "engine-small"))  # loads every library
before = peak()
build_engine(BuildOptions(checkpoint=large, output=Path(output) / "engine-large"))
print(peak() - before)
"""


def test_packed_experts_are_read_piece_by_piece(tmp_path):
    sizes = {
        "hidden_size": 1024, "num_heads": 8, "head_dim": 128, "ffn_size": 3584, "num_layers": 1, "dtype": "bfloat16",
        "num_experts": 8,
    }  # fmt: skip
    large = write_mixtral_checkpoint(tmp_path / "large", seed=1, spelling="packed", **sizes)
    words = [sys.executable, "-c", MEMORY_PROGRAM, EXAMPLE, large, tmp_path]
    found = int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
    packed_bytes = 8 * 2 * 3584 * 1024 * 2  # gate_up_proj, bfloat16: 117 MB
    assert 0 < found <= packed_bytes


@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_every_node_of_a_cuda_engine_has_a_kernel_of_its_types(tmp_path, precision):
    options = BuildOptions(checkpoint=str(EXAMPLE), output=tmp_path / "engine", precision=precision, provider="cuda")
    folder = build_engine(options).folder
    for name in ("model.onnx", "model_serving.onnx", "model_scoring.onnx"):
        problems, operators = check_types(onnx.load(str(folder / name), load_external_data=False))
        assert problems == []
        assert {"MoE", "QMoE"} & set(operators)
