"""Gate matrices in, what can be said of their routing out: equal rows, condition, experts that are never chosen.

A router takes the K largest of the logits gate @ x, equal ones in the order of their index. What is proved here holds
for every x, in arithmetic that gives equal rows equal logits:

- never chosen: an expert whose row equals at least K rows of lower index. Those K always tie with it and come first.
- near duplicates and the condition number are measures, not proofs: they say how little separates two experts.

Only differences between rows route: a vector added to every row moves all logits alike. `spread` is the part of the
gate that is left once the mean row is taken away.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

NEAR_DUPLICATE_COSINE = 0.999
# mergekit calls a gate degenerate above this (mergekit/moe/router.py, warn_degenerate_gates).
LARGE_CONDITION_NUMBER = 5.0

Gate = npt.NDArray[Any]  # [E, H] of any float dtype, ml_dtypes' bfloat16 included


@dataclass(frozen=True, kw_only=True)
class LayerRouting:
    """One layer's gate. `condition_number` is None where the rows are linearly dependent, i.e. it is infinite."""

    layer: int
    duplicate_groups: tuple[tuple[int, ...], ...]  # experts with bitwise equal rows, lowest index first
    near_duplicates: tuple[tuple[int, int, float], ...]  # (expert, expert, cosine), not counting exact duplicates
    never_chosen: tuple[int, ...]
    condition_number: float | None
    spread: float  # |gate - mean row| / |gate|, Frobenius; 0 when all rows are equal


