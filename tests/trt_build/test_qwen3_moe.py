"""qwen3_moe engines against transformers' Qwen3MoeForCausalLM: equal where they must be, caught where made wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from cuda_kernels import check_types
from decoding import KINDS, each
from mixtral_checkpoints import SPELLINGS, write_llama_tokenizer
from qwen_checkpoints import tell_mixtral_as_qwen3, write_qwen_checkpoint
from safetensors.numpy import load_file
from torch_reference import ByTransformers
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from cli.main import main
from export.architecture import QueryKeyValue, Router
from export.checkpoint.folder import open_checkpoint
from export.errors import ConfigError
from export.families import qwen3_moe, read_model
from export.inspection import describe
from export.provider import PROVIDERS
from export.reference.model import Reference
from export.tokenizer.loading import load_tokenizer
from trt_build.comparison import parity
from trt_build.ort import verify
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.device import Device
from trt_build.ort.engine import open_engine
from trt_build.ort.questions.graph_facts import graph_failures
from trt_build.ort.questions.stored_graph import read_graph

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-mixtral" / "checkpoint"
TEXT = (EXAMPLE.parent / "train.py").read_text()
TOKENS = np.random.default_rng(3).integers(0, 365, 200).tolist()
FP32 = parity.THRESHOLDS["fp32"]


def quiet(_text: str) -> None:
    pass


def outside(checkpoint):
    """transformers' own reading of a checkpoint; its grouped kernels do not take odd widths."""
    return Qwen3MoeForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()


def build(checkpoint, output, precision="fp32", kernels="onnxruntime", **options):
    return build_engine(
        BuildOptions(checkpoint=str(checkpoint), output=output, precision=precision, kernels=kernels, **options)
    )


def expect_equal(engine, reference, window):
    """Every logit to 1e-4 of the largest one, scored and decoded, and within what moeship verify allows."""
    report = verify.compare(engine, ByTransformers(reference), [window], quiet)
    with torch.no_grad():
        largest = float(reference(torch.tensor([list(window)])).logits.abs().max())
    assert report.num_decoded_tokens == len(window) // 2
    assert max(report.max_logit_difference, report.max_decoded_difference) <= 1e-4 * largest
    assert report.routing_agreement == 1.0
    assert report.failures(FP32) == []


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("qwen3") / "checkpoint"
    return write_qwen_checkpoint(folder, "qwen3_moe", seed=7, num_layers=3, config={"mlp_only_layers": [1]})


@pytest.fixture(scope="module")
def engine(tmp_path_factory, checkpoint):
    return build(checkpoint, tmp_path_factory.mktemp("engine") / "fp32")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The trained example's weights in a qwen3_moe."""
    return tell_mixtral_as_qwen3(EXAMPLE, tmp_path_factory.mktemp("trained") / "checkpoint")


@pytest.mark.parametrize("published", [True, False])
def test_what_transformers_saves_in_either_spelling_gives_its_logits(tmp_path, published):
    config = Qwen3MoeConfig(
        vocab_size=371, hidden_size=72, intermediate_size=104, moe_intermediate_size=40, num_hidden_layers=4,
        num_attention_heads=6, num_key_value_heads=3, head_dim=32, num_experts=11, num_experts_per_tok=8,
        norm_topk_prob=True, decoder_sparse_step=2, max_position_embeddings=400, initializer_range=0.15,
        rope_parameters={"rope_type": "default", "rope_theta": 20000.0}, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(5)
    model = Qwen3MoeForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "saved", save_original_format=published)
    write_llama_tokenizer(tmp_path / "saved")
    names = load_file(tmp_path / "saved" / "model.safetensors")
    assert ("model.layers.1.mlp.experts.3.gate_proj.weight" in names) is published
    assert ("model.layers.1.mlp.experts.gate_up_proj" in names) is not published
    expect_equal(build(tmp_path / "saved", tmp_path / "engine"), model, TOKENS)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(
    "sizes",
    [
        {"num_experts": 3, "experts_per_token": 1, "ffn_size": 37, "head_dim": None, "hidden_size": 96},
        {"num_experts": 12, "experts_per_token": 8, "num_kv_heads": 1, "config": {"norm_topk_prob": False}},
        {
            "num_heads": 5, "num_kv_heads": 5, "head_dim": 48, "tied": True, "num_layers": 4,
            "config": {"decoder_sparse_step": 2, "mlp_only_layers": [3]},
        },
        {
            "dtype": "bfloat16", "num_experts": 7,
            "config": {"use_sliding_window": True, "sliding_window": 30, "max_window_layers": None},
        },
    ],
    ids=lambda sizes: " ".join(f"{key}={value}" for key, value in sizes.items()),
)  # fmt: skip
def test_fp32_engine_and_reference_equal_transformers_at_odd_sizes(tmp_path, sizes, spelling):
    folder = write_qwen_checkpoint(tmp_path / "checkpoint", "qwen3_moe", seed=2, spelling=spelling, **sizes)
    theirs = outside(folder)
    expect_equal(build(folder, tmp_path / "engine"), theirs, TOKENS[:120])
    [(found, _)] = Reference(read_model(open_checkpoint(folder))).run([TOKENS[:120]])
    with torch.no_grad():
        expected = theirs(torch.tensor([TOKENS[:120]])).logits[0].numpy()
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_every_node_is_asked_for_norms_dense_layers_and_router(engine, checkpoint):
    scoring = read_graph(engine.folder, "model_scoring.onnx")
    assert graph_failures(engine, read_model(open_checkpoint(checkpoint)), scoring) == []
    assert engine.manifest.architecture.dense_layers == (1,)
    assert [layer["layer"] for layer in engine.manifest.routing["layers"]] == [0, 2]


