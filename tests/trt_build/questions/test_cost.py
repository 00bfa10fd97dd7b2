"""The third question in parts: the cost of each layer, role and expert is what transformers' models say it is."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from conftest import EXAMPLES
from torch_reference import _state, load_reference, run_model
from transformers_models import TRANSFORMERS_MODELS

from export.checkpoint.folder import open_checkpoint
from export.checkpoint.tensor_table import Role
from export.errors import ConfigError
from export.families import read_model
from export.reference import variants
from export.reference.variants import Part
from export.tokenizer.settings import read_settings
from trt_build.comparison.cost import Grain, measuring
from trt_build.comparison.cost.measuring import CostOptions, CostPlan, measure_cost, spread_windows
from trt_build.comparison.evaluation_text import own_text
from trt_build.comparison.parity import measure
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.engine import open_engine
from trt_build.ort.questions.cost import ask_about_cost
from trt_build.ort.questions.stored_weights import open_stored_weights


@pytest.fixture(scope="module", params=["phixtral", "mixtral"])
def trained(request, made_once, trained_phixtral):
    """The trained example of a family: its int4 engine, its model and 200 tokens of text."""
    source = trained_phixtral if request.param == "phixtral" else EXAMPLES / "tiny-mixtral" / "checkpoint"
    folder = made_once(
        f"trained-{request.param}-int4-for-cost",
        lambda folder: build_engine(
            BuildOptions(checkpoint=str(source), output=folder, precision="int4", kernels="onnxruntime")
        ),
    )
    checkpoint = open_checkpoint(source)
    tokens = read_settings(checkpoint.folder, checkpoint.config).tokenizer.encode_prompt(own_text().content)
    return open_engine(folder, check_digests=False), read_model(checkpoint), tokens[:200]


def rows_of(model, part):
    """The rows of the table that a part consists of, by the names of the family's network."""
    network = model.family.network(model.weights.checkpoint.config)
    if part.role is None:
        return list(model.weights.table)
    if part.layer is None:
        return [f"{network.embedding if part.role is Role.EMBEDDING else network.head}.weight"]
    layer = network.layers[part.layer]
    modules = (
        (*layer.attention.inputs, layer.attention.output)
        if part.role is Role.ATTENTION
        else (layer.mlp.first, layer.mlp.second)
    )
    return [f"{module}.weight" for module in modules]


def by_transformers(engine, model, part, windows):
    """KL by position of transformers' model whose own tensors of one part were replaced by the dequantised ones."""
    outside = load_reference(model)
    before = [run_model(outside, window)[0] for window in windows]
    stored = open_stored_weights(engine, model)
    wanted = {name: model.weights.table[name] for name in rows_of(model, part)}
    replaced = dataclasses.replace(stored, table=wanted)
    state = outside.state_dict()
    with torch.no_grad():
        tensors = dict(_state(dataclasses.replace(model, weights=replaced)))
        for name in wanted:
            if TRANSFORMERS_MODELS[model.family.name].name(name) is None and ".moe.mlp." in name:  # an added mixture
                layer, place = name.removeprefix("transformer.h.").split(".moe.mlp.")
                place = f"model.layers.{layer}.mlp.{place}"
                tensors[place] = torch.from_numpy(stored.load(name))
        if part.role is not None:
            assert len(tensors) >= len(wanted)
        for name, tensor in tensors.items():
            target = state[name] if part.expert is None else state[name][part.expert]
            target.copy_(tensor if part.expert is None else tensor[part.expert])
    return np.concatenate(
        [
            measure(run_model(outside, window)[0], expected, window).kl
            for window, expected in zip(windows, before, strict=True)
        ]
    )


PARTS = [
    Part(role=None), Part(role=Role.EMBEDDING), Part(role=Role.ATTENTION, layer=1), Part(role=Role.EXPERT, layer=1),
    Part(role=Role.EXPERT, layer=2, expert=1), Part(role=Role.EXPERT, layer=0, expert=3), Part(role=Role.HEAD),
]  # fmt: skip


def costs(engine, model, windows, parts):
    plan = CostPlan(grain=Grain.EXPERTS, tokens=200, parts=tuple(parts), choice="")
    found = measure_cost(open_stored_weights(engine, model), model, windows, plan)
    assert found.whole is not None
    return [found.whole, *found.parts]


def test_the_cost_of_a_part_is_that_of_transformers_model_with_that_part_replaced(trained):
    engine, model, tokens = trained
    windows = [tokens[:120], tokens[120:]]
    for part, found in zip(PARTS, costs(engine, model, windows, PARTS), strict=True):
        expected = by_transformers(engine, model, part, windows)
        assert found.mean_kl == pytest.approx(expected.mean(), rel=1e-3), part
        assert found.max_kl == pytest.approx(expected.max(), rel=1e-3), part
        assert found.standard_error == pytest.approx(expected.std() / np.sqrt(200), rel=1e-3), part
        assert (found.role, found.layer, found.expert) == (str(part.role or "all"), part.layer, part.expert)


