"""What families may do that none of moeship's own does yet, each with a family that lives in this file alone: layers
that differ, queries with a matrix of their own, other routers, and prompts in batches."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from checkpoints import write_phixtral_checkpoint
from decoding import each
from mixtral_checkpoints import write_mixtral_checkpoint
from safetensors.numpy import load_file, save_file
from torch import nn
from torch_reference import ByTransformers, load_reference
from transformers import MixtralForCausalLM
from transformers_models import TRANSFORMERS_MODELS

from ci.kill_builds import compare
from export.architecture import Router
from export.checkpoint.folder import open_checkpoint
from export.checkpoint.tensor_table import Role, single
from export.errors import ExportError
from export.families import families, mixtral, phixtral, read_model
from export.families.dense import phi
from export.families.shared import llama_stack, phi_stack
from trt_build.comparison import parity
from trt_build.comparison.evaluation_text import EvaluationText
from trt_build.manifest import digested_text
from trt_build.ort import kernels, verify
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.engine import open_engine

TOKENS = np.random.default_rng(3).integers(0, 250, 60).tolist()
FP32 = parity.THRESHOLDS["fp32"]


def build(checkpoint, output, precision="fp32", **options):
    return build_engine(BuildOptions(checkpoint=str(checkpoint), output=output, precision=precision, **options))


def outside(checkpoint):
    return MixtralForCausalLM.from_pretrained(
        checkpoint, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager"
    ).eval()


@pytest.fixture
def family(monkeypatch):
    """Makes a family of this file one that moeship knows."""

    def known(record):
        everything = (*families(), record)
        monkeypatch.setattr("export.families.families", lambda: everything)

    return known


def failures(engine, reference, window=TOKENS, limits=FP32):
    return verify.compare(engine, ByTransformers(reference), [window], lambda _: None).failures(limits)


# A phixtral whose first layer has one MLP.


def first_layer_dense(folder, **sizes):
    write_phixtral_checkpoint(folder, seed=4, num_experts=3, experts_per_token=2, **sizes)
    tensors = load_file(folder / "model.safetensors")
    moe = "transformer.h.0.moe."
    kept = {
        name.replace(f"{moe}mlp.0.", "transformer.h.0.mlp."): values
        for name, values in tensors.items()
        if not name.startswith(moe) or name.startswith(f"{moe}mlp.0.")
    }
    save_file(kept, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mixed"}))
    return folder


MIXED = dataclasses.replace(
    phixtral.FAMILY,
    name="mixed",
    matches=lambda raw: raw["model_type"] == "mixed",
    read_config=lambda raw: dataclasses.replace(phi_stack.read_msft_config(raw, "mixed"), dense_layers=(0,)),
    tensors=lambda facts, _: phi_stack.stack_tensors(
        facts, lambda facts, layer: (phixtral.moe_tensors if layer else phi.mlp_tensors)(facts, layer)
    ),
    decoder=lambda graph, facts: phi_stack.stack_graph(
        graph, facts, lambda graph, layer, x: (phixtral._moe if layer else phi._mlp)(graph, layer, x)
    ),
    trtllm=None,
)


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_a_layer_may_have_an_mlp_where_the_others_have_experts(tmp_path, monkeypatch, family, precision):
    family(MIXED)
    monkeypatch.setitem(TRANSFORMERS_MODELS, MIXED.name, TRANSFORMERS_MODELS["phixtral"])
    sizes = {"hidden_size": 128, "num_heads": 4, "rotary_dim": 16, "ffn_size": 128}
    folder = first_layer_dense(tmp_path / "checkpoint", **sizes)
    model = read_model(open_checkpoint(folder))
    gates = model.gates()
    assert sorted(gates) == [1, 2]
    stored = load_file(folder / "model.safetensors")
    assert np.array_equal(gates[2], stored["transformer.h.2.moe.gate.weight"])
    engine = build(folder, tmp_path / "engine", precision)
    report = verify.compare(engine, ByTransformers(load_reference(model)), [TOKENS], lambda _: None)
    assert report.routing_agreement >= (1.0 if precision == "fp32" else 0.7)
    if precision == "fp32":
        assert report.failures(FP32) == []
    assert [layer["layer"] for layer in open_engine(engine.folder).manifest.routing["layers"]] == [1, 2]


# A Mixtral whose second layer alone looks back on a window.


def windowed_graph(graph, facts):
    attention = graph.attention
    graph.attention = lambda *args, window, **parts: attention(*args, window=8 if args[2] == 1 else None, **parts)
    return llama_stack.stack_graph(graph, facts)


def test_a_layer_may_look_back_on_a_window_of_its_own(tmp_path, family):
    family(
        dataclasses.replace(
            mixtral.FAMILY, name="windowed", matches=lambda raw: raw.get("pad_token_id") == 3, decoder=windowed_graph,
            read_config=lambda raw: dataclasses.replace(mixtral.read_config(raw), family="windowed"),
        )
    )  # fmt: skip
    folder = write_mixtral_checkpoint(
        tmp_path / "checkpoint", seed=2, config={"pad_token_id": 3, "model_type": "windowed"}
    )
    engine = build(folder, tmp_path / "engine")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mixtral"}))
    reference = outside(folder)

    def look_back_on_eight(_layer, args, kwargs):
        length = args[0].shape[1]
        distance = torch.arange(length)[:, None] - torch.arange(length)[None, :]
        seen = (distance >= 0) & (distance < 8)
        kwargs["attention_mask"] = torch.where(seen, 0.0, torch.finfo(torch.float32).min)[None, None]
        return args, kwargs

    assert failures(engine, reference)
    reference.model.layers[1].register_forward_pre_hook(look_back_on_eight, with_kwargs=True)
    assert failures(engine, reference) == []


# A Mixtral whose queries, keys and values are three products.


def apart_tensors(facts, names):
    for spec in mixtral.tensors(facts, names):
        if spec.name.endswith("qkv_proj.weight"):
            for part in spec.parts:
                yield single(part.name, part.shape, "ND H", Role.ATTENTION)
        else:
            yield spec


def apart_graph(graph, facts):
    def three(x, path):
        stem = path.removesuffix(".qkv_proj")
        return graph.query(x, f"{stem}.q_proj"), *(graph.linear(x, f"{stem}.{letter}_proj") for letter in "kv")

    # `query` is made of `query_key_value`, which the stack is given another of.
    attention, graph.query = graph.attention, graph.query_key_value
    graph.query_key_value = three
    graph.attention = lambda parts, path, layer, *, window, **_: attention(
        parts[0], path, layer, window=window, key=parts[1], value=parts[2]
    )
    return llama_stack.stack_graph(graph, facts)


APART = dataclasses.replace(
    mixtral.FAMILY,
    name="apart",
    matches=lambda raw: raw.get("model_type") == "apart",
    read_config=lambda raw: dataclasses.replace(mixtral.read_config(raw), family="apart"),
    tensors=lambda facts, names: list(apart_tensors(facts, names)),
    decoder=apart_graph,
)


@pytest.mark.parametrize("precision", ["fp32", "int4"])
def test_queries_keys_and_values_may_have_matrices_of_their_own(tmp_path, family, precision):
    family(APART)
    sizes = {"hidden_size": 128, "num_heads": 4, "ffn_size": 64, "head_dim": 32}
    folder = write_mixtral_checkpoint(tmp_path / "checkpoint", seed=2, config={"sliding_window": 30}, **sizes)
    together = build(folder, tmp_path / "together", precision)
    reference = outside(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "apart"}))
    apart = build(folder, tmp_path / "apart", precision)
    node = next(
        node
        for node in onnx.load(str(apart.folder / "model.onnx"), load_external_data=False).graph.node
        if node.op_type == "GroupQueryAttention"
    )
    assert all(node.input[:3])
    if precision == "fp32":
        assert failures(apart, reference) == []
    logits = [verify.ScoringSession(engine).run(TOKENS)[0] for engine in (together, apart)]
    np.testing.assert_allclose(*logits, atol=1e-4)


def test_a_float16_graph_scales_queries_that_are_alone_too(tmp_path, family):
    family(APART)
    sizes = {"hidden_size": 128, "num_heads": 4, "ffn_size": 64, "head_dim": 32}
    folder = write_mixtral_checkpoint(tmp_path / "checkpoint", seed=2, config={"model_type": "apart"}, **sizes)
    engine = build(folder, tmp_path / "engine", "fp16", provider="cuda")
    model = onnx.load(str(engine.folder / "model.onnx"))
    tensors = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    stored = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.{}_proj.weight"
    # 1/sqrt(32) is nearest to 2^-2 (in log2, -2.5 is rounded to even), and attention's scale is what is left.
    assert np.array_equal(tensors[name.format("q")], (stored[name.format("q")] / 4).astype(np.float16))
    assert np.array_equal(tensors[name.format("k")], stored[name.format("k")].astype(np.float16))
    scales = [
        onnx.helper.get_attribute_value(attribute)
        for node in model.graph.node
        for attribute in node.attribute
        if attribute.name == "scale"
    ]
    np.testing.assert_allclose(scales, 4 / np.sqrt(32), rtol=1e-6)


# Other routers than a softmax over the chosen.


def with_router(router):
    return dataclasses.replace(
        mixtral.FAMILY, name="routed", matches=lambda raw: raw.get("model_type") == "routed",
        read_config=lambda raw: dataclasses.replace(mixtral.read_config(raw), family="routed", router=router),
    )  # fmt: skip


class ByHand(nn.Module):
    """Shares of the softmax over all experts, as they are, times a scale."""

    def __init__(self, gate, scale):
        super().__init__()
        self.weight, self.top_k, self.scale = gate.weight, gate.top_k, scale

    def forward(self, x):
        logits = x.reshape(-1, x.shape[-1]) @ self.weight.T
        shares, chosen = torch.softmax(logits, dim=-1).topk(self.top_k, dim=-1)
        return logits, shares * self.scale, chosen


@pytest.mark.parametrize(
    ("precision", "kernels"),
    each([("fp32", "onnxruntime"), ("int8", "onnxruntime"), ("int8", "moeship")], apart=True),
)
def test_a_router_may_weigh_by_the_softmax_over_all_experts_times_a_scale(tmp_path, family, precision, kernels):
    family(with_router(Router(normalise=False, scale=2.5)))
    sizes = {"hidden_size": 128, "num_heads": 4, "ffn_size": 64, "head_dim": 32}
    folder = write_mixtral_checkpoint(tmp_path / "checkpoint", seed=2, **sizes)
    reference = outside(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "routed"}))
    engine = build(folder, tmp_path / "engine", precision, kernels=kernels)
    plain = verify.compare(engine, ByTransformers(reference), [TOKENS], lambda _: None)
    for layer in reference.model.layers:
        layer.mlp.gate = ByHand(layer.mlp.gate, 2.5)
    report = verify.compare(engine, ByTransformers(reference), [TOKENS], lambda _: None)
    if precision == "fp32":
        assert report.failures(FP32) == []
    assert report.mean_kl < plain.mean_kl / (20 if precision == "fp32" else 3)  # int8 chooses others now and then
    assert open_engine(engine.folder).manifest.architecture.router == Router(normalise=False, scale=2.5)


@pytest.mark.parametrize(
    ("router", "options", "problem"),
    [
        (Router(score="sigmoid"), {}, "its router's score is sigmoid, and these kernels have only softmax"),
        (Router(groups=2), {}, "its router's groups is 2, and these kernels have only 1"),
        (Router(bias=True), {}, "its router's bias is True, and these kernels have only False"),
    ],
)
def test_a_router_that_no_kernel_has_is_refused_by_what_it_lacks(tmp_path, family, router, options, problem):
    family(with_router(router))
    sizes = {"hidden_size": 128, "num_heads": 4, "ffn_size": 64, "head_dim": 32}
    folder = write_mixtral_checkpoint(tmp_path / "checkpoint", seed=2, config={"model_type": "routed"}, **sizes)
    with pytest.raises(ExportError, match=rf"planning model.layers.0.mlp: {problem}"):
        build(folder, tmp_path / "engine", **options)


def with_activation(activation):
    def decoder(graph, facts):
        experts = graph.experts
        graph.experts = lambda x, **names: experts(x, **{**names, "activation": activation})
        return llama_stack.stack_graph(graph, facts)

    return decoder


def test_the_kernels_that_nobody_names_are_those_that_have_the_activation(tmp_path, family, monkeypatch, caplog):
    monkeypatch.setattr(kernels, "found_fault", lambda: None)
    family(dataclasses.replace(with_router(Router()), decoder=with_activation("relu")))
    sizes = {"hidden_size": 128, "num_heads": 4, "ffn_size": 64, "head_dim": 32}
    folder = write_mixtral_checkpoint(tmp_path / "checkpoint", seed=2, config={"model_type": "routed"}, **sizes)
    engine = build(folder, tmp_path / "engine", "int8")
    assert engine.manifest.kernels == "onnxruntime"
    assert [line for line in caplog.messages if "activation is relu, and these kernels have only gelu" in line]
    compare(engine.folder, build(folder, tmp_path / "named", "int8", kernels="onnxruntime").folder)


@pytest.mark.parametrize(
    ("activation", "options", "problem"),
    [
        ("relu", {"kernels": "moeship"}, "experts' activation is relu, and these kernels have only gelu and silu"),
        ("tanh", {"kernels": "onnxruntime"}, "experts' activation is tanh, and these kernels have only relu"),
        ("tanh", {}, "experts' activation is tanh, and these kernels have only relu"),
    ],
)
def test_an_activation_that_the_kernels_lack_is_refused(tmp_path, family, activation, options, problem):
    family(dataclasses.replace(with_router(Router()), decoder=with_activation(activation)))
    sizes = {"hidden_size": 128, "num_heads": 4, "ffn_size": 64, "head_dim": 32}
    folder = write_mixtral_checkpoint(tmp_path / "checkpoint", seed=2, config={"model_type": "routed"}, **sizes)
    with pytest.raises(ExportError, match=rf"planning model.layers.0.mlp: its {problem}"):
        build(folder, tmp_path / "engine", "int4", **options)


# Batches.


@pytest.mark.parametrize("name", ["model.onnx", "model_scoring.onnx"])
@pytest.mark.parametrize("kind", ["phixtral", "mixtral"])
def test_a_batch_of_prompts_gives_what_each_gives_alone(tmp_path, kind, name):
    folder = tmp_path / "checkpoint"
    if kind == "phixtral":
        sizes = {"hidden_size": 128, "num_heads": 4, "rotary_dim": 16, "ffn_size": 128}
        write_phixtral_checkpoint(folder, seed=1, num_experts=3, experts_per_token=2, **sizes)
    else:
        write_mixtral_checkpoint(folder, seed=1, config={"sliding_window": 12})
    engine = build(folder, tmp_path / "engine")
    facts = engine.manifest.architecture
    session = onnxruntime.InferenceSession(str(engine.folder / name), providers=["CPUExecutionProvider"])
    outputs = [output.name for output in session.get_outputs()]

    def run(ids, past):
        length = past[0].shape[2] + ids.shape[1]
        feeds = {"input_ids": ids, "attention_mask": np.ones((len(ids), length), dtype=np.int64)}
        for layer in range(facts.num_layers):
            for half, kept in zip(("key", "value"), past[2 * layer : 2 * layer + 2], strict=True):
                feeds[f"past_key_values.{layer}.{half}"] = kept
        found = dict(zip(outputs, session.run(None, feeds), strict=True))
        present = [found[f"present.{layer}.{half}"] for layer in range(facts.num_layers) for half in ("key", "value")]
        return found["logits"], present

    def prefill_and_decode(ids):
        empty = np.zeros((len(ids), facts.num_kv_heads, 0, facts.head_size), dtype=np.float32)
        logits, past = run(ids[:, :-1], [empty] * (2 * facts.num_layers))
        return logits, run(ids[:, -1:], past)[0]

    ids = np.random.default_rng(5).integers(0, 250, (3, 20))
    together = prefill_and_decode(ids)
    alone = [prefill_and_decode(ids[row : row + 1]) for row in range(3)]
    for step in range(2):
        np.testing.assert_allclose(together[step], np.concatenate([logits[step] for logits in alone]), atol=2e-5)


# Engines that were built before there were such facts.


def test_an_engine_json_without_scales_router_and_dense_layers_is_of_a_plain_model(tmp_path):
    folder = write_mixtral_checkpoint(tmp_path / "checkpoint", seed=1)
    engine = build(folder, tmp_path / "engine")
    path = engine.folder / "engine.json"
    values = json.loads(path.read_text())
    del values["digest"]
    for fact in ("scales", "router", "dense_layers"):
        del values["architecture"][fact]
    assert "qkv" not in values["architecture"]  # so that bytes are those of engines that were built before
    path.write_text(digested_text(values))
    older = open_engine(engine.folder)
    assert older.manifest.architecture == engine.manifest.architecture
    text = EvaluationText(names=("fox",), content="the quick brown fox")
    verify.record(older, verify.verify_engine(older, str(folder), text, 8, lambda _: None))
    assert open_engine(engine.folder).manifest.verification["failures"] == []
