"""flex_olmo engines against transformers' FlexOlmoForCausalLM: equal where they must be, caught where made wrong."""

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
from flex_olmo_checkpoints import tell_mixtral_as_flex_olmo, write_flex_olmo_checkpoint
from mixtral_checkpoints import SPELLINGS, write_llama_tokenizer
from packed_checkpoints import pack_gptq
from safetensors.numpy import load_file, save_file
from torch_reference import ByTransformers
from transformers import FlexOlmoConfig, FlexOlmoForCausalLM

from cli.main import main
from export.architecture import QueryKeyValue, Router
from export.checkpoint.folder import open_checkpoint
from export.checkpoint.tensor_table import Role
from export.errors import ConfigError, ExportError
from export.families import flex_olmo, read_model
from export.inspection import describe
from export.provider import PROVIDERS
from export.reference.model import Reference
from export.reference.variants import Part, Variants
from export.tokenizer.loading import load_tokenizer
from export.trtllm.checkpoint import CheckpointOptions, plan_checkpoint
from trt_build.comparison import parity
from trt_build.ort import verify
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.device import Device
from trt_build.ort.engine import open_engine
from trt_build.ort.planning.plan import plan_engine
from trt_build.ort.planning.prepare import EngineOptions, prepare_build
from trt_build.ort.questions.graph_facts import graph_failures
from trt_build.ort.questions.stored_graph import read_graph
from trt_build.ort.questions.stored_weights import open_stored_weights

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-mixtral" / "checkpoint"
TEXT = (EXAMPLE.parent / "train.py").read_text()
TOKENS = np.random.default_rng(3).integers(0, 365, 200).tolist()
FP32 = parity.THRESHOLDS["fp32"]
NORMS = ("post_attention_layernorm", "post_feedforward_layernorm", "self_attn.q_norm", "self_attn.k_norm")


def quiet(_text: str) -> None:
    pass


def outside(checkpoint):
    """transformers' own reading of a checkpoint; its grouped kernels do not take odd widths."""
    return FlexOlmoForCausalLM.from_pretrained(
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
    return write_flex_olmo_checkpoint(tmp_path_factory.mktemp("flex_olmo") / "checkpoint", seed=7)


@pytest.fixture(scope="module")
def engine(tmp_path_factory, checkpoint):
    return build(checkpoint, tmp_path_factory.mktemp("engine") / "fp32")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The trained example's weights in a flex_olmo."""
    return tell_mixtral_as_flex_olmo(EXAMPLE, tmp_path_factory.mktemp("trained") / "checkpoint")


@pytest.mark.parametrize("published", [True, False])
def test_what_transformers_saves_in_either_spelling_gives_its_logits(tmp_path, published):
    config = FlexOlmoConfig(
        vocab_size=371, hidden_size=96, intermediate_size=72, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, num_experts=7, num_experts_per_tok=5, max_position_embeddings=400,
        initializer_range=0.15, rope_parameters={"rope_type": "default", "rope_theta": 20000.0},
        eos_token_id=2, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(5)
    model = FlexOlmoForCausalLM(config).eval()
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
        {"num_experts": 7, "experts_per_token": 5, "num_kv_heads": 1, "hidden_size": 53, "head_dim": 32},
        {"num_heads": 5, "num_kv_heads": 5, "hidden_size": 80, "tied": True, "config": {"norm_topk_prob": True}},
        {"dtype": "bfloat16", "num_experts": 7, "num_layers": 3},
    ],
    ids=lambda sizes: " ".join(f"{key}={value}" for key, value in sizes.items()),
)
def test_fp32_engine_equals_transformers_at_odd_sizes(tmp_path, sizes, spelling):
    folder = write_flex_olmo_checkpoint(tmp_path / "checkpoint", seed=2, spelling=spelling, **sizes)
    expect_equal(build(folder, tmp_path / "engine"), outside(folder), TOKENS[:120])


def test_every_node_is_asked_for_norms_and_router(engine, checkpoint):
    scoring = read_graph(engine.folder, "model_scoring.onnx")
    model = read_model(open_checkpoint(checkpoint))
    assert graph_failures(engine, model, scoring) == []
    of_layers = [
        norm.name for layer in model.family.network(model.weights.checkpoint.config).layers for norm in layer.norms
    ]
    assert sorted(of_layers) == sorted(f"model.layers.{layer}.{norm}" for layer in range(2) for norm in NORMS)


