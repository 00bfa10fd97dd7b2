"""How many bits a weight llama.cpp's quantised files of a mixture have, from the types that it gives each tensor.

Sources: llama.cpp's src/llama-quant.cpp (`llama_tensor_get_type_impl`, for an architecture that is not Falcon, without
an importance matrix) and ggml/src/ggml-common.h (the bytes of a block of 256 weights, of Q8_0 of 32). Norms, biases and
the router stay float32.
"""

from __future__ import annotations

from collections.abc import Iterable

from export.checkpoint.tensor_table import Role, TensorSpec
from export.quantize.recipe import layer_of

BITS = {"Q2_K": 2.625, "Q3_K": 3.4375, "Q4_K": 4.5, "Q5_K": 5.5, "Q6_K": 6.5625, "Q8_0": 8.5, "F32": 32.0}
DEFAULT = {"Q2_K": "Q2_K", "Q3_K_M": "Q3_K", "Q4_K_M": "Q4_K", "Q5_K_M": "Q5_K", "Q6_K": "Q6_K", "Q8_0": "Q8_0"}
NAMES = {"q2": "Q2_K", "q3": "Q3_K_M", "q4": "Q4_K_M", "q5": "Q5_K_M", "q6": "Q6_K", "q8": "Q8_0"}


def bits_per_weight(file_type: str, table: Iterable[TensorSpec], num_experts: int, heads: int, kv_heads: int) -> float:
    """The bits a weight of a file of `file_type`; `table` has the rows of a model with query, key and value joined."""
    rows = list(table)
    layers = 1 + max(layer_of(spec.name) or 0 for spec in rows)
    found = 0.0
    for spec in rows:
        for share, kind in _types(file_type, spec, layers, num_experts, heads, kv_heads):
            found += spec.num_elements * share * BITS[kind]
    return found / sum(spec.num_elements for spec in rows)


def _types(file_type, spec, layers, num_experts, heads, kv_heads):
    """The parts of a row, as shares of its weights, with their types."""
    usual, layer = DEFAULT[file_type], layer_of(spec.name) or 0
    more = layer < layers // 8 or layer >= 7 * layers // 8 or (layer - layers // 8) % 3 == 2
    if spec.role in (Role.NORM, Role.BIAS, Role.ROUTER):
        return [(1.0, "F32")]
    if spec.role is Role.EMBEDDING:
        return [(1.0, usual)]
    if spec.role is Role.HEAD:
        return [(1.0, usual if usual == "Q8_0" else "Q6_K")]
    if spec.role is Role.ATTENTION and spec.letters.endswith("ND"):  # the output
        if num_experts == 8:
            return [(1.0, "Q5_K" if file_type in ("Q2_K", "Q3_K_M", "Q4_K_M") else usual)]
        return [(1.0, {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K"}.get(file_type, usual))]
    if spec.role is Role.ATTENTION:
        query, kv = heads / (heads + 2 * kv_heads), kv_heads / (heads + 2 * kv_heads)
        value = {
            "Q2_K": "Q4_K" if heads >= 4 * kv_heads else "Q3_K", "Q3_K_M": "Q5_K" if layer < 2 else "Q4_K",
            "Q4_K_M": "Q6_K" if more else usual, "Q5_K_M": "Q6_K" if more else usual,
        }.get(file_type, usual)  # fmt: skip
        key = usual
        if num_experts == 8:
            key = value = "Q8_0"
        return [(query, usual), (kv, key), (kv, value)]
    if spec.letters.endswith("F"):  # an expert's second matrix
        kind = {
            "Q2_K": "Q3_K", "Q3_K_M": "Q5_K" if layer < layers // 16 else "Q4_K",
            "Q4_K_M": "Q6_K" if more else usual, "Q5_K_M": "Q6_K" if more else usual,
        }.get(file_type, usual)  # fmt: skip
        return [(1.0, kind)]
    return [(1.0, usual)]
