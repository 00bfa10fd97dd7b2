"""phimoe engines against transformers' PhimoeForCausalLM: equal where they must be, caught where made wrong."""

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
from phimoe_checkpoints import BIASES, longrope, tell_mixtral_as_phimoe, write_phimoe_checkpoint
from safetensors.numpy import load_file, save_file
from torch_reference import ByTransformers
from transformers import AutoTokenizer, PhimoeConfig, PhimoeForCausalLM

from cli.main import main
from export.architecture import Router
from export.checkpoint.folder import open_checkpoint
from export.errors import ConfigError, ExportError
from export.families import phimoe, read_model
from export.inspection import describe
from export.provider import PROVIDERS
from export.reference.model import Reference
from export.tokenizer.chat_template import ChatTemplate
from export.tokenizer.loading import load_tokenizer
from export.tokenizer.settings import read_settings
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
    return PhimoeForCausalLM.from_pretrained(
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
    folder = tmp_path_factory.mktemp("phimoe") / "checkpoint"
    return write_phimoe_checkpoint(folder, seed=7, config={"rope_scaling": longrope(8, original=300)})


@pytest.fixture(scope="module")
def engine(tmp_path_factory, checkpoint):
    return build(checkpoint, tmp_path_factory.mktemp("engine") / "fp32")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The trained example's weights in a phimoe."""
    return tell_mixtral_as_phimoe(EXAMPLE, tmp_path_factory.mktemp("trained") / "checkpoint")


@pytest.mark.parametrize("published", [True, False])
def test_what_transformers_saves_in_either_spelling_gives_its_logits(tmp_path, published):
    config = PhimoeConfig(
        vocab_size=371, hidden_size=96, intermediate_size=72, num_hidden_layers=2, num_attention_heads=6,
        num_key_value_heads=3, num_local_experts=11, max_position_embeddings=400, router_jitter_noise=0.2,
        initializer_range=0.15, rope_parameters={"rope_type": "default", "rope_theta": 20000.0}, eos_token_id=2,
        **BIASES,
    )  # fmt: skip
    torch.manual_seed(5)
    model = PhimoeForCausalLM(config).eval()
    for name, values in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(values, std=0.2)
    model.save_pretrained(tmp_path / "saved", save_original_format=published)
    write_llama_tokenizer(tmp_path / "saved")
    names = load_file(tmp_path / "saved" / "model.safetensors")
    assert ("model.layers.1.block_sparse_moe.experts.3.w1.weight" in names) is published
    assert ("model.layers.1.mlp.experts.gate_up_proj" in names) is not published
    expect_equal(build(tmp_path / "saved", tmp_path / "engine"), model, TOKENS)


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize(
    "sizes",
    [
        {"num_experts": 3, "ffn_size": 37, "config": {"router_jitter_noise": 0.01}},
        {"num_experts": 12, "num_kv_heads": 1, "config": {"attention_bias": False, "router_jitter_noise": 2.0}},
        {"num_heads": 5, "num_kv_heads": 5, "hidden_size": 80, "tied": True, "config": {"sliding_window": 9}},
        {"dtype": "bfloat16", "num_experts": 2, "num_layers": 3, "config": {"lm_head_bias": False}},
    ],
    ids=lambda sizes: " ".join(f"{key}={value}" for key, value in sizes.items()),
)
def test_fp32_engine_and_reference_equal_transformers_at_odd_sizes(tmp_path, sizes, spelling):
    folder = write_phimoe_checkpoint(tmp_path / "checkpoint", seed=2, spelling=spelling, **sizes)
    theirs = outside(folder)
    expect_equal(build(folder, tmp_path / "engine"), theirs, TOKENS[:120])
    [(found, _)] = Reference(read_model(open_checkpoint(folder))).run([TOKENS[:120]])
    with torch.no_grad():
        expected = theirs(torch.tensor([TOKENS[:120]])).logits[0].numpy()
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()


def test_longrope_has_the_models_own_factor(engine, checkpoint):
    assert engine.manifest.architecture.rotary_scaling.attention_factor == 1.24
    assert engine.manifest.max_sequence == 300
    expect_equal(engine, outside(checkpoint), TOKENS)


def test_of_equal_router_logits_the_lowest_experts_are_chosen(tmp_path, checkpoint):
    tensors = load_file(checkpoint / "model.safetensors")
    for name in tensors:
        if name.endswith(".gate.weight"):
            tensors[name][:] = 0
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    for file in checkpoint.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    save_file(tensors, folder / "model.safetensors")
    expect_equal(build(folder, tmp_path / "engine"), outside(folder), TOKENS[:40])


def test_every_node_is_asked_for_norms_biases_and_router(engine, checkpoint):
    scoring = read_graph(engine.folder, "model_scoring.onnx")
    assert graph_failures(engine, read_model(open_checkpoint(checkpoint)), scoring) == []


def test_another_jitter_than_the_graphs_is_told_and_shows_in_the_logits(tmp_path, engine):
    config = {"rope_scaling": longrope(8, original=300), "router_jitter_noise": 0.2}
    faulty = write_phimoe_checkpoint(tmp_path / "faulty", seed=7, config=config)
    found = graph_failures(engine, read_model(open_checkpoint(faulty)), read_graph(engine.folder, "model_scoring.onnx"))
    assert found
    assert all("sparse mixers compare with" in failure for failure in found)
    assert verify.compare(engine, ByTransformers(outside(faulty)), [TOKENS[:64]], quiet).failures(FP32)


def test_keys_that_are_absent_are_transformers_own(checkpoint):
    config = json.loads((checkpoint / "config.json").read_text())
    for key in ("rms_norm_eps", "rope_theta", "rope_scaling", "num_key_value_heads", "num_local_experts", *BIASES):
        del config[key]
    del config["router_jitter_noise"], config["num_experts_per_tok"]
    facts, defaults = phimoe.read_config({**config, "num_attention_heads": 8}), PhimoeConfig()
    assert facts.norm_epsilon == defaults.rms_norm_eps == 1e-5
    assert facts.rope_base == defaults.default_theta == 1e6
    assert (facts.num_experts, facts.experts_per_token) == (defaults.num_local_experts, defaults.num_experts_per_tok)
    assert facts.num_kv_heads == defaults.num_key_value_heads
    assert facts.router == Router(score="sparse_mixer", normalise=False, jitter=defaults.router_jitter_noise)
    assert (facts.attention_bias, facts.head_bias) == (defaults.attention_bias, defaults.lm_head_bias)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"router_jitter_noise": 0}, "router_jitter_noise is 0, expected a positive"),
        ({"num_experts_per_tok": 3}, "num_experts_per_tok is 3; moeship builds only 2"),
        ({"attention_bias": 3}, "attention_bias is 3; moeship builds only False or True"),
        ({"lm_head_bias": "yes"}, "lm_head_bias is 'yes'; moeship builds only False or True"),
        (
            {"rope_scaling": {"type": "linear", "factor": 2.0}},
            r"(?<!_)type is 'linear'; moeship builds longrope and none",
        ),
        (
            {"rope_scaling": longrope(8, original=300) | {"long_mscale": 1.3}},
            "short_mscale is 1.24 and long_mscale is 1.3; moeship builds equal numbers",
        ),
        (
            {"rope_scaling": longrope(8, original=300) | {"short_mscale": "a", "long_mscale": "a"}},
            "attention_factor is",
        ),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'; moeship builds only 'silu'"),
    ],
)
def test_what_is_not_built_is_refused_by_name(tmp_path, changes, problem):
    folder = write_phimoe_checkpoint(tmp_path / "checkpoint", seed=1, config=changes)
    with pytest.raises(ConfigError, match=problem):
        read_model(open_checkpoint(folder))


