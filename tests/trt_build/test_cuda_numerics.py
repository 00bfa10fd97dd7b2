"""The numbers of a CUDA engine without a GPU: its own graphs and float16 weights, run by ONNX Runtime's CPU kernels.

The CPU kernels sum in float32 and round what they return to float16, as those of CUDA do. What differs is told where
it matters: of equal router logits CUDA's kernels choose the lowest place.
"""

from __future__ import annotations

import dataclasses
import shutil

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from checkpoints import write_phi_checkpoint
from conftest import QUANTIZABLE
from onnx import TensorProto, helper, numpy_helper
from safetensors.numpy import load_file, save_file
from torch_reference import ByTransformers, load_reference
from transformers import PhiForCausalLM

from export.checkpoint.folder import open_checkpoint
from export.families import read_model
from export.provider import PROVIDERS
from trt_build.comparison import parity
from trt_build.comparison.evaluation_text import read_texts
from trt_build.comparison.parity import THRESHOLDS
from trt_build.comparison.serving_ways import serving_limits
from trt_build.ort import verify
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.device import Device
from trt_build.ort.engine import open_engine
from trt_build.ort.questions.graph import ask_about_graph
from trt_build.ort.served_as_scored import compare_serving, where_it_begins
from trt_build.ort.session import Session

TOKENS = np.random.default_rng(5).integers(0, 256, 600).tolist()
# What rounding to float16 between the operations costs where the weights are the same: no other expert, no other token.
ROUNDING = parity.Thresholds(
    max_logit_difference=0.02, mean_kl=1e-5, perplexity_increase=1e-4, top1_agreement=0.995, routing_agreement=0.999
)
PRECISIONS = ("fp16", "int8", "int4")


@pytest.fixture(autouse=True)
def cuda_engines_run_on_the_cpu(monkeypatch):
    provider = dataclasses.replace(PROVIDERS["cuda"], runtime_name="CPUExecutionProvider", options={})
    for module in ("trt_build.ort.session", "trt_build.ort.verify"):
        monkeypatch.setattr(f"{module}.open_device", lambda *_: Device(provider=provider, kind="cpu"))


@pytest.fixture(scope="module")
def reference(tiny_checkpoint, tiny_engines, tmp_path_factory):
    """precision -> transformers with the very weights that the CUDA engine of that precision stores."""
    loaded = {}

    def of(precision):
        if precision not in loaded:
            engine = open_engine(tiny_engines(precision, "cuda"))
            folder = tmp_path_factory.mktemp("stored") / precision
            loaded[precision] = reference_of(edited(tiny_checkpoint, folder, lambda tensors: put_back(engine, tensors)))
        return loaded[precision]

    return of


def put_back(engine, tensors):
    """Replace a checkpoint's tensors by what an engine stores of them, as float32."""
    for name in tensors:
        expert, stored = None, name
        if ".moe.mlp." in name:
            before, _, after = name.partition(".moe.mlp.")
            expert, _, rest = after.partition(".")
            stored = f"{before}.moe.mlp.{rest}"
        values = stored_values(engine, stored)
        values = values[engine.manifest.expert_order.index(int(expert))] if expert is not None else values
        if ".Wqkv." in name:
            values[:192] *= 4  # the factor that the queries carry
        tensors[name] = np.ascontiguousarray(values.reshape(tensors[name].shape))


def stored_values(engine, name):
    """Float32 of a plain tensor, or of (code - 2^(bits-1)) * scale, two codes of 4 bits a byte, the lower first."""
    if f"{name}.codes" not in names_of(engine):
        return np.asarray(initializer(engine, name), dtype=np.float32)
    codes, scales = initializer(engine, f"{name}.codes"), np.asarray(initializer(engine, f"{name}.scales"), np.float32)
    codes = codes.reshape(*scales.shape, -1).astype(np.int16)
    if codes.shape[-1] == 32:  # of a block of 64
        codes = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*scales.shape, 64) - 8
    else:
        codes = codes - 128
    return (codes * scales[..., None]).reshape(*scales.shape[:-1], -1)


def reference_of(checkpoint):
    return load_reference(read_model(open_checkpoint(checkpoint)))


def quiet(_text):
    pass


def build(checkpoint, output, precision="fp16", **options):
    return build_engine(
        BuildOptions(checkpoint=str(checkpoint), output=output, precision=precision, provider="cuda", **options)
    )


def edited(source, folder, edit):
    """A copy of a checkpoint whose tensors went through `edit(tensors)`."""
    shutil.copytree(source, folder)
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")
    return folder


def copy_of(engine_folder, folder):
    return open_engine(shutil.copytree(engine_folder, folder))


