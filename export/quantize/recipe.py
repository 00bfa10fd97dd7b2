"""The bits of each role at each precision. The plan of an engine is written into its engine.json."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from export.checkpoint.tensor_table import Role
from export.errors import QuantizationError, unknown
from export.provider import ONNX_RUNTIME, PROVIDERS, Provider


@dataclass(frozen=True, kw_only=True)
class QuantPlan:
    """Bits per role; a role that is absent keeps its provider's float type. Router, norms and biases are never listed.

    `accuracy_level` is the attribute of ONNX Runtime's MatMulNBits and QMoE operators. Level 4 allows the kernels to
    round activations to int8 in blocks, which makes them fast.
    """

    name: str
    bits: Mapping[Role, int]
    block_sizes: tuple[int, ...]
    accuracy_level: int

    def bits_of(self, role: Role) -> int | None:
        return self.bits.get(role)


def _bits(layers: int, ends: int) -> Mapping[Role, int]:
    """Bits per role: `layers` for the matrices of the layers, `ends` for embedding and head."""
    inside, outside = (Role.ATTENTION, Role.FFN, Role.EXPERT), (Role.EMBEDDING, Role.HEAD)
    return MappingProxyType(dict.fromkeys(inside, layers) | dict.fromkeys(outside, ends))


# Plans by precision. `plan_for` fills in the block sizes and the accuracy level of a provider.
PLANS: Mapping[str, QuantPlan] = MappingProxyType(
    {
        "fp32": QuantPlan(name="fp32", bits=MappingProxyType({}), block_sizes=(), accuracy_level=0),
        "fp16": QuantPlan(name="fp16", bits=MappingProxyType({}), block_sizes=(), accuracy_level=0),
        "int8": QuantPlan(name="int8", bits=_bits(8, ends=8), block_sizes=(), accuracy_level=4),
        # Embedding and head at 4 bits would raise the tiny phixtral's perplexity by another 0.8 % and save little: a
        # token reads one row of the embedding, and the head is 3 % of the bytes that a full-size phixtral reads.
        "int4": QuantPlan(name="int4", bits=_bits(4, ends=8), block_sizes=(), accuracy_level=4),
    }
)


def plan_for(precision: str, provider: Provider = PROVIDERS["cpu"]) -> QuantPlan:
    """The quantisation plan of a precision on a provider. Raises QuantizationError that lists the precisions there."""
    if precision not in PLANS:
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
    plan = PLANS[precision]
    if not plan.bits:
        return plan
    return replace(plan, block_sizes=provider.block_sizes[precision], accuracy_level=provider.accuracy_level)