@pytest.mark.parametrize("norm", NORMS)
def test_each_norm_that_is_wrong_in_the_reference_is_caught(tmp_path, engine, checkpoint, norm):
    faulty = write_flex_olmo_checkpoint(tmp_path / "faulty", seed=7)
    tensors = load_file(faulty / "model.safetensors")
    tensors[f"model.layers.1.{norm}.weight"][3] *= 1.5
    save_file(tensors, faulty / "model.safetensors")
    assert verify.compare(engine, ByTransformers(outside(faulty)), [TOKENS[:64]], quiet).failures(FP32)


def test_weights_of_experts_that_are_normalised_wrongly_are_told(tmp_path, engine):
    faulty = write_flex_olmo_checkpoint(tmp_path / "faulty", seed=7, config={"norm_topk_prob": True})
    found = graph_failures(engine, read_model(open_checkpoint(faulty)), read_graph(engine.folder, "model_scoring.onnx"))
    assert found
    assert all("has normalize_routing_weights 0, expected 1" in failure for failure in found)


def test_keys_that_are_absent_are_transformers_own(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    for key in ("rms_norm_eps", "rope_theta", "num_key_value_heads", "num_experts", "num_experts_per_tok"):
        del config[key]
    del config["norm_topk_prob"]
    facts, defaults = flex_olmo.read_config(config), FlexOlmoConfig()
    assert facts.norm_epsilon == defaults.rms_norm_eps == 1e-6
    assert facts.rope_base == defaults.rope_parameters["rope_theta"] == 5e5
    assert (facts.num_experts, facts.experts_per_token) == (defaults.num_experts, defaults.num_experts_per_tok)
    assert facts.num_kv_heads == facts.num_heads
    assert facts.router == Router(normalise=defaults.norm_topk_prob)
    assert facts.qkv == QueryKeyValue(norm="width")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"norm_topk_prob": 3}, "norm_topk_prob is 3; moeship builds only False or True"),
        ({"attention_bias": True}, "attention_bias is True; moeship builds only False"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; moeship builds only 'silu'"),
        ({"sliding_window": 40}, "sliding_window = 40 is a key that moeship does not support"),
        ({"num_experts_per_tok": 6}, "num_experts_per_tok is 6, expected 1 to num_experts = 5"),
    ],
)
def test_what_is_not_built_is_refused_by_name(tmp_path, changes, problem):
    folder = write_flex_olmo_checkpoint(tmp_path / "checkpoint", seed=1, config=changes)
    with pytest.raises(ConfigError, match=problem) as caught:
        read_model(open_checkpoint(folder))
    assert str(caught.value).startswith("reading config.json of a flex_olmo checkpoint: ")


@pytest.mark.parametrize(("precision", "kernels"), each(KINDS, apart=True))
def test_trained_weights_keep_parity_and_the_plan_at_every_precision(tmp_path, trained, precision, kernels):
    options = EngineOptions(checkpoint=str(trained), precision=precision, kernels=kernels)
    planned = plan_engine(prepare_build(options))
    engine = build(trained, tmp_path / "engine", precision, kernels)
    assert planned.files == {path.name: path.stat().st_size for path in engine.folder.iterdir()}
    windows = list(parity.split_windows(load_tokenizer(trained).encode_prompt(TEXT), 256, 1024))
    report = verify.compare(engine, ByTransformers(outside(trained)), windows, quiet)
    assert report.reference_perplexity < 160  # of 1024 tokens
    assert report.failures(parity.THRESHOLDS[precision]) == []


@pytest.mark.parametrize(("precision", "kernels"), each(QUANTISED, apart=True))
def test_weights_of_experts_that_are_not_normalised_keep_parity_when_quantised(tmp_path, precision, kernels):
    folder = tell_mixtral_as_flex_olmo(EXAMPLE, tmp_path / "checkpoint", norm_topk_prob=False)
    engine = build(folder, tmp_path / "engine", precision, kernels)
    windows = list(parity.split_windows(load_tokenizer(folder).encode_prompt(TEXT), 256, 1024))
    report = verify.compare(engine, ByTransformers(outside(folder)), windows, quiet)
    assert report.failures(parity.THRESHOLDS[precision]) == []


