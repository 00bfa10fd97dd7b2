"""Recipes: which rule wins, which blocks a matrix gets, and that a recipe survives its plain values."""

from __future__ import annotations

import pytest

from export.checkpoint.tensor_table import Role, TensorSpec, single
from export.errors import QuantizationError
from export.provider import KERNELS, OWN_KERNELS, PROVIDERS
from export.quantize.presets import PRESETS, recipe_for
from export.quantize.recipe import Storage
from export.quantize.recipe_reading import read_recipe


def row(name: str, role: Role, features: int = 256, letters: str = "F H") -> TensorSpec:
    return single(name, (128, features), letters, role)


QKV = row("model.layers.2.self_attn.qkv_proj.weight", Role.ATTENTION, letters="(N+2G)D H")
OUT = row("model.layers.2.self_attn.o_proj.weight", Role.ATTENTION, letters="H ND")
FIRST = row("model.layers.0.mlp.experts.gate_up.weight", Role.EXPERT, letters="E 2F H")
SECOND = row("model.layers.3.mlp.experts.down.weight", Role.EXPERT, letters="E H F")
HEAD = row("lm_head.weight", Role.HEAD, letters="V H")
EMBEDDING = row("model.embed_tokens.weight", Role.EMBEDDING, letters="V H")
ROWS = (QKV, OUT, FIRST, SECOND, HEAD, EMBEDDING)
NEVER = (row("n.weight", Role.NORM), row("g.weight", Role.ROUTER), row("b.bias", Role.BIAS))


def recipe(*rules, provider=PROVIDERS["cpu"], **default):
    values = {"name": "mine", "default": {"bits": 4, "block": [64], **default}, "rules": list(rules)}
    return read_recipe(values, provider).for_model(ROWS)


@pytest.mark.parametrize(
    ("precision", "provider", "inside", "outside"),
    [
        ("int8", PROVIDERS["cpu"], (8, 32, "float32"), (8, 32, "float32")),
        ("int4", PROVIDERS["cpu"], (4, 64, "float32"), (8, 64, "float32")),
        ("int8", PROVIDERS["cuda"], (8, 64, "float16"), (8, 64, "float16")),
        ("int4", PROVIDERS["cuda"], (4, 64, "float16"), (8, 64, "float16")),
        ("int8", KERNELS[OWN_KERNELS]["cpu"], (8, 32, "float16"), (8, 32, "float16")),
    ],
)
def test_presets_store_the_matrices_of_layers_and_the_head(precision, provider, inside, outside):
    found = recipe_for(precision, provider)
    for spec in (QKV, OUT, FIRST, SECOND):
        assert found.storage(spec) == Storage(bits=inside[0], block_size=inside[1], scales=inside[2])
    assert found.storage(HEAD) == Storage(bits=outside[0], block_size=outside[1], scales=outside[2])
    assert [found.storage(spec) for spec in NEVER] == [None] * 3


def test_int4_of_moeships_kernels_gives_attention_and_head_bits_that_the_experts_blocks_pay_for():
    found = recipe_for("int4", KERNELS[OWN_KERNELS]["cpu"]).for_model(ROWS)
    stored = [(found.storage(spec).bits, found.storage(spec).block_size) for spec in ROWS]
    assert stored == [(5, 128), (5, 128), (4, 128), (4, 128), (6, 128), (8, 64)]


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_preset_of_floats_quantises_nothing(precision):
    found = recipe_for(precision, PROVIDERS["cpu" if precision == "fp32" else "cuda"])
    assert not found.quantises
    assert found.accuracy_level == 0
    assert [found.storage(spec) for spec in ROWS] == [None] * len(ROWS)


def test_the_last_rule_that_matches_wins_field_by_field():
    found = recipe({"role": ["expert"], "bits": 8, "method": "nearest"}, {"weight": ["second"], "bits": "float"},
                   {"role": ["expert"], "layers": [3], "bits": 4})  # fmt: skip
    assert found.storage(FIRST) == Storage(bits=8, block_size=64, scales="float32", method="nearest")
    assert found.storage(SECOND) == Storage(bits=4, block_size=64, scales="float32", method="nearest")
    assert found.storage(QKV) == Storage(bits=4, block_size=64, scales="float32")


@pytest.mark.parametrize(
    ("match", "expected"),
    [
        ({"weight": ["qkv"]}, [QKV]),
        ({"weight": ["out"]}, [OUT]),
        ({"weight": ["first"]}, [FIRST]),
        ({"weight": ["second", "lm_head"]}, [SECOND, HEAD]),
        ({"role": ["attention"]}, [QKV, OUT]),
        ({"layers": [2]}, [QKV, OUT]),
        ({"layers": [-1, 0]}, [FIRST, SECOND]),
        ({"layers": ["0::2"]}, [QKV, OUT, FIRST]),
        ({"layers": ["1::2"]}, [SECOND]),
        ({"layers": ["0-1", "2::7"]}, [QKV, OUT, FIRST]),
        ({}, list(ROWS)),
    ],
)
def test_a_rule_matches_by_role_by_name_and_by_layer(match, expected):
    found = recipe({**match, "bits": 8})
    assert [spec for spec in ROWS if found.storage(spec).bits == 8] == expected


def test_a_matrix_gets_the_first_block_of_the_recipe_that_divides_its_features():
    wide = row("w", Role.FFN, features=96)
    found = recipe(block=[128, 64, 32])
    assert [found.storage(spec).block_size for spec in (QKV, wide)] == [128, 32]
    with pytest.raises(QuantizationError, match=r"quantising w: 96 input features .* take \(64\); build it without"):
        recipe(block=[64]).storage(wide)


@pytest.mark.parametrize("precision", PRESETS)
def test_a_recipe_survives_its_plain_values(precision):
    found = read_recipe({"name": precision, **PRESETS[precision]})
    assert read_recipe(found.to_json()) == found
