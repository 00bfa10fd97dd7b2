"""The recipes that have a name, `--precision`, as data."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from export.errors import QuantizationError, unknown
from export.provider import KERNELS, ONNX_RUNTIME, OWN_KERNELS, PROVIDERS, Provider
from export.quantize.recipe import FLOATS, Recipe
from export.quantize.recipe_reading import read_recipe

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "fp32": {"default": {"bits": FLOATS}},
        "fp16": {"default": {"bits": FLOATS}},
        # The CPU's kernels round activations to int8 in blocks of the same size as the weights', and with int8 weights
        # that error is visible: so int8 takes blocks of 32 where the kernels have them.
        "int8": {"default": {"bits": 8, "block": [32, 64]}},
        # Embedding and head at 4 bits would raise the tiny phixtral's perplexity by another 0.8 % and save little: a
        # token reads one row of the embedding, and the head is 3 % of the bytes that a full-size phixtral reads. Blocks
        # of 32 would lower its perplexity by half a per cent, but decoding would read a fifth more bytes.
        "int4": {
            "default": {"bits": 4, "block": [64, 32]},
            "rules": [{"role": ["embedding", "head"], "bits": 8}],
        },
        "int2": {
            "default": {"bits": 4, "block": [64, 32]},
            "rules": [{"role": ["expert", "ffn"], "bits": 2}, {"role": ["embedding", "head"], "bits": 6}],
        },
        "q2": {
            "default": {"bits": 5, "block": [64, 32]},
            "rules": [
                {"role": ["expert", "ffn"], "bits": 3, "block": [128, 64, 32]},
                {"weight": ["first"], "layers": ["1::2"], "bits": 2},
            ],
        },
        "q3": {
            "default": {"bits": 6, "block": [64, 32]},
            "rules": [
                {"weight": ["first"], "bits": 3},
                {"weight": ["first"], "layers": ["4::4"], "bits": 4},
                {"weight": ["second"], "bits": 4, "block": [128, 64, 32]},
            ],
        },
        "q4": {
            "default": {"bits": 6, "block": [64, 32]},
            "rules": [
                {"role": ["embedding"], "bits": 8},
                {"weight": ["first"], "bits": 4},
                {"weight": ["first"], "layers": ["4::4"], "bits": 5},
                {"weight": ["second"], "bits": 5, "block": [128, 64, 32]},
            ],
        },
        "q5": {
            "default": {"bits": 6, "block": [32]},
            "rules": [
                {"role": ["embedding"], "bits": 8, "block": [64, 32]},
                {"role": ["expert", "ffn"], "bits": 5},
                {"weight": ["first"], "block": [64, 32]},
                {"weight": ["second"], "layers": ["5::2"], "bits": 6},
            ],
        },
        "q6": {
            "default": {"bits": 6, "block": [32]},
            "rules": [
                {"role": ["embedding"], "bits": 8, "block": [64, 32]},
                {"weight": ["first"], "block": [64, 32]},
            ],
        },
        "q8": {"default": {"bits": 8, "block": [32]}},
    }
)


# The default of moeship's kernels, which have 5 and 6 bits. Beside 4 bits everywhere and 8 bits in embedding and head,
# a token of a full-size phixtral reads no more bytes: blocks of 128 in the experts and 6 bits in the head pay for 5
# bits in attention, whose errors cost most, and in the first matrices of the last layer's experts (docs/recipes.md).
# One layer in six keeps 4 bits in query, key and value. Matrices that 128 does not divide are narrow, and get blocks of
# 32. The embedding is free: a token reads one row of it.
_OF_OWN_KERNELS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "int4": {
            "default": {"bits": 4, "block": [128, 32]},
            "rules": [
                {"role": ["attention"], "bits": 5},
                {"weight": ["qkv"], "layers": ["6::6"], "bits": 4},
                {"weight": ["first"], "layers": [-1], "bits": 5},
                {"role": ["head"], "bits": 6},
                {"role": ["embedding"], "bits": 8, "block": [64, 32]},
            ],
        },
    }
)


def preset(name: str, provider: Provider) -> Mapping[str, Any]:
    """The values of a preset for a provider and its kernels. Raises KeyError for a name that is none."""
    return _OF_OWN_KERNELS.get(name, PRESETS[name]) if provider.kernels == OWN_KERNELS else PRESETS[name]


def precisions_on(provider: str) -> list[str]:
    """The names of the precisions that a provider has with moeship's kernels or with ONNX Runtime's."""
    there = [kernels[provider].precisions for kernels in KERNELS.values() if provider in kernels]
    return [name for name in PRESETS if any(name in precisions for precisions in there)]


def recipe_for(precision: str, provider: Provider = PROVIDERS["cpu"]) -> Recipe:
    """The recipe of a precision on a provider. Raises QuantizationError that lists the precisions there."""
    if precision not in PRESETS:
        raise QuantizationError(f"choosing the precision: {unknown(precision, precisions_on(provider.name))}")
    if precision not in provider.precisions and provider.kernels != ONNX_RUNTIME:
        without = PROVIDERS[provider.name].precisions
        remedy = f"leave --kernels out to build {precision}" if precision in without else "choose one of these"
        raise QuantizationError(
            f"choosing the precision: the kernels of {provider.kernels} multiply quantised matrices, found "
            f"{precision}, expected {' or '.join(provider.precisions)}; {remedy}"
        )
    own = KERNELS[OWN_KERNELS].get(provider.name)
    if own is not None and precision in own.precisions and precision not in provider.precisions:
        raise QuantizationError(
            f"choosing the precision: only moeship's kernels have the bits of {precision}; build it without --kernels, "
            f"or one of {', '.join(provider.precisions)}"
        )
    if precision not in provider.precisions:
        every = [other for providers in KERNELS.values() for other in providers.values()]
        others = dict.fromkeys(f"--provider {other.name}" for other in every if precision in other.precisions)
        raise QuantizationError(
            f"choosing the precision: ONNX Runtime has no {precision} kernels for mixtures on the provider "
            f"{provider.name}; build {', '.join(provider.precisions)}, or {precision} with {' or '.join(others)}"
        )
    return read_recipe({"name": precision, **preset(precision, provider)}, provider)
