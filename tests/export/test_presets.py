"""The presets: bits against llama.cpp's files of the same names, and that each is a recipe as engine.json has it."""

from __future__ import annotations

import pytest

from export.errors import QuantizationError
from export.families import mixtral
from export.provider import KERNELS, OWN_KERNELS, PROVIDERS
from export.quantize.presets import PRESETS, recipe_for
from export.quantize.recipe_reading import read_recipe
from tests.llama_quants import NAMES, bits_per_weight

OWN = KERNELS[OWN_KERNELS]["cpu"]
SCALE_BITS = {"float16": 16, "float32": 32}


def mixtral_table(hidden, width, layers, vocabulary, heads, kv_heads):
    config = {
        "model_type": "mixtral", "vocab_size": vocabulary, "hidden_size": hidden, "intermediate_size": width,
        "num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": kv_heads,
        "max_position_embeddings": 512, "num_local_experts": 8, "num_experts_per_tok": 2, "rms_norm_eps": 1e-5,
        "rope_theta": 1e6, "hidden_act": "silu", "sliding_window": None, "tie_word_embeddings": False,
    }  # fmt: skip
    family = mixtral.FAMILY
    return family.tensors(family.read_config(config), ["model.layers.0.block_sparse_moe.experts.0.w1.weight"])


# Widths of the Mixtral that benchmarks/quality trains, and of Mixtral 8x7B.
SIZES = {"small": (256, 512, 4, 4096, 4, 2), "8x7B": (4096, 14336, 32, 32000, 32, 8)}


def served_bits(precision, table):
    """The bits a weight of codes, scales, norms and routers, all in float32 that is not quantised."""
    recipe, bits = recipe_for(precision, OWN).for_model(table), 0.0
    for spec in table:
        stored = recipe.storage(spec)
        own = 32 if stored is None else stored.bits + SCALE_BITS[stored.scales] / stored.block_size
        bits += own * spec.num_elements
    return bits / sum(spec.num_elements for spec in table)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("precision", NAMES)
def test_a_preset_has_no_more_bits_than_llama_cpps_file_of_that_name(precision, size):
    table = mixtral_table(*SIZES[size])
    theirs = bits_per_weight(NAMES[precision], table, num_experts=8, heads=SIZES[size][4], kv_heads=SIZES[size][5])
    ours = served_bits(precision, table)
    assert ours <= theirs
    assert ours > theirs - 0.6  # bits that are left unused would be a worse engine than could be had


@pytest.mark.parametrize("size", SIZES)
def test_each_preset_has_more_bits_than_the_one_before(size):
    table = mixtral_table(*SIZES[size])
    bits = [served_bits(precision, table) for precision in NAMES]
    assert bits == sorted(bits)
    assert len(set(bits)) == len(bits)


@pytest.mark.parametrize("precision", PRESETS)
def test_presets_are_written_as_engine_json_has_them(precision):
    """So that an engine's recipe can be told from a changed one."""
    values = {"name": precision, **PRESETS[precision]}
    assert read_recipe(values).to_json() == values


@pytest.mark.parametrize("precision", ["q4", "int2"])
def test_only_moeships_kernels_have_the_bits(precision):
    with pytest.raises(
        QuantizationError, match=f"only moeship's kernels have the bits of {precision}; build it without"
    ):
        recipe_for(precision, PROVIDERS["cpu"])
    with pytest.raises(
        QuantizationError, match=r"no .* kernels for mixtures on the provider cuda; build fp16, int8, int4"
    ):
        recipe_for(precision, PROVIDERS["cuda"])