def rewrite(engine, edit):
    """Put both graphs of an engine through `edit(model)`."""
    for name in ("model.onnx", "model_serving.onnx", "model_scoring.onnx"):
        model = onnx.load(str(engine.folder / name), load_external_data=False)
        edit(model)
        (engine.folder / name).write_bytes(model.SerializeToString())


def names_of(engine):
    model = onnx.load(str(engine.folder / "model.onnx"), load_external_data=False)
    return {tensor.name for tensor in model.graph.initializer}


def initializer(engine, name):
    """A writable view of an initializer's place in the data file."""
    model = onnx.load(str(engine.folder / "model.onnx"), load_external_data=False)
    [tensor] = [tensor for tensor in model.graph.initializer if tensor.name == name]
    offset = int(next(entry.value for entry in tensor.external_data if entry.key == "offset"))
    dtype = helper.tensor_dtype_to_np_dtype(tensor.data_type)
    return np.memmap(engine.folder / "model.onnx.data", dtype, "r+", offset, tuple(tensor.dims))


def values_of(engine, tokens, names):
    """Named values inside the scoring graph for one sequence."""
    model = onnx.load(str(engine.folder / "model_scoring.onnx"), load_external_data=False)
    for name, number in names.items():
        model.graph.output.append(helper.make_tensor_value_info(name, number, None))
    path = engine.folder / "looked_into.onnx"
    path.write_bytes(model.SerializeToString())
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    path.unlink()
    facts = engine.manifest.architecture
    empty = np.zeros((1, facts.num_kv_heads, 0, facts.head_size), np.float16)
    feeds = {item.name: empty for item in session.get_inputs() if item.name.startswith("past")}
    ids = np.array([tokens])
    return session.run(list(names), {"input_ids": ids, "attention_mask": np.ones_like(ids), **feeds})


def mix_in_float32(engine):
    """Put MoE over float32 of the stored weights in place of QMoE: at 8 bits the CPU's kernel rounds its input to int8,
    and CUDA's does not."""

    def edit(model):
        nodes = []
        for node in model.graph.node:
            if node.op_type != "QMoE":
                nodes.append(node)
                continue
            weights = {place: stored_values(engine, node.input[place].removesuffix(".codes")) for place in (2, 5)}
            weights |= {place: stored_values(engine, node.input[place]) for place in (4, 7)}
            names = {place: f"{node.name}/{place}" for place in (0, 1, *weights)}
            model.graph.initializer.extend(numpy_helper.from_array(values, names[at]) for at, values in weights.items())
            nodes += [helper.make_node("Cast", [node.input[at]], [names[at]], to=TensorProto.FLOAT) for at in (0, 1)]
            attributes = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
            kept = ("k", "activation_type", "normalize_routing_weights")
            mixed = helper.make_node(
                "MoE", [names[at] for at in (0, 1, 2, 4, 5, 7)], [f"{node.name}/mixed"], domain=node.domain,
                **{name: attributes[name] for name in kept},
            )  # fmt: skip
            nodes += [mixed, helper.make_node("Cast", mixed.output, node.output, to=TensorProto.FLOAT16)]
        del model.graph.node[:]
        model.graph.node.extend(nodes)

    rewrite(engine, edit)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_scored_and_decoded_logits_are_those_of_the_stored_weights(tmp_path, tiny_engines, reference, precision):
    engine = copy_of(tiny_engines(precision, "cuda"), tmp_path / "engine")
    if precision == "int8":
        mix_in_float32(engine)
    report = verify.compare(engine, ByTransformers(reference(precision)), [TOKENS], quiet)
    assert (report.num_tokens, report.num_decoded_tokens) == (600, 256)
    assert report.failures(ROUNDING) == []


def test_dense_phi_differs_from_transformers_own_model_by_rounding_alone(tmp_path):
    sizes = {**QUANTIZABLE, "dtype": "float16"}
    dense = write_phi_checkpoint(tmp_path / "dense", seed=8, spelling="phi-msft", **sizes)
    write_phi_checkpoint(tmp_path / "outside", seed=8, spelling="transformers", **sizes)
    outside = PhiForCausalLM.from_pretrained(tmp_path / "outside", dtype=torch.float32).eval()
    report = verify.compare(build(dense, tmp_path / "engine"), ByTransformers(outside), [TOKENS[:256]], quiet)
    assert report.failures(ROUNDING) == []


