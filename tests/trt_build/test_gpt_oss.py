"""gpt_oss engines against transformers' GptOssForCausalLM: equal where they must be, caught where made wrong."""

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
from gpt_oss_checkpoints import SPELLINGS, gpt_oss_config, tell_mixtral_as_gpt_oss, write_gpt_oss_checkpoint
from mixtral_checkpoints import write_llama_tokenizer
from safetensors.numpy import load_file, save_file
from torch_reference import ByTransformers, load_reference
from transformers import GptOssConfig, GptOssForCausalLM, Mxfp4Config

from cli.main import main
from export.architecture import SwiGlu
from export.checkpoint.folder import open_checkpoint
from export.errors import ConfigError, ExportError
from export.families import gpt_oss, read_model
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
    """transformers' own reading of a checkpoint, MXFP4 dequantised by itself; its grouped kernels do not take odd
    widths."""
    packed = "quantization_config" in json.loads((checkpoint / "config.json").read_text())
    more = {"quantization_config": Mxfp4Config(dequantize=True)} if packed else {}
    return GptOssForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager", **more
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
    folder = tmp_path_factory.mktemp("gpt_oss") / "checkpoint"
    return write_gpt_oss_checkpoint(folder, seed=7, config={"swiglu_limit": 1.5})


@pytest.fixture(scope="module")
def engine(tmp_path_factory, checkpoint):
    return build(checkpoint, tmp_path_factory.mktemp("engine") / "fp32")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The trained example's weights in a gpt_oss."""
    return tell_mixtral_as_gpt_oss(EXAMPLE, tmp_path_factory.mktemp("trained") / "checkpoint")


def test_what_transformers_saves_gives_its_logits(tmp_path):
    config = GptOssConfig(
        vocab_size=371, hidden_size=96, intermediate_size=72, num_hidden_layers=3, num_attention_heads=6, head_dim=32,
        num_key_value_heads=3, num_local_experts=11, num_experts_per_tok=4, max_position_embeddings=400,
        sliding_window=40, initializer_range=0.15, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(5)
    model = GptOssForCausalLM(config).eval()
    with torch.no_grad():
        for name, values in model.named_parameters():
            if name.endswith("bias"):
                values.normal_(std=0.2)
    model.save_pretrained(tmp_path / "saved")
    write_llama_tokenizer(tmp_path / "saved")
    theirs = outside(tmp_path / "saved")
    expect_equal(build(tmp_path / "saved", tmp_path / "engine"), theirs, TOKENS)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(
    "sizes",
    [
        {"num_experts": 3, "experts_per_token": 1, "config": {"sliding_window": 1}},
        {"num_experts": 12, "experts_per_token": 8, "num_kv_heads": 1, "config": {"swiglu_alpha": 1.1}},
        {"num_heads": 5, "num_kv_heads": 5, "head_dim": 32, "tied": True, "config": {"swiglu_limit": 0.3}},
        {"dtype": "bfloat16", "num_experts": 7, "num_layers": 3, "config": {"layer_types": None}},
    ],
    ids=lambda sizes: " ".join(f"{key}={value}" for key, value in sizes.items()),
)
def test_fp32_engine_and_reference_equal_transformers_at_odd_sizes(tmp_path, sizes, spelling):
    odd = {"hidden_size": 80, "ffn_size": 37} if spelling == "floats" else {"hidden_size": 160, "ffn_size": 96}
    folder = write_gpt_oss_checkpoint(tmp_path / "checkpoint", seed=2, spelling=spelling, **odd, **sizes)
    theirs = outside(folder)
    expect_equal(build(folder, tmp_path / "engine"), theirs, TOKENS[:120])
    [(found, _)] = Reference(read_model(open_checkpoint(folder))).run([TOKENS[:120]])
    with torch.no_grad():
        expected = theirs(torch.tensor([TOKENS[:120]])).logits[0].numpy()
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_every_node_is_asked_for_sinks_biases_windows_and_constants(engine, checkpoint):
    scoring = read_graph(engine.folder, "model_scoring.onnx")
    assert graph_failures(engine, read_model(open_checkpoint(checkpoint)), scoring) == []
    nodes = [node for node in scoring.nodes if node.operator == "GroupQueryAttention"]
    assert [node.input(11) for node in nodes] == [f"model.layers.{layer}.self_attn.sinks" for layer in range(2)]
    assert [node.attributes["local_window_size"] for node in nodes] == [29, -1]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"swiglu_limit": 2.5}, "has swiglu_limit 1.5, expected 2.5"),
        ({"swiglu_alpha": 1.0}, "has activation_alpha 1.70"),
        ({"sliding_window": 11}, "has local_window_size 29, expected 11"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "has local_window_size"),
    ],
)
def test_a_fact_that_is_wrong_in_the_graph_is_told_and_shows_in_the_logits(
    tmp_path, engine, checkpoint, changes, problem
):
    faulty = write_gpt_oss_checkpoint(tmp_path / "faulty", seed=7, config={"swiglu_limit": 1.5, **changes})
    found = graph_failures(engine, read_model(open_checkpoint(faulty)), read_graph(engine.folder, "model_scoring.onnx"))
    assert found
    assert all(problem in failure for failure in found)
    assert verify.compare(engine, ByTransformers(outside(faulty)), [TOKENS[:64]], quiet).failures(FP32)