@pytest.mark.parametrize(
    ("config", "problem"),
    [
        ({"rms_norm_eps": 1e-3}, "epsilon"),
        ({"norm_topk_prob": False}, "has normalize_routing_weights 1, expected 0"),
        ({"num_experts_per_tok": 1}, "has k 2, expected 1"),
    ],
)
def test_a_fact_that_is_wrong_in_the_graph_is_told_and_shows_in_the_logits(
    tmp_path, engine, checkpoint, config, problem
):
    config = {"mlp_only_layers": [1], **config}
    faulty = write_qwen_checkpoint(tmp_path / "faulty", "qwen3_moe", seed=7, num_layers=3, config=config)
    found = graph_failures(engine, read_model(open_checkpoint(faulty)), read_graph(engine.folder, "model_scoring.onnx"))
    assert found
    assert all(problem in failure for failure in found)
    assert verify.compare(engine, ByTransformers(outside(faulty)), [TOKENS[:64]], quiet).failures(FP32)


def test_keys_that_are_absent_are_transformers_own(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    for key in (
        "rms_norm_eps", "rope_theta", "num_key_value_heads", "num_experts", "num_experts_per_tok", "norm_topk_prob",
        "decoder_sparse_step", "mlp_only_layers", "use_sliding_window", "sliding_window",
    ):  # fmt: skip
        del config[key]
    facts, defaults = qwen3_moe.read_config({**config, "num_attention_heads": 8}), Qwen3MoeConfig()
    assert facts.norm_epsilon == defaults.rms_norm_eps == 1e-6
    assert facts.rope_base == defaults.rope_parameters["rope_theta"] == 1e4
    assert (facts.num_experts, facts.experts_per_token) == (defaults.num_experts, defaults.num_experts_per_tok)
    assert facts.num_kv_heads == defaults.num_key_value_heads
    assert facts.router == Router(normalise=defaults.norm_topk_prob)
    assert facts.qkv == QueryKeyValue(norm="head")
    assert (facts.dense_layers, facts.dense_ffn_size, facts.sliding_window) == ((), None, None)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"norm_topk_prob": 3}, "norm_topk_prob is 3; moeship builds only False or True"),
        ({"attention_bias": True}, "attention_bias is True; moeship builds only False"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; moeship builds only 'silu'"),
        ({"decoder_sparse_step": 0}, "decoder_sparse_step is 0, expected a whole number of 1"),
        ({"decoder_sparse_step": 3}, r"by decoder_sparse_step 3 and mlp_only_layers \[\] none of 2 layers has experts"),
        ({"mlp_only_layers": [0, 1]}, r"mlp_only_layers \[0, 1\] none of 2 layers has experts"),
        ({"mlp_only_layers": "0"}, "mlp_only_layers is '0', expected a list of layers"),
        ({"mlp_only_layers": [1], "intermediate_size": None}, "intermediate_size is None, expected a whole number"),
        ({"use_sliding_window": True, "sliding_window": 8}, "max_window_layers = 2 is a key that moeship does not"),
        ({"num_experts_per_tok": 6}, "num_experts_per_tok is 6, expected 1 to num_experts = 5"),
        ({"shared_expert_intermediate_size": 9}, "shared_expert_intermediate_size = 9 is a key that moeship does not"),
        ({"moe_intermediate_size": None}, "moe_intermediate_size is None, expected a whole number"),
    ],
)
def test_what_is_not_built_is_refused_by_name(tmp_path, changes, problem):
    folder = write_qwen_checkpoint(tmp_path / "checkpoint", "qwen3_moe", seed=1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    with pytest.raises(ConfigError, match=problem):
        read_model(open_checkpoint(folder))


@pytest.mark.parametrize(("precision", "kernels"), each(KINDS, apart=True))
def test_trained_weights_keep_parity_at_every_precision(tmp_path, trained, precision, kernels):
    engine = build(trained, tmp_path / "engine", precision, kernels)
    windows = list(parity.split_windows(load_tokenizer(trained).encode_prompt(TEXT), 256, 1024))
    report = verify.compare(engine, ByTransformers(outside(trained)), windows, quiet)
    assert report.failures(parity.THRESHOLDS[precision]) == []


@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_the_cuda_graph_normalises_each_head_in_float32_and_scales_no_query(tmp_path, precision):
    sizes = {"hidden_size": 256, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "ffn_size": 64}
    folder = write_qwen_checkpoint(tmp_path / "checkpoint", "qwen3_moe", seed=1, **sizes)
    engine = build(folder, tmp_path / "engine", precision, provider="cuda").folder
    for name in ("model.onnx", "model_serving.onnx", "model_scoring.onnx"):
        model = onnx.load(str(engine / name), load_external_data=False)
        problems, operators = check_types(model)
        assert problems == []
        assert "Shape" in operators
        scales = [
            onnx.helper.get_attribute_value(attribute)
            for node in model.graph.node
            for attribute in node.attribute
            if node.op_type == "GroupQueryAttention" and attribute.name == "scale"
        ]
        assert scales == [0.125] * 2  # 1/sqrt(64)


def test_the_float16_graph_differs_from_transformers_by_its_rounding(tmp_path, monkeypatch):
    provider = dataclasses.replace(PROVIDERS["cuda"], runtime_name="CPUExecutionProvider", options={})
    monkeypatch.setattr("trt_build.ort.session.open_device", lambda *_: Device(provider=provider, kind="cpu"))
    sizes = {"hidden_size": 192, "num_heads": 6, "num_kv_heads": 2, "ffn_size": 448, "dtype": "float16"}
    folder = write_qwen_checkpoint(tmp_path / "checkpoint", "qwen3_moe", seed=3, **sizes)
    engine = build(folder, tmp_path / "engine", "fp16", provider="cuda")
    report = verify.compare(engine, ByTransformers(outside(folder)), [TOKENS], quiet)
    assert report.mean_kl <= 1e-5
    assert report.mean_decoded_kl <= 1e-5
    assert report.max_logit_difference <= 0.02
    assert report.routing_agreement >= 0.99


def test_it_is_described_as_any_mixture(checkpoint):
    report = describe(open_checkpoint(checkpoint)).to_json()
    stored = load_file(checkpoint / "model.safetensors")
    assert report["family"] == "qwen3_moe"
    assert report["total_parameters"] == sum(values.size for values in stored.values())
    idle = sum(v.size for n, v in stored.items() if ".experts." in n) * 3 // 5  # 2 of 5 experts are used
    assert report["active_parameters"] == report["total_parameters"] - idle
    assert [layer["layer"] for layer in report["routing"]["layers"]] == [0, 2]


def test_the_commands_take_a_qwen3_moe_from_inspect_to_a_repository(tmp_path, trained, checkpoint, capsys):
    assert main(["inspect", str(checkpoint)]) == 0
    told = capsys.readouterr().out
    assert "experts           5, 2 per token" in told
    assert "dense layers      1 of 3, ffn size 104" in told
    assert "queries and keys  each head normalised" in told
    words = ["--checkpoint", str(trained), "--precision", "int8", "--kernels", "onnxruntime", "--kv", "int8"]
    assert main(["plan", *words]) == 0
    assert "as int8 for cpu" in capsys.readouterr().out
    assert main(["build", *words, "--output", str(tmp_path / "engine")]) == 0
    assert main(["verify", str(tmp_path / "engine"), "--reference", str(trained), "--tokens", "600"]) == 0
    engine = open_engine(tmp_path / "engine")
    assert engine.manifest.architecture.qkv == QueryKeyValue(norm="head")
    assert engine.manifest.verification["failures"] == []
    assert main(["package", str(tmp_path / "engine"), "--name", "q", "--output", str(tmp_path / "repository")]) == 0
    assert (tmp_path / "repository" / "q" / "config.pbtxt").is_file()


@pytest.mark.needs_kernels
def test_an_engine_with_dense_layers_and_weights_that_are_not_normalised_passes_verify(tmp_path):
    sizes = {"hidden_size": 128, "num_heads": 4, "head_dim": 32, "ffn_size": 64, "num_layers": 3}
    config = {"mlp_only_layers": [1], "intermediate_size": 192, "norm_topk_prob": False}
    folder = write_qwen_checkpoint(tmp_path / "checkpoint", "qwen3_moe", seed=4, config=config, **sizes)
    words = ["--precision", "int8", "--kernels", "moeship", "--output", str(tmp_path / "engine")]
    assert main(["build", "--checkpoint", str(folder), *words]) == 0
    engine = open_engine(tmp_path / "engine")
    assert engine.manifest.architecture.dense_ffn_size == 192
    assert main(["verify", str(tmp_path / "engine"), "--reference", str(folder), "--tokens", "300"]) == 0