@pytest.mark.parametrize(
    ("part", "wrong"),
    [
        (Part(role=Role.EXPERT, layer=1), Part(role=Role.EXPERT, layer=0)),
        (Part(role=Role.EXPERT, layer=1, expert=1), Part(role=Role.EXPERT, layer=1, expert=2)),
        (Part(role=Role.ATTENTION, layer=1), Part(role=Role.EXPERT, layer=1)),
        (Part(role=Role.EMBEDDING), Part(role=Role.HEAD)),
    ],
)
def test_the_comparison_with_transformers_fails_for_another_layer_expert_or_role(trained, part, wrong):
    engine, model, tokens = trained
    [found] = costs(engine, model, [tokens], [part])
    right, other = (by_transformers(engine, model, one, [tokens]).mean() for one in (part, wrong))
    assert found.mean_kl == pytest.approx(right, rel=1e-3)
    assert found.mean_kl != pytest.approx(other, rel=0.05)


@pytest.mark.parametrize("together", [1, 100, 4096])
def test_how_many_variants_go_through_attention_together_changes_nothing(trained, monkeypatch, together):
    engine, model, tokens = trained
    expected = [found.mean_kl for found in costs(engine, model, [tokens[:40]], PARTS)]
    monkeypatch.setattr(variants, "ROWS_TOGETHER", together)
    # In another order too: the figures are those of their parts.
    found = [one.mean_kl for one in costs(engine, model, [tokens[:40]], PARTS[::-1])][::-1]
    assert found == pytest.approx(expected, rel=1e-3)


def test_by_default_small_models_are_told_apart_by_expert_over_the_whole_text(trained):
    engine, model, tokens = trained
    found = ask_about_cost(engine, model, tokens, CostOptions())
    layers, experts = model.architecture.num_layers, model.architecture.num_experts
    assert (found.grain, found.num_tokens, found.unasked) == (Grain.EXPERTS, 198, None)  # 6 windows of 33
    assert len(found.parts) == 2 + layers * (2 + experts)
    assert "198 tokens" not in found.choice
    assert found.choice.startswith("200 tokens (all of the text) by experts: ")
    brief = found.to_json(experts=False)["parts"]
    assert len(brief) == 2 + 2 * layers


def test_the_bounds_choose_fewer_tokens_and_coarser_parts(trained, monkeypatch):
    engine, model, tokens = trained
    parts = ask_about_cost(engine, model, tokens, CostOptions(grain=Grain.LAYERS)).parts
    products, memory = measuring.work_of_a_token(model, (Part(role=None), *(Part(role=Role.HEAD) for _ in parts)))
    monkeypatch.setattr(measuring, "MOST_PRODUCTS", products * 60)
    found = ask_about_cost(engine, model, tokens, CostOptions())
    assert found.grain is Grain.LAYERS
    assert 16 <= found.num_tokens < 60
    assert "(the bound of products) by layers" in found.choice
    asked = ask_about_cost(engine, model, tokens, CostOptions(tokens=190, grain=Grain.EXPERTS))
    assert (asked.grain, "190 tokens (asked for)" in asked.choice) == (Grain.EXPERTS, True)
    monkeypatch.setattr(measuring, "MOST_STATE_BYTES", memory * 100)
    with pytest.raises(ConfigError, match=r"by layers on 190 tokens: their hidden states take .* ask for at most 100 "):
        ask_about_cost(engine, model, tokens, CostOptions(tokens=190))
    monkeypatch.setattr(measuring, "MOST_PRODUCTS", products)
    too_much = ask_about_cost(engine, model, tokens, CostOptions())
    assert "16 tokens by layers are " in too_much.unasked
    for wrong in (15, 201):
        with pytest.raises(ConfigError, match=f"found {wrong}, expected 16 to 200"):
            ask_about_cost(engine, model, tokens, CostOptions(tokens=wrong))


def test_an_engine_without_codes_says_that_nothing_is_quantised(built):
    engine, model = built("phixtral", "fp32", "onnxruntime")
    found = ask_about_cost(engine, model, list(range(40)), CostOptions())
    assert found.unasked == "no weight is quantised at fp32"
    assert found.to_json() == {"question": "What did the quantiser cost?", "unasked": found.unasked}


@pytest.mark.parametrize(("tokens", "longest", "windows"), [(200, 256, 6), (2048, 256, 8), (116, 256, 3), (20, 8, 3)])
def test_windows_are_spread_over_the_text(tokens, longest, windows):
    found = spread_windows(list(range(4000)), tokens, longest)
    assert len(found) == windows
    assert len({len(window) for window in found}) == 1
    assert 0 <= tokens - sum(map(len, found)) < len(found)
    assert (found[0][0], found[-1][-1]) == (0, 3999)