@dataclass(frozen=True, kw_only=True)
class RoutingReport:
    """Every layer's gate, for one K."""

    num_experts: int
    experts_per_token: int
    layers: tuple[LayerRouting, ...]

    @property
    def never_chosen(self) -> tuple[int, ...]:
        """Experts that no layer can choose: dropping them changes nothing."""
        if not self.layers:
            return ()
        return tuple(sorted(set.intersection(*(set(layer.never_chosen) for layer in self.layers))))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; an infinite condition number is null."""
        return {**asdict(self), "never_chosen": list(self.never_chosen)}


def diagnose(gates: Mapping[int, Gate], experts_per_token: int) -> RoutingReport:
    """Examine gates [E, H], any float dtype, by layer. Raises ValueError for K outside 1..E, NaN or unequal shapes."""
    shapes = {gate.shape for gate in gates.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise ValueError(f"diagnosing gates: found shapes {sorted(shapes)}, expected one shape [E, H] for every layer")
    num_experts = next(iter(shapes))[0]
    if not 1 <= experts_per_token <= num_experts:
        raise ValueError(f"diagnosing gates: {experts_per_token} experts per token, expected 1 to {num_experts}")
    layers = tuple(_diagnose_layer(layer, gates[layer], experts_per_token) for layer in sorted(gates))
    return RoutingReport(num_experts=num_experts, experts_per_token=experts_per_token, layers=layers)


def warnings(report: RoutingReport) -> list[str]:
    """What a user should know before relying on this routing, one sentence a finding, layers gathered."""
    return [*_duplicate_warnings(report), *_near_duplicate_warnings(report), *_condition_warnings(report)]


def _diagnose_layer(layer: int, gate: Gate, experts_per_token: int) -> LayerRouting:
    gate = gate.astype(np.float64)
    if not np.isfinite(gate).all():
        raise ValueError(f"diagnosing gates: layer {layer} holds values that are NaN or infinite")
    groups = _duplicate_groups(gate)
    return LayerRouting(
        layer=layer,
        duplicate_groups=groups,
        near_duplicates=_near_duplicates(gate, groups),
        never_chosen=tuple(sorted(expert for group in groups for expert in group[experts_per_token:])),
        condition_number=_condition_number(gate),
        spread=_spread(gate),
    )


def _duplicate_groups(gate: npt.NDArray[np.float64]) -> tuple[tuple[int, ...], ...]:
    groups: dict[bytes, list[int]] = {}
    for expert, row in enumerate(gate + 0.0):  # + 0.0 makes one zero of -0.0 and 0.0
        groups.setdefault(row.tobytes(), []).append(expert)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)


def _near_duplicates(
    gate: npt.NDArray[np.float64], duplicates: Sequence[Sequence[int]]
) -> tuple[tuple[int, int, float], ...]:
    """Pairs of rows with a cosine above NEAR_DUPLICATE_COSINE and lengths within the same measure of each other.

    Rows that point alike but differ in length are told apart by every token, so they are not near duplicates. Of
    exact duplicates only the first is compared.
    """
    repeated = {expert for group in duplicates for expert in group[1:]}
    lengths = np.linalg.norm(gate, axis=1)
    experts = [expert for expert in range(len(gate)) if expert not in repeated and lengths[expert] > 0]
    pairs = []
    for index, first in enumerate(experts):
        for second in experts[index + 1 :]:
            cosine = float(gate[first] @ gate[second] / (lengths[first] * lengths[second]))
            ratio = min(lengths[first], lengths[second]) / max(lengths[first], lengths[second])
            if cosine > NEAR_DUPLICATE_COSINE and ratio > NEAR_DUPLICATE_COSINE:
                pairs.append((first, second, cosine))
    return tuple(pairs)


def _condition_number(gate: npt.NDArray[np.float64]) -> float | None:
    """Largest over smallest singular value, as torch.linalg.cond and numpy.linalg.cond have it; None for infinite."""
    values = np.linalg.svd(gate, compute_uv=False)
    if values[-1] <= values[0] * max(gate.shape) * np.finfo(np.float64).eps:
        return None
    return float(values[0] / values[-1])


def _spread(gate: npt.NDArray[np.float64]) -> float:
    whole = float(np.linalg.norm(gate))
    return float(np.linalg.norm(gate - gate.mean(axis=0))) / whole if whole else 0.0


def _duplicate_warnings(report: RoutingReport) -> list[str]:
    found: dict[tuple[int, ...], list[int]] = {}
    for layer in report.layers:
        for group in layer.duplicate_groups:
            found.setdefault(group, []).append(layer.layer)
    sentences = []
    for group, layers in found.items():
        dead = group[report.experts_per_token :]
        result = f"{_experts(dead)} can never be chosen there" if dead else "the lower index always comes first"
        sentences.append(
            f"the gate rows of {_experts(group)} are equal in {_layers(layers, report)}: their logits always tie, ties "
            f"go to the lowest index, and with {report.experts_per_token} experts per token {result}"
        )
    return sentences


def _near_duplicate_warnings(report: RoutingReport) -> list[str]:
    found: dict[tuple[int, int], list[tuple[int, float]]] = {}
    for layer in report.layers:
        for first, second, cosine in layer.near_duplicates:
            found.setdefault((first, second), []).append((layer.layer, cosine))
    return [
        f"the gate rows of {_experts(pair)} are nearly equal in {_layers([layer for layer, _ in where], report)} "
        f"(cosine up to {max(cosine for _, cosine in where):.6f}): which of the two is chosen hangs on rounding"
        for pair, where in found.items()
    ]


def _condition_warnings(report: RoutingReport) -> list[str]:
    """Layers with exact duplicates are left out: their infinite condition is told already."""
    rest = [layer for layer in report.layers if not layer.duplicate_groups]
    infinite = [layer.layer for layer in rest if layer.condition_number is None]
    large = {layer.layer: layer.condition_number or 0.0 for layer in rest}
    large = {layer: value for layer, value in large.items() if value > LARGE_CONDITION_NUMBER}
    sentences = []
    if infinite:
        sentences.append(f"the gate rows in {_layers(infinite, report)} are linearly dependent: one is a mix of others")
    if large:
        worst = max(large, key=lambda layer: large[layer])
        sentences.append(
            f"the gate's condition number is above {LARGE_CONDITION_NUMBER:g} in {_layers(list(large), report)} "
            f"(largest {large[worst]:.1f}, layer {worst}): the rows share most of their direction, so experts' logits "
            "lie close together and some experts will be used little; prompts that differ more, or negative prompts, "
            "part them"
        )
    return sentences


def _experts(experts: Iterable[int]) -> str:
    words = [str(expert) for expert in experts]
    return f"expert {words[0]}" if len(words) == 1 else f"experts {', '.join(words[:-1])} and {words[-1]}"


def _layers(layers: Sequence[int], report: RoutingReport) -> str:
    if len(layers) == len(report.layers) > 1:
        return f"all {len(layers)} layers"
    return f"layer{'s' if len(layers) > 1 else ''} {number_ranges(layers)}"


def number_ranges(numbers: Iterable[int]) -> str:
    """Whole numbers as text with runs drawn together: 0-3, 7."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
