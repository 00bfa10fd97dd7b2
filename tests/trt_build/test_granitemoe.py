"""granitemoe engines against transformers' GraniteMoeForCausalLM: equal where they must be, caught where made wrong."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from cuda_kernels import check_types
from decoding import KINDS, each, genai_greedy, greedy, load_genai
from granitemoe_checkpoints import SCALARS, tell_mixtral_as_granitemoe, write_granitemoe_checkpoint
from mixtral_checkpoints import SPELLINGS, write_llama_tokenizer
from safetensors.numpy import load_file, save_file
from torch_reference import ByTransformers, load_reference
from transformers import GraniteMoeConfig, GraniteMoeForCausalLM

from cli.main import main
from export.checkpoint.folder import open_checkpoint
from export.errors import ConfigError, ExportError
from export.families import granitemoe, read_model
from export.inspection import describe
from export.provider import PROVIDERS
from export.tokenizer.loading import load_tokenizer
from export.trtllm.checkpoint import CheckpointOptions, plan_checkpoint
from trt_build.comparison import parity
from trt_build.ort import verify
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.device import Device
from trt_build.ort.engine import open_engine
from trt_build.ort.session import Session

EXAMPLE = Path(__file__).parents[2] / "examples" / "tiny-mixtral" / "checkpoint"
TEXT = (EXAMPLE.parent / "train.py").read_text()
TOKENS = np.random.default_rng(3).integers(0, 365, 200).tolist()
FP32 = parity.THRESHOLDS["fp32"]


def quiet(_text: str) -> None:
    pass


def outside(checkpoint):
    """transformers' own reading of a checkpoint; its grouped kernels do not take odd widths."""
    return GraniteMoeForCausalLM.from_pretrained(
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
    return write_granitemoe_checkpoint(tmp_path_factory.mktemp("granitemoe") / "checkpoint", seed=7)


@pytest.fixture(scope="module")
def engine(tmp_path_factory, checkpoint):
    return build(checkpoint, tmp_path_factory.mktemp("engine") / "fp32")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The trained example, told as a granitemoe."""
    return tell_mixtral_as_granitemoe(EXAMPLE, tmp_path_factory.mktemp("trained") / "checkpoint")


@pytest.mark.parametrize("published", [True, False])
def test_what_transformers_saves_in_either_spelling_gives_its_logits(tmp_path, published):
    config = GraniteMoeConfig(
        vocab_size=371, hidden_size=96, intermediate_size=72, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, num_local_experts=4, num_experts_per_tok=3, max_position_embeddings=400,
        initializer_range=0.15, rope_parameters={"rope_type": "default", "rope_theta": 20000.0},
        embedding_multiplier=3, attention_multiplier=0.1, residual_multiplier=0.7, logits_scaling=1.7,
    )  # fmt: skip
    torch.manual_seed(5)
    model = GraniteMoeForCausalLM(config).eval()
    model.save_pretrained(tmp_path / "saved", save_original_format=published)
    write_llama_tokenizer(tmp_path / "saved")
    names = load_file(tmp_path / "saved" / "model.safetensors")
    assert ("model.layers.1.block_sparse_moe.input_linear.weight" in names) is published
    assert ("model.layers.1.block_sparse_moe.experts.gate_up_proj" in names) is not published
    expect_equal(build(tmp_path / "saved", tmp_path / "engine"), model, TOKENS)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(
    "sizes",
    [
        {"num_experts": 3, "experts_per_token": 1, "ffn_size": 37},
        {"num_experts": 5, "experts_per_token": 3, "num_kv_heads": 1},
        {"num_experts": 8, "experts_per_token": 8, "hidden_size": 53, "head_dim": 32},
        {"num_heads": 5, "num_kv_heads": 5, "head_dim": None, "tied": True},
        {"dtype": "bfloat16", "num_experts": 7, "num_layers": 3},
    ],
    ids=lambda sizes: " ".join(f"{key}={value}" for key, value in sizes.items()),
)
def test_fp32_engine_equals_transformers_at_odd_sizes(tmp_path, sizes, spelling):
    folder = write_granitemoe_checkpoint(tmp_path / "checkpoint", seed=2, spelling=spelling, **sizes)
    expect_equal(build(folder, tmp_path / "engine"), outside(folder), TOKENS[:120])


def test_the_reference_is_transformers_own_model_of_the_checkpoint(checkpoint):
    with torch.no_grad():
        ids = torch.tensor([TOKENS])
        found = load_reference(read_model(open_checkpoint(checkpoint)))(ids).logits
        assert torch.equal(found, outside(checkpoint)(ids).logits)


@pytest.mark.parametrize("scalar", SCALARS)
def test_each_scalar_that_is_wrong_in_the_reference_is_caught(tmp_path, checkpoint, engine, scalar):
    factor = 2.0 if scalar == "attention_multiplier" else 1.02  # scores are small, and twice as large ones too
    faulty = write_granitemoe_checkpoint(tmp_path / "faulty", seed=7, config={scalar: SCALARS[scalar] * factor})
    report = verify.compare(engine, ByTransformers(outside(faulty)), [TOKENS[:64]], quiet)
    assert report.failures(FP32)


def test_scalars_that_are_absent_are_transformers_own(tmp_path, checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    defaults = GraniteMoeConfig()
    for key in (*SCALARS, "rms_norm_eps", "rope_theta", "num_key_value_heads", "num_local_experts", "hidden_act"):
        config.pop(key, None)
    facts = granitemoe.read_config(config)
    assert facts.norm_epsilon == defaults.rms_norm_eps == 1e-6
    assert facts.rope_base == defaults.rope_parameters["rope_theta"] == 1e4
    assert (facts.num_experts, facts.num_kv_heads) == (defaults.num_local_experts, facts.num_heads)
    assert dataclasses.asdict(facts.scales) == {
        "embedding": defaults.embedding_multiplier, "residual": defaults.residual_multiplier,
        "attention": defaults.attention_multiplier, "logits": defaults.logits_scaling,
    }  # fmt: skip


NUMBERS = ("num_experts_per_tok", "num_local_experts", "rms_norm_eps", "rope_theta")


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        *(({key: None}, f"{key} is null, and transformers has no default for it") for key in (*SCALARS, *NUMBERS)),
        ({"residual_multiplier": 0}, "residual_multiplier is 0, expected a positive"),
        ({"logits_scaling": "6"}, "logits_scaling is '6', expected a positive"),
        ({"attention_bias": True}, r"attention_bias is True; moeship builds only False"),
        ({"residual_multiplyer": 0.3}, r"residual_multiplyer = 0.3 is a key .*residual_multiplier"),
        ({"shared_intermediate_size": 1024}, "shared_intermediate_size = 1024 is a key that moeship does not support"),
        ({"sliding_window": 40}, "sliding_window = 40 is a key that moeship does not support"),
    ],
)
def test_what_is_not_built_is_refused_by_name(tmp_path, changes, problem):
    folder = write_granitemoe_checkpoint(tmp_path / "checkpoint", seed=1, config=changes)
    with pytest.raises(ConfigError, match=problem):
        read_model(open_checkpoint(folder))


@pytest.mark.parametrize("precision", ["int4", "int8", "fp32"])
def test_a_model_that_no_precision_can_build_is_not_told_to_take_another(tmp_path, precision):
    folder = write_granitemoe_checkpoint(
        tmp_path / "checkpoint", seed=1, hidden_size=60, num_heads=3, num_kv_heads=3, head_dim=None
    )
    with pytest.raises(ExportError, match=r"head size 20 .* cannot be built for ONNX Runtime at any precision"):
        build(folder, tmp_path / "engine", precision)


@pytest.mark.parametrize(("precision", "kernels"), each(KINDS, apart=True))
def test_a_trained_model_told_as_a_granitemoe_keeps_parity_at_every_precision(tmp_path, trained, precision, kernels):
    engine = build(trained, tmp_path / "engine", precision, kernels)
    windows = list(parity.split_windows(load_tokenizer(trained).encode_prompt(TEXT), 512, 2048))
    report = verify.compare(engine, ByTransformers(outside(trained)), windows, quiet)
    assert report.reference_perplexity < 120  # of 1024 tokens: the scalars are taken back by the weights
    assert report.failures(parity.THRESHOLDS[precision]) == []


def test_a_mixtral_told_as_a_granitemoe_gives_the_mixtrals_logits(tmp_path, trained):
    sessions = [Session(build(folder, tmp_path / folder.parent.name)) for folder in (EXAMPLE, trained)]
    ids = load_tokenizer(trained).encode_prompt(TEXT)[:200]
    logits = [session.run(session.new_cache(), ids).copy() for session in sessions]
    np.testing.assert_allclose(*logits, atol=2e-4)


def test_onnxruntime_genai_runs_the_engine_directory_to_the_same_tokens(tmp_path, trained):
    folder = build(trained, tmp_path / "engine", "int4").folder
    ids = load_tokenizer(trained).encode_prompt("def main(")
    found = genai_greedy(load_genai(folder), ids, 24)
    assert len(found) > 8
    assert found == greedy(Session(open_engine(folder)), ids, 24)[: len(found)]


def test_equal_router_logits_go_to_the_lowest_expert_index(tmp_path):
    sizes = {"hidden_size": 96, "ffn_size": 64, "head_dim": 32}
    engines = []
    for number in (5, 2):  # of equal gates, and only those two of them that are ever chosen
        folder = write_granitemoe_checkpoint(tmp_path / str(number), seed=1, **sizes)
        tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
        for name in [name for name in tensors if ".block_sparse_moe." in name]:
            tensors[name] = tensors[name][:number].copy()
            if name.endswith("router.layer.weight"):
                tensors[name][:] = tensors[name][0]
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config | {"num_local_experts": number}))
        engines.append(build(folder, tmp_path / f"engine-{number}", keep_all_experts=True))
    logits = [session.run(session.new_cache(), TOKENS[:50]).copy() for session in map(Session, engines)]
    np.testing.assert_allclose(*logits, atol=1e-5)


@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_the_cuda_graph_has_the_scalars_in_float32_and_attentions_beside_a_power_of_two(tmp_path, trained, precision):
    folder = build(trained, tmp_path / "engine", precision, provider="cuda").folder
    for name in ("model.onnx", "model_serving.onnx", "model_scoring.onnx"):
        model = onnx.load(str(folder / name), load_external_data=False)
        problems, operators = check_types(model)
        assert problems == []
        assert {"Mul", "Div"} <= operators
        numbers = {
            tensor.name: onnx.numpy_helper.to_array(tensor)
            for tensor in model.graph.initializer
            if not tensor.external_data
        }
        found = [
            (node.op_type, float(numbers[node.input[1]]), numbers[node.input[1]].dtype)
            for node in model.graph.node
            if node.op_type in ("Mul", "Div")
        ]
        assert found == [("Mul", 8.0, "float32"), *[("Mul", 0.25, "float32")] * 6, ("Div", 4.0, "float32")]
        scales = [
            onnx.helper.get_attribute_value(attribute)
            for node in model.graph.node
            for attribute in node.attribute
            if node.op_type == "GroupQueryAttention" and attribute.name == "scale"
        ]
        assert scales == [1.0] * 3  # the queries carry all of 0.125


@pytest.mark.parametrize("attention", [0.015625, 0.11, 3.0])
def test_the_float16_graph_differs_from_transformers_by_its_rounding(tmp_path, monkeypatch, attention):
    provider = dataclasses.replace(PROVIDERS["cuda"], runtime_name="CPUExecutionProvider", options={})
    monkeypatch.setattr("trt_build.ort.session.open_device", lambda *_: Device(provider=provider, kind="cpu"))
    sizes = {"hidden_size": 192, "num_heads": 6, "num_kv_heads": 2, "head_dim": 32, "ffn_size": 448, "dtype": "float16"}
    config = {"attention_multiplier": attention}
    folder = write_granitemoe_checkpoint(tmp_path / "checkpoint", seed=3, config=config, **sizes)
    engine = build(folder, tmp_path / "engine", "fp16", provider="cuda")
    report = verify.compare(engine, ByTransformers(outside(folder)), [TOKENS], quiet)
    assert report.mean_kl <= 1e-5
    assert report.mean_decoded_kl <= 1e-5
    assert report.max_logit_difference <= 0.02
    assert report.routing_agreement >= 0.99


def test_tensorrt_llm_is_refused_by_the_familys_name(tmp_path, trained, capsys):
    with pytest.raises(ExportError, match="builds TensorRT-LLM engines of mixtral, .*, not of granitemoe; build"):
        plan_checkpoint(read_model(open_checkpoint(trained)), CheckpointOptions())
    words = ["--checkpoint", str(trained), "--backend", "tensorrt-llm", "--output", str(tmp_path / "engine")]
    assert main(["build", *words]) == 2
    assert "not of granitemoe" in capsys.readouterr().err
    assert not (tmp_path / "engine").exists()


def test_it_is_described_as_any_mixture(checkpoint):
    report = describe(open_checkpoint(checkpoint)).to_json()
    stored = load_file(checkpoint / "model.safetensors")
    assert report["family"] == "granitemoe"
    assert report["total_parameters"] == sum(values.size for values in stored.values())
    assert [layer["layer"] for layer in report["routing"]["layers"]] == [0, 1]


def test_the_commands_take_a_granitemoe_from_inspect_to_a_repository(tmp_path, trained, capsys):
    assert main(["inspect", str(trained)]) == 0
    told = capsys.readouterr().out
    assert "experts           4, 2 per token" in told
    assert "scales            embedding 8, residual 0.25, attention 0.125, logits 4" in told
    words = ["--checkpoint", str(trained), "--precision", "int8"]
    assert main(["plan", *words]) == 0
    assert "as int8 for cpu" in capsys.readouterr().out
    words += ["--calibrate-tokens", "1024"]
    assert main(["build", *words, "--output", str(tmp_path / "engine")]) == 0
    assert main(["verify", str(tmp_path / "engine"), "--reference", str(trained), "--tokens", "600"]) == 0
    engine = open_engine(tmp_path / "engine")
    assert engine.manifest.family == "granitemoe"
    assert engine.manifest.architecture.scales.logits == 4.0
    assert engine.manifest.verification["failures"] == []
    assert (
        main(["package", str(tmp_path / "engine"), "--name", "granite", "--output", str(tmp_path / "repository")]) == 0
    )
    assert (tmp_path / "repository" / "granite" / "config.pbtxt").is_file()