def test_another_number_of_experts_a_token_is_refused(checkpoint):
    with pytest.raises(ConfigError, match="found 1, expected 2, the number of experts that the sparse mixer of phimoe"):
        read_model(open_checkpoint(checkpoint), 1)
    assert read_model(open_checkpoint(checkpoint), 2).architecture.experts_per_token == 2


@pytest.mark.parametrize(("precision", "kernels"), each(KINDS, apart=True))
def test_trained_weights_keep_parity_at_every_precision(tmp_path, trained, precision, kernels):
    engine = build(trained, tmp_path / "engine", precision, kernels)
    windows = list(parity.split_windows(load_tokenizer(trained).encode_prompt(TEXT), 256, 1024))
    report = verify.compare(engine, ByTransformers(outside(trained)), windows, quiet)
    assert report.failures(parity.THRESHOLDS[precision]) == []


@pytest.mark.parametrize("precision", ["fp16", "int4"])
def test_the_cuda_graph_mixes_in_float32(tmp_path, precision):
    sizes = {"hidden_size": 256, "num_heads": 4, "num_kv_heads": 2, "ffn_size": 64}
    folder = write_phimoe_checkpoint(tmp_path / "checkpoint", seed=1, **sizes)
    engine = build(folder, tmp_path / "engine", precision, provider="cuda").folder
    for name in ("model.onnx", "model_serving.onnx", "model_scoring.onnx"):
        problems, operators = check_types(onnx.load(str(engine / name), load_external_data=False))
        assert problems == []
        assert {"TopK", "Greater", "Where", "LayerNormalization"} <= operators


