"""The recipes that have a name, `--precision`, as data."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from export.errors import QuantizationError, unknown
from export.provider import ONNX_RUNTIME, PROVIDERS, Provider
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
    }
)


def recipe_for(precision: str, provider: Provider = PROVIDERS["cpu"]) -> Recipe:
    """The recipe of a precision on a provider. Raises QuantizationError that lists the precisions there."""
    if precision not in PRESETS:
        raise QuantizationError(f"choosing the precision: {unknown(precision, provider.precisions)}")
    if precision not in provider.precisions and provider.kernels != ONNX_RUNTIME:
        without = PROVIDERS[provider.name].precisions
        remedy = f"leave --kernels out to build {precision}" if precision in without else "choose one of these"
        raise QuantizationError(
            f"choosing the precision: the kernels of {provider.kernels} multiply quantised matrices, found "
            f"{precision}, expected {' or '.join(provider.precisions)}; {remedy}"
        )
    if precision not in provider.precisions:
        others = [f"--provider {other.name}" for other in PROVIDERS.values() if precision in other.precisions]
        raise QuantizationError(
            f"choosing the precision: ONNX Runtime has no {precision} kernels for mixtures on the provider "
            f"{provider.name}; build {', '.join(provider.precisions)}, or {precision} with {' or '.join(others)}"
        )
    return read_recipe({"name": precision, **PRESETS[precision]}, provider)