@pytest.mark.parametrize("ending", ["self_attn.sinks", "mlp.router.bias", "gate_up_proj_bias", "down_proj_bias",
                                    "self_attn.q_proj.bias", "self_attn.o_proj.bias"])  # fmt: skip
def test_each_sink_and_bias_counts(tmp_path, engine, checkpoint, ending):
    changed = tmp_path / "changed"
    changed.mkdir()
    for file in checkpoint.iterdir():
        (changed / file.name).write_bytes(file.read_bytes())
    tensors = load_file(checkpoint / "model.safetensors")
    for name in [name for name in tensors if name.endswith(ending)]:
        tensors[name] = tensors[name][::-1].copy()
    save_file(tensors, changed / "model.safetensors")
    assert verify.compare(engine, Reference(read_model(open_checkpoint(changed))), [TOKENS[:64]], quiet).failures(FP32)


def test_keys_that_are_absent_are_transformers_own(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    for key in (
        "rms_norm_eps", "rope_theta", "rope_scaling", "num_key_value_heads", "num_local_experts", "num_experts_per_tok",
        "experts_per_token", "sliding_window", "swiglu_limit", "layer_types", "head_dim", "attention_bias",
    ):  # fmt: skip
        del config[key]
    facts, defaults = gpt_oss.read_config(config | {"num_attention_heads": 8}), GptOssConfig()
    assert facts.norm_epsilon == defaults.rms_norm_eps == 1e-5
    assert facts.rope_base == defaults.rope_parameters["rope_theta"] == 150000
    assert facts.rotary_scaling.kind == defaults.rope_parameters["rope_type"] == "yarn"
    assert facts.rotary_scaling.truncate is defaults.rope_parameters["truncate"] is False
    assert (facts.num_experts, facts.experts_per_token) == (defaults.num_local_experts, defaults.num_experts_per_tok)
    assert (facts.num_kv_heads, facts.head_size) == (defaults.num_key_value_heads, defaults.head_dim)
    assert (facts.sliding_window, facts.full_layers) == (defaults.sliding_window, (1,))
    assert defaults.layer_types[:4] == ["sliding_attention", "full_attention"] * 2
    assert facts.swiglu == SwiGlu(alpha=defaults.swiglu_alpha, beta=1.0, limit=defaults.swiglu_limit)


@pytest.mark.parametrize(
    ("stated", "kind"),
    [
        ({"rope_parameters": {}}, "default"),
        ({"rope_parameters": None}, "yarn"),
        ({"rope_scaling": {}}, "yarn"),
        ({"rope_scaling": {}, "rope_parameters": {}}, "default"),
    ],
)
def test_a_rotary_embedding_that_is_stated_empty_is_read_as_by_transformers(tmp_path, stated, kind):
    folder = write_gpt_oss_checkpoint(tmp_path / "checkpoint", seed=3, config={"rope_scaling": None, **stated})
    theirs = outside(folder)
    assert theirs.config.rope_parameters["rope_type"] == kind
    [(found, _)] = Reference(read_model(open_checkpoint(folder))).run([TOKENS[:60]])
    with torch.no_grad():
        expected = theirs(torch.tensor([TOKENS[:60]])).logits[0].numpy()
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    scaling = read_model(open_checkpoint(folder)).architecture.rotary_scaling
    assert (None if scaling is None else scaling.kind) == (None if kind == "default" else kind)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"swiglu_limit": 0}, "swiglu_limit is 0, expected a positive"),
        ({"swiglu_limit": None}, "swiglu_limit is null"),
        ({"swiglu_alpha": "x"}, "swiglu_alpha is 'x', expected a positive"),
        ({"layer_types": ["sliding_attention"]}, r"layer_types is \['sliding_attention'\], expected"),
        ({"layer_types": ["sliding_attention", "linear_attention"]}, "expected sliding_attention or full_attention"),
        ({"layer_types": "full_attention"}, "layer_types is 'full_attention', expected"),
        ({"sliding_window": None}, "sliding_window is null"),
        ({"attention_bias": False}, "attention_bias is False; moeship builds only True"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; moeship builds only 'silu'"),
        ({"num_experts_per_tok": 6}, "num_experts_per_tok is 6, expected 1 to"),
        ({"shared_expert_intermediate_size": 9}, "shared_expert_intermediate_size = 9 is a key that moeship does not"),
        ({"quantization_config": {"quant_method": "quark"}}, "quantised by quark, which moeship does not read"),
    ],
)
def test_what_is_not_built_is_refused_by_name(tmp_path, changes, problem):
    folder = write_gpt_oss_checkpoint(tmp_path / "checkpoint", seed=1, config=changes)
    with pytest.raises(ConfigError, match=problem):
        read_model(open_checkpoint(folder))