def test_the_float16_graph_differs_from_transformers_by_its_rounding(tmp_path, monkeypatch):
    provider = dataclasses.replace(PROVIDERS["cuda"], runtime_name="CPUExecutionProvider", options={})
    monkeypatch.setattr("trt_build.ort.session.open_device", lambda *_: Device(provider=provider, kind="cpu"))
    sizes = {"hidden_size": 192, "num_heads": 6, "num_kv_heads": 2, "ffn_size": 448, "dtype": "float16"}
    # Few logits are so near that rounding decides which side of the limit they are on.
    folder = write_phimoe_checkpoint(tmp_path / "checkpoint", seed=3, config={"router_jitter_noise": 0.01}, **sizes)
    engine = build(folder, tmp_path / "engine", "fp16", provider="cuda")
    report = verify.compare(engine, ByTransformers(outside(folder)), [TOKENS], quiet)
    assert report.mean_kl <= 1e-5
    assert report.mean_decoded_kl <= 1e-5
    assert report.max_logit_difference <= 0.02
    assert report.routing_agreement >= 0.99


def test_tensorrt_llm_is_refused_by_the_familys_name(checkpoint):
    with pytest.raises(ExportError, match="builds TensorRT-LLM engines of mixtral, .*, not of phimoe; build"):
        plan_checkpoint(read_model(open_checkpoint(checkpoint)), CheckpointOptions())


def test_it_is_described_as_any_mixture(checkpoint):
    report = describe(open_checkpoint(checkpoint)).to_json()
    stored = load_file(checkpoint / "model.safetensors")
    assert report["family"] == "phimoe"
    assert report["total_parameters"] == sum(values.size for values in stored.values())
    assert [layer["layer"] for layer in report["routing"]["layers"]] == [0, 1]


# As the published model has it: turns that end with a special token of their own, and no text of the system's if empty.
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'system' and message['content'] %}"
    "{{'<|system|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'user' %}"
    "{{'<|user|>\n' + message['content'] + '<|end|>\n'}}{% elif message['role'] == 'assistant' %}"
    "{{'<|assistant|>\n' + message['content'] + '<|end|>\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)


def test_the_tokenizer_and_the_chat_template_are_transformers(checkpoint):
    path = checkpoint / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": TEMPLATE}))
    theirs, facts = (
        AutoTokenizer.from_pretrained(checkpoint),
        read_settings(checkpoint, json.loads((checkpoint / "config.json").read_text())).facts,
    )
    assert load_tokenizer(checkpoint).encode_prompt(" the fox</s> x") == theirs(" the fox</s> x")["input_ids"]
    template = ChatTemplate(facts.chat_templates["default"], facts.special_tokens)
    for system in ("", "Be brief."):
        chat = [{"role": "system", "content": system}, {"role": "user", "content": " 2+2?"}]
        for answers in (True, False):
            rule = {"add_generation_prompt": answers, "continue_final_message": not answers}
            assert template.render(chat, **rule) == theirs.apply_chat_template(chat, tokenize=False, **rule)


def test_the_commands_take_a_phimoe_from_inspect_to_a_repository(tmp_path, trained, capsys):
    assert main(["inspect", str(trained)]) == 0
    assert "experts           4, 2 per token" in capsys.readouterr().out
    words = ["--checkpoint", str(trained), "--precision", "int8", "--kernels", "onnxruntime", "--kv", "int8"]
    assert main(["plan", *words]) == 0
    assert "as int8 for cpu" in capsys.readouterr().out
    words += ["--calibrate-tokens", "1024"]
    assert main(["build", *words, "--output", str(tmp_path / "engine")]) == 0
    assert main(["verify", str(tmp_path / "engine"), "--reference", str(trained), "--tokens", "600"]) == 0
    assert open_engine(tmp_path / "engine").manifest.verification["failures"] == []
    assert main(["package", str(tmp_path / "engine"), "--name", "p", "--output", str(tmp_path / "repository")]) == 0
    assert (tmp_path / "repository" / "p" / "config.pbtxt").is_file()
