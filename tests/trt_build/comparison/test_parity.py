"""The engine against transformers: equal where it must be, and caught where it is made wrong."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch
from checkpoints import write_phi_checkpoint, write_phixtral_checkpoint
from conftest import QUANTIZABLE
from decoding import KINDS, QUANTISED, each, genai_greedy, greedy, kinds_here, load_genai
from safetensors.numpy import load_file, save_file
from torch_reference import ByTransformers, load_reference
from transformers import PhiForCausalLM

from export.checkpoint.folder import open_checkpoint
from export.families import read_model
from export.tokenizer.loading import load_tokenizer
from trt_build.comparison import parity
from trt_build.comparison.evaluation_text import EvaluationText
from trt_build.ort import verify
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.engine import open_engine
from trt_build.ort.session import PREFILL_CHUNK_TOKENS, Session

# What the attention kernel takes at least, the rest odd.
ODD = {"hidden_size": 80, "num_heads": 5, "ffn_size": 56, "rotary_dim": 16}
TOKENS = np.random.default_rng(3).integers(0, 256, 600).tolist()
FP32 = parity.THRESHOLDS["fp32"]


def quiet(_text: str) -> None:
    pass


def text(content):
    return EvaluationText(names=("test",), content=content)


def reference_of(checkpoint):
    return load_reference(read_model(open_checkpoint(checkpoint)))


def by_transformers(checkpoint):
    return ByTransformers(reference_of(checkpoint))


def build(checkpoint, output, precision="fp32", kernels="onnxruntime"):
    return build_engine(BuildOptions(checkpoint=str(checkpoint), output=output, precision=precision, kernels=kernels))


def edited(source, folder, edit):
    """A copy of a checkpoint whose tensors and config went through `edit(tensors, config)`."""
    shutil.copytree(source, folder)
    tensors, config = load_file(folder / "model.safetensors"), json.loads((folder / "config.json").read_text())
    edit(tensors, config)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_fp32_engine_equals_the_reference_over_600_tokens_the_last_256_decoded_through_the_cache(
    tiny_checkpoint, tiny_engines
):
    report = verify.compare(open_engine(tiny_engines("fp32")), by_transformers(tiny_checkpoint), [TOKENS], quiet)

    assert (report.num_tokens, report.num_decoded_tokens) == (600, 256)
    assert report.max_logit_difference <= 1e-4
    assert report.max_decoded_difference <= 1e-4
    assert report.routing_agreement == 1.0
    assert report.failures(FP32) == []


@pytest.mark.parametrize("spelling", ["transformers", "phi-msft"])
def test_dense_phi_engine_equals_transformers_own_model(tmp_path, spelling):
    write_phi_checkpoint(tmp_path / "transformers", seed=5, spelling="transformers", **ODD)
    write_phi_checkpoint(tmp_path / "phi-msft", seed=5, spelling="phi-msft", **ODD)
    engine = build(tmp_path / spelling, tmp_path / "engine")
    outside = PhiForCausalLM.from_pretrained(tmp_path / "transformers", dtype=torch.float32).eval()

    report = verify.compare(engine, ByTransformers(outside), [TOKENS[:60]], quiet)

    assert report.failures(FP32) == []


@pytest.mark.parametrize("spelling", ["transformers", "phi-msft"])
def test_fewer_key_heads_than_query_heads_equal_transformers_own_model(tmp_path, spelling):
    sizes = {**ODD, "hidden_size": 96, "num_heads": 6, "num_kv_heads": 2}
    write_phi_checkpoint(tmp_path / "transformers", seed=6, spelling="transformers", **sizes)
    write_phi_checkpoint(tmp_path / "phi-msft", seed=6, spelling="phi-msft", **sizes)
    outside = PhiForCausalLM.from_pretrained(tmp_path / "transformers", dtype=torch.float32).eval()
    report = verify.compare(
        build(tmp_path / spelling, tmp_path / "engine"), ByTransformers(outside), [TOKENS[:60]], quiet
    )
    assert report.failures(FP32) == []


def test_mixture_of_equal_experts_equals_dense_phi(tmp_path):
    dense = write_phi_checkpoint(tmp_path / "dense", seed=8, spelling="phi-msft", **QUANTIZABLE)
    write_phi_checkpoint(tmp_path / "outside", seed=8, spelling="transformers", **QUANTIZABLE)

    def copy_expert(tensors, config):
        gates = np.random.default_rng(0)
        for name in [name for name in tensors if ".mlp." in name]:
            values = tensors.pop(name)
            for expert in range(4):
                tensors[name.replace(".mlp.", f".moe.mlp.{expert}.")] = values.copy()
        for layer in range(config["n_layer"]):
            gate = gates.standard_normal((4, config["n_embd"])).astype(np.float32)
            tensors[f"transformer.h.{layer}.moe.gate.weight"] = gate
        config.update(num_local_experts=4, num_experts_per_tok=2)

    mixture = edited(dense, tmp_path / "mixture", copy_expert)
    outside = PhiForCausalLM.from_pretrained(tmp_path / "outside", dtype=torch.float32).eval()

    report = verify.compare(build(mixture, tmp_path / "engine"), ByTransformers(outside), [TOKENS[:512]], quiet)
    assert report.failures(FP32) == []
    with torch.no_grad():
        ids = torch.tensor([TOKENS[:64]])
        difference = (reference_of(mixture)(ids).logits - outside(ids).logits).abs().max()
    assert difference <= 1e-5


def test_odd_sizes_fit_fp32(tmp_path):
    checkpoint = write_phixtral_checkpoint(tmp_path / "odd", seed=2, num_experts=3, experts_per_token=1, **ODD)
    report = verify.compare(build(checkpoint, tmp_path / "engine"), by_transformers(checkpoint), [TOKENS[:60]], quiet)
    assert report.failures(FP32) == []


def swap_two_experts(tensors, config):
    for module in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
        first, second = (f"transformer.h.1.moe.mlp.{e}.{module}" for e in (0, 3))
        tensors[first], tensors[second] = tensors[second].copy(), tensors[first].copy()


def negate_a_gate_row(tensors, config):
    tensors["transformer.h.2.moe.gate.weight"][1] *= -1


def turn_two_dimensions_less(tensors, config):
    config["rotary_dim"] -= 2


def swap_query_and_key(tensors, config):
    weight = tensors["transformer.h.0.mixer.Wqkv.weight"]
    hidden = config["n_embd"]
    tensors["transformer.h.0.mixer.Wqkv.weight"] = np.concatenate(
        [weight[hidden : 2 * hidden], weight[:hidden], weight[2 * hidden :]]
    )


def route_to_one_expert_less(tensors, config):
    config["num_experts_per_tok"] -= 1


@pytest.mark.parametrize(
    "fault",
    [swap_two_experts, negate_a_gate_row, turn_two_dimensions_less, swap_query_and_key, route_to_one_expert_less],
)
def test_a_seeded_fault_in_the_reference_is_caught(tmp_path, tiny_checkpoint, tiny_engines, fault):
    # The fault sits on the reference's side, where every fault can be expressed; parity is symmetric.
    faulty = reference_of(edited(tiny_checkpoint, tmp_path / "faulty", fault))
    report = verify.compare(open_engine(tiny_engines("fp32")), ByTransformers(faulty), [TOKENS[:128]], quiet)
    assert report.max_logit_difference > 1e-2
    assert report.failures(FP32)


@pytest.mark.parametrize("fault", [swap_two_experts, negate_a_gate_row])
def test_a_seeded_fault_in_the_engine_is_caught_at_every_precision(tmp_path, tiny_checkpoint, fault):
    wrong = edited(tiny_checkpoint, tmp_path / "wrong", fault)
    reference = reference_of(tiny_checkpoint)
    for precision, kernels in kinds_here():
        engine = build(wrong, tmp_path / f"{precision}-{kernels}", precision, kernels)
        report = verify.compare(engine, ByTransformers(reference), [TOKENS[:128]], quiet)
        assert report.failures(parity.THRESHOLDS[precision])


def test_erf_gelu_in_place_of_tanh_is_caught(tiny_checkpoint, tiny_engines, monkeypatch):
    gelu = torch.nn.functional.gelu
    monkeypatch.setattr(torch.nn.functional, "gelu", lambda x, approximate: gelu(x, approximate="none"))
    report = verify.compare(open_engine(tiny_engines("fp32")), by_transformers(tiny_checkpoint), [TOKENS[:128]], quiet)
    assert report.max_logit_difference > 1e-4
    assert report.failures(FP32)


@pytest.mark.parametrize(("precision", "kernels"), each(KINDS, apart=True))
def test_equal_router_logits_go_to_the_lowest_expert_index(tmp_path, tiny_checkpoint, precision, kernels):
    def tie_every_gate(tensors, config):
        for name in tensors:
            if name.endswith("gate.weight"):
                tensors[name][:] = tensors[name][0]

    def keep_the_first_two(tensors, config):
        for name in [name for name in tensors if ".moe.mlp." in name and int(name.split(".")[5]) > 1]:
            del tensors[name]
        for name in tensors:
            if name.endswith("gate.weight"):
                tensors[name] = np.tile(tensors[name][:1], (2, 1))
        config["num_local_experts"] = 2

    tied = build(edited(tiny_checkpoint, tmp_path / "tied", tie_every_gate), tmp_path / "a", precision, kernels)
    two = build(edited(tiny_checkpoint, tmp_path / "two", keep_the_first_two), tmp_path / "b", precision, kernels)

    found, expected = (Session(engine) for engine in (tied, two))
    np.testing.assert_allclose(
        found.run(found.new_cache(), TOKENS[:50]), expected.run(expected.new_cache(), TOKENS[:50]), atol=1e-5
    )


def test_greedy_text_is_that_of_transformers_generate(tiny_checkpoint, tiny_engines):
    prompts = np.random.default_rng(1).integers(0, 256, (8, 12))
    expected = reference_of(tiny_checkpoint).generate(
        torch.tensor(prompts), attention_mask=torch.ones(8, 12, dtype=torch.long), max_new_tokens=64,
        do_sample=False, eos_token_id=None, pad_token_id=0,
    )[:, 12:]  # fmt: skip
    session = Session(open_engine(tiny_engines("fp32")))
    assert [greedy(session, prompt, 64) for prompt in prompts.tolist()] == expected.tolist()


@pytest.mark.parametrize(("precision", "kernels"), each([KINDS[0], QUANTISED[1], QUANTISED[-1]], apart=True))
def test_onnxruntime_genai_runs_the_engine_directory_to_the_same_tokens(tiny_engines, precision, kernels):
    folder = tiny_engines(precision, kernels=kernels)
    session, model = Session(open_engine(folder)), load_genai(folder)
    for prompt in np.random.default_rng(9).integers(0, 256, (4, 10)).tolist():
        found = genai_greedy(model, prompt, 32)
        assert len(found) > 0
        assert found == greedy(session, prompt, 32)[: len(found)]


def test_perplexity_equals_that_of_transformers_loss(tiny_checkpoint, tiny_engines):
    with torch.no_grad():
        ids = torch.tensor([TOKENS[:200]])
        expected = float(torch.exp(reference_of(tiny_checkpoint)(ids, labels=ids).loss))
    found = verify.perplexity(open_engine(tiny_engines("fp32")), [TOKENS[:200]])
    assert found == pytest.approx(expected, rel=1e-5)


def test_verification_sees_positions_past_the_first_window_and_several_prefill_chunks(tiny_engines):
    engine = open_engine(tiny_engines("fp32"))
    [first, *rest] = verify._windows(engine, load_tokenizer(engine.folder), "a" * 2000, 1200)
    assert (len(first), [len(window) for window in rest]) == (640, [512, 48])
    assert len(first) // 2 > PREFILL_CHUNK_TOKENS


def test_a_rotary_table_that_is_wrong_at_late_positions_alone_is_caught(tmp_path, tiny_checkpoint, tiny_engines):
    engine = open_engine(shutil.copytree(tiny_engines("fp32"), tmp_path / "engine"))
    for name in ("model.onnx", "model_serving.onnx", "model_scoring.onnx"):
        model = onnx.load(str(engine.folder / name), load_external_data=False)
        [table] = [tensor for tensor in model.graph.initializer if tensor.name == "rotary/cos_cache"]
        values = onnx.numpy_helper.to_array(table).copy()
        values[600:] = 0
        table.CopyFrom(onnx.numpy_helper.from_array(values, table.name))
        (engine.folder / name).write_bytes(model.SerializeToString())
    found = verify.verify_engine(engine, str(tiny_checkpoint), text("Late positions count. " * 40), 2048, quiet)
    assert found.failures


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_a_serving_graph_that_is_wrong_by_itself_is_caught_when_quantised(
    tmp_path, tiny_checkpoint, tiny_engines, precision
):
    engine = open_engine(shutil.copytree(tiny_engines(precision), tmp_path / "engine"))
    reference = reference_of(tiny_checkpoint)
    sound = verify.compare(engine, ByTransformers(reference), [TOKENS[:128]], quiet)
    model = onnx.load(str(engine.folder / "model_serving.onnx"), load_external_data=False)
    [table] = [tensor for tensor in model.graph.initializer if tensor.name == "rotary/sin_cache"]
    table.CopyFrom(onnx.numpy_helper.from_array(-onnx.numpy_helper.to_array(table), table.name))
    (engine.folder / "model_serving.onnx").write_bytes(model.SerializeToString())

    wrong = verify.compare(engine, ByTransformers(reference), [TOKENS[:128]], quiet)

    assert wrong.mean_kl == sound.mean_kl  # the scoring graph is as it was
    limits = replace(parity.THRESHOLDS[precision], judged_tokens=128)
    assert any("decoded" in failure for failure in wrong.failures(limits))
    assert wrong.mean_decoded_kl > 2 * sound.mean_decoded_kl


def test_report_of_nan_fails_every_judged_figure():
    nan = float("nan")
    report = parity.ParityReport(
        num_tokens=1, num_decoded_tokens=1, max_logit_difference=nan, mean_logit_difference=nan,
        max_decoded_difference=nan, mean_kl=nan, p99_kl=nan, max_kl=nan, near_ties=0, clear_top1_agreement=nan,
        mean_decoded_kl=nan, top1_agreement=nan, engine_perplexity=nan, reference_perplexity=1.0,
        routing_agreement=nan, tied_routings=0,
    )  # fmt: skip
    assert len(report.failures(FP32)) == 6