@pytest.mark.parametrize("kernels", each([("int4", "onnxruntime"), ("int4", "moeship")]))
def test_codes_that_gptq_packed_are_kept(tmp_path, kernels):
    sizes = {"hidden_size": 128, "num_heads": 4, "ffn_size": 192}
    folder = pack_gptq(write_flex_olmo_checkpoint(tmp_path / "packed", seed=1, **sizes), group_size=64)
    engine = build(folder, tmp_path / "engine", *kernels)
    model = read_model(open_checkpoint(folder))
    stored = open_stored_weights(engine, model)
    for name, spec in model.weights.table.items():
        if spec.role in (Role.ATTENTION, Role.EXPERT):
            assert np.array_equal(stored.load(name), model.weights.load(name))
    assert engine.manifest.packed["expert"].codes_kept == 4


def test_a_variant_with_other_weights_is_the_model_of_these(tmp_path, checkpoint):
    other = write_flex_olmo_checkpoint(tmp_path / "other", seed=8)
    models = [read_model(open_checkpoint(folder)) for folder in (checkpoint, other)]
    windows = [TOKENS[:30], TOKENS[30:50]]
    found = np.concatenate(list(Variants(models[0], models[1].weights, [Part(role=None)]).run(windows)), axis=2)
    for model, logits in zip(models, found, strict=True):
        expected = np.concatenate([own for own, _ in Reference(model).run(windows)])
        np.testing.assert_allclose(logits, expected, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_the_cuda_graph_has_types_that_its_kernels_take(tmp_path, precision):
    sizes = {"hidden_size": 256, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 64}
    folder = write_flex_olmo_checkpoint(tmp_path / "checkpoint", seed=1, **sizes)
    engine = build(folder, tmp_path / "engine", precision, provider="cuda").folder
    for name in ("model.onnx", "model_serving.onnx", "model_scoring.onnx"):
        model = onnx.load(str(engine / name), load_external_data=False)
        problems, operators = check_types(model)
        assert problems == []
        assert "SimplifiedLayerNormalization" in operators


def test_the_float16_graph_differs_from_transformers_by_its_rounding(tmp_path, monkeypatch):
    provider = dataclasses.replace(PROVIDERS["cuda"], runtime_name="CPUExecutionProvider", options={})
    monkeypatch.setattr("trt_build.ort.session.open_device", lambda *_: Device(provider=provider, kind="cpu"))
    sizes = {"hidden_size": 192, "num_heads": 6, "num_kv_heads": 2, "ffn_size": 448, "dtype": "float16"}
    folder = write_flex_olmo_checkpoint(tmp_path / "checkpoint", seed=4, **sizes)
    engine = build(folder, tmp_path / "engine", "fp16", provider="cuda")
    report = verify.compare(engine, ByTransformers(outside(folder)), [TOKENS], quiet)
    assert report.mean_kl <= 1e-5
    assert report.mean_decoded_kl <= 1e-5
    assert report.max_logit_difference <= 0.02
    assert report.routing_agreement >= 0.99


def test_tensorrt_llm_is_refused_by_the_familys_name(checkpoint):
    with pytest.raises(ExportError, match=r"TensorRT-LLM engines of mixtral, .*, not of flex_olmo; build"):
        plan_checkpoint(read_model(open_checkpoint(checkpoint)), CheckpointOptions())


def test_it_is_described_as_any_mixture(checkpoint):
    report = describe(open_checkpoint(checkpoint)).to_json()
    stored = load_file(checkpoint / "model.safetensors")
    assert report["family"] == "flex_olmo"
    assert report["total_parameters"] == sum(values.size for values in stored.values())
    assert [layer["layer"] for layer in report["routing"]["layers"]] == [0, 1]


def test_the_commands_take_a_flex_olmo_from_inspect_to_a_repository(tmp_path, trained, capsys):
    assert main(["inspect", str(trained)]) == 0
    assert "queries and keys  normalised over their whole width" in capsys.readouterr().out
    words = ["--checkpoint", str(trained), "--precision", "int4", "--kernels", "onnxruntime", "--kv", "int8"]
    words += ["--method", "gptq", "--calibrate-tokens", "1024"]
    assert main(["build", *words, "--output", str(tmp_path / "engine")]) == 0
    assert main(["verify", str(tmp_path / "engine"), "--reference", str(trained), "--tokens", "600"]) == 0
    assert open_engine(tmp_path / "engine").manifest.verification["failures"] == []
    assert main(["package", str(tmp_path / "engine"), "--name", "f", "--output", str(tmp_path / "repository")]) == 0
    assert (tmp_path / "repository" / "f" / "config.pbtxt").is_file()
