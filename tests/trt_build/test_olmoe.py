"""olmoe engines against transformers' OlmoeForCausalLM: equal where they must be, caught where made wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from cuda_kernels import check_types
from decoding import KINDS, QUANTISED, each
from mixtral_checkpoints import SPELLINGS, write_llama_tokenizer
from olmoe_checkpoints import tell_mixtral_as_olmoe, write_olmoe_checkpoint
from safetensors.numpy import load_file
from torch_reference import ByTransformers
from transformers import OlmoeConfig, OlmoeForCausalLM

from cli.main import main
from export.architecture import QueryKeyValue, Router
from export.checkpoint.folder import open_checkpoint
from export.errors import ConfigError, ExportError
from export.families import olmoe, read_model
from export.inspection import describe
from export.provider import PROVIDERS
from export.reference.model import Reference
from export.tokenizer.loading import load_tokenizer
from export.trtllm.checkpoint import CheckpointOptions, plan_checkpoint
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
    return OlmoeForCausalLM.from_pretrained(
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
    folder = tmp_path_factory.mktemp("olmoe") / "checkpoint"
    return write_olmoe_checkpoint(folder, seed=7, config={"clip_qkv": 0.8})


@pytest.fixture(scope="module")
def engine(tmp_path_factory, checkpoint):
    return build(checkpoint, tmp_path_factory.mktemp("engine") / "fp32")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The trained example's weights in an olmoe."""
    return tell_mixtral_as_olmoe(EXAMPLE, tmp_path_factory.mktemp("trained") / "checkpoint")


@pytest.mark.parametrize("published", [True, False])
def test_what_transformers_saves_in_either_spelling_gives_its_logits(tmp_path, published):
    config = OlmoeConfig(
        vocab_size=371, hidden_size=96, intermediate_size=72, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, num_experts=11, num_experts_per_tok=8, max_position_embeddings=400, clip_qkv=0.9,
        initializer_range=0.15, rope_parameters={"rope_type": "default", "rope_theta": 20000.0},
        eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(5)
    model = OlmoeForCausalLM(config).eval()
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
        {"num_experts": 3, "experts_per_token": 1, "ffn_size": 37},
        {"num_experts": 12, "experts_per_token": 8, "num_kv_heads": 1, "config": {"clip_qkv": 0.6}},
        {"num_heads": 5, "num_kv_heads": 5, "hidden_size": 80, "tied": True, "config": {"norm_topk_prob": True}},
        {"dtype": "bfloat16", "num_experts": 7, "num_layers": 3},
    ],
    ids=lambda sizes: " ".join(f"{key}={value}" for key, value in sizes.items()),
)
def test_fp32_engine_and_reference_equal_transformers_at_odd_sizes(tmp_path, sizes, spelling):
    folder = write_olmoe_checkpoint(tmp_path / "checkpoint", seed=2, spelling=spelling, **sizes)
    theirs = outside(folder)
    expect_equal(build(folder, tmp_path / "engine"), theirs, TOKENS[:120])
    [(found, _)] = Reference(read_model(open_checkpoint(folder))).run([TOKENS[:120]])
    with torch.no_grad():
        expected = theirs(torch.tensor([TOKENS[:120]])).logits[0].numpy()
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_every_node_is_asked_for_norms_clips_and_router(engine, checkpoint):
    scoring = read_graph(engine.folder, "model_scoring.onnx")
    assert graph_failures(engine, read_model(open_checkpoint(checkpoint)), scoring) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"clip_qkv": 0.7}, "attention has 6 Clips"),
        ({"clip_qkv": None}, "attention has 6 Clips"),
        ({"norm_topk_prob": True}, "has normalize_routing_weights 0, expected 1"),
    ],
)
def test_a_fact_that_is_wrong_in_the_graph_is_told_and_shows_in_the_logits(
    tmp_path, engine, checkpoint, changes, problem
):
    config = {"clip_qkv": 0.8, **changes}
    faulty = write_olmoe_checkpoint(tmp_path / "faulty", seed=7, config=config)
    found = graph_failures(engine, read_model(open_checkpoint(faulty)), read_graph(engine.folder, "model_scoring.onnx"))
    assert found
    assert all(problem in failure for failure in found)
    assert verify.compare(engine, ByTransformers(outside(faulty)), [TOKENS[:64]], quiet).failures(FP32)