@pytest.mark.parametrize(("precision", "kernels"), each(KINDS, apart=True))
def test_trained_weights_keep_parity_at_every_precision(tmp_path, trained, precision, kernels):
    engine = build(trained, tmp_path / "engine", precision, kernels)
    windows = list(parity.split_windows(load_tokenizer(trained).encode_prompt(TEXT), 256, 1024))
    report = verify.compare(engine, ByTransformers(outside(trained)), windows, quiet)
    assert report.failures(parity.THRESHOLDS[precision]) == []


def test_of_equal_router_logits_the_lowest_experts_are_chosen(tmp_path, checkpoint):
    """Equal rows with equal biases tie, whatever the input; with other biases they do not."""
    folder = write_gpt_oss_checkpoint(tmp_path / "checkpoint", seed=3, num_experts=4, experts_per_token=2)
    tensors = load_file(folder / "model.safetensors")
    for layer in range(2):
        tensors[f"model.layers.{layer}.mlp.router.weight"][:] = 0
        tensors[f"model.layers.{layer}.mlp.router.bias"][:] = (0.5, 1.0, 1.0, 1.0) if layer else 0
    save_file(tensors, folder / "model.safetensors")
    model = read_model(open_checkpoint(folder))
    assert [layer.never_chosen for layer in model.routing_report().layers] == [(2, 3), (3,)]
    engine = build(folder, tmp_path / "engine")
    assert engine.manifest.left_out_experts == {"0": (2, 3), "1": (3,)}
    expect_equal(engine, load_reference(model), TOKENS[:64])


@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_the_cuda_graph_has_sinks_and_biases_in_its_types(tmp_path, precision):
    sizes = {"hidden_size": 256, "num_heads": 4, "num_kv_heads": 2, "head_dim": 64, "ffn_size": 64}
    folder = write_gpt_oss_checkpoint(tmp_path / "checkpoint", seed=1, **sizes)
    engine = build(folder, tmp_path / "engine", precision, provider="cuda").folder
    for name in ("model.onnx", "model_serving.onnx", "model_scoring.onnx"):
        model = onnx.load(str(engine / name), load_external_data=False)
        problems, _ = check_types(model)
        assert problems == []


