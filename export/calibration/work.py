"""What solving codes takes, known before it begins: products, time of one core, and memory.

Measured on one layer of phixtral-4x2_8's size over 8,192 tokens, one core of an AMD EPYC with AVX-512: 126 s of
processor for 3.9e12 products and 2.4e8 weights, 1.54 GB at most. `PRODUCTS_PER_S` and `SECONDS_PER_WEIGHT` follow from
its profile. Other processors differ; two cores take a little more than half the time.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from export.calibration.layers import Wanted
from export.checkpoint.tensor_table import Role
from export.families import Model

PRODUCTS_PER_S = 4e10  # multiply-adds of float32 that one core does in matrix products
SECONDS_PER_WEIGHT = 1.2e-7  # choosing scales and rounding column by column
_ROWS = 2048  # that are solved together, in five arrays


@dataclass(frozen=True, kw_only=True)
class Work:
    """`products` multiply-adds, `seconds` of one core, and the `memory` in bytes beside the interpreter's."""

    num_tokens: int
    products: int
    seconds: float
    memory: int


def work_of(model: Model, wanted: Mapping[str, Wanted], num_tokens: int) -> Work:
    """What it takes to solve rows over so many tokens, if they are shared out equally among a layer's experts."""
    facts, table = model.architecture, model.weights.table
    products = weights = codes = largest = experts = inputs = 0
    for name, one in wanted.items():
        spec = table[name]
        rows, features = spec.shape[-2:]
        tokens = num_tokens
        if spec.role is Role.EXPERT:
            tokens = num_tokens * facts.experts_per_token // facts.num_experts
            experts = max(experts, rows * features)
        # Its outputs with codes and without, and what they lack, twice; what enters a second matrix, without codes.
        times = 5 if spec.letters.split()[-1] == "H" and spec.role in (Role.EXPERT, Role.FFN) else 4
        each = tokens * features**2 // 2 + features**3 // 6 + rows * features**2 + times * tokens * rows * features
        products += len(one.experts) * each
        weights += len(one.experts) * rows * features
        codes = max(codes, len(one.experts) * rows * features)
        largest = max(largest, features)
        inputs = max(inputs, tokens * features)
    hidden = facts.hidden_size
    memory = 4 * largest**2 + 5 * 4 * _ROWS * largest + 2 * 4 * (experts + inputs) + 4 * codes
    memory += 4 * 13 * num_tokens * hidden
    return Work(
        num_tokens=num_tokens,
        products=products,
        seconds=products / PRODUCTS_PER_S + weights * SECONDS_PER_WEIGHT,
        memory=memory,
    )