def test_float16_moves_a_logit_by_what_its_rounding_explains(tiny_engines, reference):
    # A logit is a sum over three layers of values rounded to 11 bits: their errors of 2^-12 each add up like draws.
    report = verify.compare(
        open_engine(tiny_engines("fp16", "cuda")), ByTransformers(reference("fp16")), [TOKENS], quiet
    )
    with torch.no_grad():
        spread = float(reference("fp16")(torch.tensor([TOKENS])).logits.std())
    assert 2.0**-14 * spread < report.mean_logit_difference < 2.0**-8 * spread


@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_four_questions_are_asked_of_an_engine_for_cuda(tiny_engines, tiny_checkpoint, precision):
    engine = open_engine(tiny_engines(precision, "cuda"))
    found = verify.verify_engine(engine, str(tiny_checkpoint), read_texts([]), 160, quiet).to_json()
    weights, graph = found["questions"]
    assert (weights["passed"], graph["passed"]) == (True, True)
    assert 1e-5 < graph["logits"] <= graph["allowed"] == 5e-3
    assert set(found["serving"]) == {"decoding", "chunks", "a batch"}
    assert 0 < found["mean_kl"] < THRESHOLDS[precision].mean_kl * 2  # random weights, which cost more than trained ones
    assert not [text for text in found["failures"] if text.startswith("served")]


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("file", ["model_serving.onnx", "model_scoring.onnx"])
def test_attention_that_one_graph_scales_by_1_03_is_told_by_the_question_about_it(
    tmp_path, tiny_engines, tiny_checkpoint, precision, file
):
    engine = copy_of(tiny_engines(precision, "cuda"), tmp_path / "engine")
    model = onnx.load(str(engine.folder / file), load_external_data=False)
    for node in model.graph.node:
        for entry in node.attribute:
            if entry.name == "scale":
                entry.f *= 1.03
    (engine.folder / file).write_bytes(model.SerializeToString())
    ways = compare_serving(engine, TOKENS[:256], quiet)
    limits = serving_limits(precision, "cuda")
    failed = {way.name for way in ways if way.failure(limits)}
    found = {way.name: way.failure(limits) for way in where_it_begins(engine, TOKENS[:256], ways, limits, quiet)}
    assert failed
    assert [name for name in failed if "it begins in the attention of layer 0, norms included" not in found[name]] == []
    answer = ask_about_graph(
        engine, read_model(open_checkpoint(tiny_checkpoint)), TOKENS[:96], device=verify.open_device(engine)
    )
    assert answer.passed is (file == "model_serving.onnx")


# Faults in what is particular to this graph.


def swap_two_experts(engine):
    for module in ("fc1.weight", "fc1.bias", "fc2.weight", "fc2.bias"):
        name = f"transformer.h.1.moe.mlp.{module}"
        for part in [name] if module.endswith("bias") else [f"{name}.codes", f"{name}.scales"]:
            values = initializer(engine, part)
            values[[0, 3]] = values[[3, 0]]


def leave_the_scale_uncompensated(engine):
    def edit(model):
        for node in model.graph.node:
            if node.op_type == "GroupQueryAttention":
                [scale] = [attribute for attribute in node.attribute if attribute.name == "scale"]
                scale.f *= 0.25

    rewrite(engine, edit)


def transpose_the_experts_block_scales(engine):
    scales = initializer(engine, "transformer.h.0.moe.mlp.fc1.weight.scales")  # [E, F, H / block]
    scales[:] = scales.transpose(0, 2, 1).reshape(scales.shape).copy()


def order_the_experts_as_for_the_cpu(engine):
    for layer in range(3):
        gate = initializer(engine, f"transformer.h.{layer}.moe.gate.weight")
        gate[:] = gate[::-1].copy()


def shift_the_zero_points(engine):
    initializer(engine, "transformer.embd.wte.weight.zero_points")[:] = 120