def test_the_float16_graph_differs_from_transformers_by_its_rounding(tmp_path, monkeypatch):
    provider = dataclasses.replace(PROVIDERS["cuda"], runtime_name="CPUExecutionProvider", options={})
    monkeypatch.setattr("trt_build.ort.session.open_device", lambda *_: Device(provider=provider, kind="cpu"))
    sizes = {"hidden_size": 192, "num_heads": 6, "num_kv_heads": 2, "ffn_size": 448, "dtype": "float16"}
    folder = write_gpt_oss_checkpoint(tmp_path / "checkpoint", seed=3, **sizes)
    engine = build(folder, tmp_path / "engine", "fp16", provider="cuda")
    report = verify.compare(engine, ByTransformers(outside(folder)), [TOKENS], quiet)
    assert report.mean_kl <= 1e-5
    assert report.mean_decoded_kl <= 1e-5
    assert report.max_logit_difference <= 0.02
    assert report.routing_agreement >= 0.99


def test_tensorrt_llm_is_refused_by_the_familys_name(checkpoint):
    with pytest.raises(ExportError, match="builds TensorRT-LLM engines of mixtral, .* not of gpt_oss; build for"):
        plan_checkpoint(read_model(open_checkpoint(checkpoint)), CheckpointOptions())


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_it_is_described_as_any_mixture(tmp_path, spelling):
    folder = write_gpt_oss_checkpoint(tmp_path / "checkpoint", seed=1, spelling=spelling)
    report = describe(open_checkpoint(folder)).to_json()
    theirs = outside(folder)
    assert report["family"] == "gpt_oss"
    assert report["total_parameters"] == sum(values.numel() for values in theirs.parameters())
    assert [layer["layer"] for layer in report["routing"]["layers"]] == [0, 1]


def test_the_published_config_is_read(tmp_path):
    """The keys of openai/gpt-oss-20b, with its sizes."""
    sizes = {
        "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 24, "num_attention_heads": 64,
        "num_key_value_heads": 8, "num_local_experts": 32, "num_experts_per_tok": 4, "vocab_size": 201088,
        "max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": False, "head_dim": 64,
        "hidden_act": "silu", "eos_token_id": 200002, "pad_token_id": 199999, "router_aux_loss_coef": 0.9,
    }  # fmt: skip
    facts = gpt_oss.read_config(gpt_oss_config(sizes) | {"sliding_window": 128})
    assert (facts.head_size, facts.qkv_rows) == (64, (4096, 512, 512))
    assert facts.full_layers == tuple(range(1, 24, 2))
    assert (facts.window(0), facts.window(1)) == (128, None)


def test_the_commands_take_a_gpt_oss_from_inspect_to_a_repository(tmp_path, capsys):
    trained = tell_mixtral_as_gpt_oss(EXAMPLE, tmp_path / "checkpoint", "mxfp4")
    assert main(["inspect", str(trained)]) == 0
    told = capsys.readouterr().out
    assert "experts           4, 2 per token" in told
    assert "sliding window    96, in " in told
    assert "activation        gate * sigmoid(1 * gate) * (up + 1), gate and up limited by 6" in told
    words = ["--checkpoint", str(trained), "--precision", "int8", "--kv", "int8"]
    assert main(["plan", *words]) == 0
    assert "as int8 for cpu" in capsys.readouterr().out
    assert main(["build", *words, "--output", str(tmp_path / "engine")]) == 0
    assert main(["verify", str(tmp_path / "engine"), "--reference", str(trained), "--tokens", "600"]) == 0
    engine = open_engine(tmp_path / "engine")
    assert engine.manifest.architecture.swiglu == SwiGlu(alpha=1.0, beta=1.0, limit=6.0)
    assert engine.manifest.verification["failures"] == []
    assert main(["package", str(tmp_path / "engine"), "--name", "o", "--output", str(tmp_path / "repository")]) == 0
    assert (tmp_path / "repository" / "o" / "config.pbtxt").is_file()