def test_keys_that_are_absent_are_transformers_own(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    for key in ("rms_norm_eps", "rope_theta", "num_key_value_heads", "num_experts", "num_experts_per_tok", "clip_qkv"):
        del config[key]
    del config["norm_topk_prob"]
    facts, defaults = olmoe.read_config(config), OlmoeConfig()
    assert facts.norm_epsilon == defaults.rms_norm_eps == 1e-5
    assert facts.rope_base == defaults.rope_parameters["rope_theta"] == 1e4
    assert (facts.num_experts, facts.experts_per_token) == (defaults.num_experts, defaults.num_experts_per_tok)
    assert facts.num_kv_heads == facts.num_heads
    assert facts.router == Router(normalise=defaults.norm_topk_prob)
    assert facts.qkv == QueryKeyValue(norm="width", clip=defaults.clip_qkv)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"clip_qkv": 0}, "clip_qkv is 0, expected a positive"),
        ({"clip_qkv": "8"}, "clip_qkv is '8', expected a positive"),
        ({"norm_topk_prob": 3}, "norm_topk_prob is 3; moeship builds only False or True"),
        ({"attention_bias": True}, "attention_bias is True; moeship builds only False"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; moeship builds only 'silu'"),
        ({"sliding_window": 40}, "sliding_window = 40 is a key that moeship does not support"),
        ({"num_experts_per_tok": 6}, "num_experts_per_tok is 6, expected 1 to num_experts = 5"),
        ({"shared_expert_intermediate_size": 9}, "shared_expert_intermediate_size = 9 is a key that moeship does not"),
    ],
)
def test_what_is_not_built_is_refused_by_name(tmp_path, changes, problem):
    folder = write_olmoe_checkpoint(tmp_path / "checkpoint", seed=1, config=changes)
    with pytest.raises(ConfigError, match=problem) as caught:
        read_model(open_checkpoint(folder))
    assert str(caught.value).startswith("reading config.json of an olmoe checkpoint: ")


@pytest.mark.parametrize(("precision", "kernels"), each(KINDS, apart=True))
def test_trained_weights_keep_parity_at_every_precision(tmp_path, trained, precision, kernels):
    engine = build(trained, tmp_path / "engine", precision, kernels)
    windows = list(parity.split_windows(load_tokenizer(trained).encode_prompt(TEXT), 256, 1024))
    report = verify.compare(engine, ByTransformers(outside(trained)), windows, quiet)
    assert report.failures(parity.THRESHOLDS[precision]) == []


@pytest.mark.parametrize(("precision", "kernels"), each(QUANTISED, apart=True))
def test_weights_of_experts_that_are_not_normalised_keep_parity_when_quantised(tmp_path, precision, kernels):
    folder = tell_mixtral_as_olmoe(EXAMPLE, tmp_path / "checkpoint", norm_topk_prob=False, clip_qkv=8.0)
    engine = build(folder, tmp_path / "engine", precision, kernels)
    windows = list(parity.split_windows(load_tokenizer(folder).encode_prompt(TEXT), 256, 1024))
    report = verify.compare(engine, ByTransformers(outside(folder)), windows, quiet)
    assert report.failures(parity.THRESHOLDS[precision]) == []


@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_the_cuda_graph_normalises_and_clips_in_float32_and_scales_no_query(tmp_path, precision):
    sizes = {"hidden_size": 256, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 64}
    folder = write_olmoe_checkpoint(tmp_path / "checkpoint", seed=1, config={"clip_qkv": 0.6}, **sizes)
    engine = build(folder, tmp_path / "engine", precision, provider="cuda").folder
    for name in ("model.onnx", "model_serving.onnx", "model_scoring.onnx"):
        model = onnx.load(str(engine / name), load_external_data=False)
        problems, operators = check_types(model)
        assert problems == []
        assert {"Split", "Clip"} <= operators
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
    folder = write_olmoe_checkpoint(tmp_path / "checkpoint", seed=3, config={"clip_qkv": 0.9}, **sizes)
    engine = build(folder, tmp_path / "engine", "fp16", provider="cuda")
    report = verify.compare(engine, ByTransformers(outside(folder)), [TOKENS], quiet)
    assert report.mean_kl <= 1e-5
    assert report.mean_decoded_kl <= 1e-5
    assert report.max_logit_difference <= 0.02
    assert report.routing_agreement >= 0.99


def test_tensorrt_llm_is_refused_by_the_familys_name(checkpoint):
    with pytest.raises(ExportError, match="builds TensorRT-LLM engines of mixtral, .*, not of olmoe; build"):
        plan_checkpoint(read_model(open_checkpoint(checkpoint)), CheckpointOptions())


def test_it_is_described_as_any_mixture(checkpoint):
    report = describe(open_checkpoint(checkpoint)).to_json()
    stored = load_file(checkpoint / "model.safetensors")
    assert report["family"] == "olmoe"
    assert report["total_parameters"] == sum(values.size for values in stored.values())
    assert [layer["layer"] for layer in report["routing"]["layers"]] == [0, 1]


def test_the_commands_take_an_olmoe_from_inspect_to_a_repository(tmp_path, trained, capsys):
    assert main(["inspect", str(trained)]) == 0
    told = capsys.readouterr().out
    assert "experts           4, 2 per token" in told
    assert "queries and keys  normalised over their whole width" in told
    words = ["--checkpoint", str(trained), "--precision", "int8", "--kernels", "onnxruntime", "--kv", "int8"]
    assert main(["plan", *words]) == 0
    assert "as int8 for cpu" in capsys.readouterr().out
    words += ["--calibrate-tokens", "1024"]
    assert main(["build", *words, "--output", str(tmp_path / "engine")]) == 0
    assert main(["verify", str(tmp_path / "engine"), "--reference", str(trained), "--tokens", "600"]) == 0
    engine = open_engine(tmp_path / "engine")
    assert engine.manifest.architecture.qkv == QueryKeyValue(norm="width")
    assert engine.manifest.verification["failures"] == []
    assert main(["package", str(tmp_path / "engine"), "--name", "o", "--output", str(tmp_path / "repository")]) == 0
    assert (tmp_path / "repository" / "o" / "config.pbtxt").is_file()