FAULTS = [
    swap_two_experts, leave_the_scale_uncompensated, transpose_the_experts_block_scales,
    order_the_experts_as_for_the_cpu, shift_the_zero_points,
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_seeded_fault_in_the_engine_is_caught(tmp_path, tiny_engines, reference, fault):
    engine = copy_of(tiny_engines("int4", "cuda"), tmp_path / "engine")
    fault(engine)
    report = verify.compare(engine, ByTransformers(reference("int4")), [TOKENS[:128]], quiet)
    assert report.failures(ROUNDING)


# Attention scores.


def raise_the_scores(tensors):
    for layer in range(3):
        tensors[f"transformer.h.{layer}.mixer.Wqkv.weight"][: 2 * 192] *= 64


def half_scores(packed, factor):
    """Raw query-key products of layer 0's first head [S, S], summed in float16; the queries multiplied by `factor`."""
    packed = packed[0].astype(np.float16)
    query, key = packed[:, :32] * np.float16(factor), packed[:, 192 : 192 + 32]
    scores = np.zeros((len(query), len(key)), np.float16)
    with np.errstate(over="ignore", invalid="ignore"):
        for i in range(32):
            scores += query[:, i, None] * key[None, :, i]
    return scores


def test_scores_beyond_float16_stay_finite(tmp_path, tiny_checkpoint):
    checkpoint = edited(tiny_checkpoint, tmp_path / "checkpoint", raise_the_scores)
    engine = build(checkpoint, tmp_path / "engine")
    name = "transformer.h.0.mixer.Wqkv/output_0"
    [packed] = values_of(engine, TOKENS[:64], {name: TensorProto.FLOAT16})

    # Without the factor in the queries the products pass 65504, as those of Phi-2's last layers do.
    assert not np.isfinite(half_scores(packed, factor=4)).all()
    assert np.isfinite(half_scores(packed, factor=1)).all()
    session = Session(engine)
    assert np.isfinite(session.run(session.new_cache(), TOKENS[:64])).all()
    report = verify.compare(engine, ByTransformers(reference_of(checkpoint)), [TOKENS[:128]], quiet)
    # Scores of thousands make of a rounding another choice of key now and then.
    assert report.top1_agreement >= 0.85
    assert np.isfinite(report.max_logit_difference)


# Routing.


def chosen_by_cuda(router, experts_per_token=2):
    """The experts that CUDA's kernel takes: by float32 of what it is given, of equals the lowest place.

    Source: SoftmaxTopKWarpBitonicKernel, onnxruntime/contrib_ops/cuda/moe/qmoe_kernels.cu.
    """
    return parity.chosen_experts(router.astype(np.float32), experts_per_token)


def bring_gates_close(tensors):
    for layer in range(3):
        gate = tensors[f"transformer.h.{layer}.moe.gate.weight"]
        noise = np.random.default_rng(layer).standard_normal(gate.shape).astype(np.float32)
        gate[:] = 4 * gate[0] + np.float32(3e-4) * noise


def tie_every_gate(tensors):
    for layer in range(3):
        gate = tensors[f"transformer.h.{layer}.moe.gate.weight"]
        gate[:] = gate[0]


def routing(engine, tokens):
    """What the experts' kernels are given, float16, and the router's float32 logits: [L, S, E] each."""
    names = {f"transformer.h.{layer}.moe.router_shifted/output_0/float16": TensorProto.FLOAT16 for layer in range(3)}
    names |= {f"router_logits.{layer}": TensorProto.FLOAT for layer in range(3)}
    model = onnx.load(str(engine.folder / "model_scoring.onnx"), load_external_data=False)
    given = {node.input[1] for node in model.graph.node if node.op_type in ("MoE", "QMoE")}
    assert given == set(list(names)[:3])
    have = {output.name for output in model.graph.output}
    found = values_of(engine, tokens, {name: number for name, number in names.items() if name not in have})
    _, logits = verify.ScoringSession(engine).run(tokens)
    return np.stack(found[:3]), logits


def test_near_ties_are_decided_in_float32(tmp_path, tiny_checkpoint):
    engine = build(edited(tiny_checkpoint, tmp_path / "checkpoint", bring_gates_close), tmp_path / "engine")
    given, logits = routing(engine, TOKENS[:512])
    expected = parity.chosen_experts(logits, 2)
    np.testing.assert_array_equal(chosen_by_cuda(given), expected)
    # Rounded as they are, many of these logits would be equal.
    assert (chosen_by_cuda(logits.astype(np.float16)) != expected).any(axis=-1).mean() > 0.1


def test_a_shift_of_the_router_leaves_the_weights_of_the_chosen_as_they_are(tiny_engines):
    given, logits = routing(open_engine(tiny_engines("fp16", "cuda")), TOKENS[:256])
    chosen = parity.chosen_experts(logits, 2)

    def shares(router):
        picked = np.take_along_axis(router.astype(np.float64), chosen, -1)
        weights = np.exp(picked - picked.max(-1, keepdims=True))
        return weights / weights.sum(-1, keepdims=True)

    np.testing.assert_allclose(shares(given), shares(logits), atol=2e-3)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_equal_router_logits_go_to_the_lowest_expert_index(tmp_path, tiny_checkpoint, precision):
    checkpoint = edited(tiny_checkpoint, tmp_path / "checkpoint", tie_every_gate)
    engine = build(checkpoint, tmp_path / "engine", precision, keep_all_experts=True)
    given, _ = routing(engine, TOKENS[:64])
    assert engine.manifest.expert_order == (0, 1, 2, 3, 4)
    assert (given == 0).all()
    assert (chosen_by_cuda(given) == [0, 1]).all()
