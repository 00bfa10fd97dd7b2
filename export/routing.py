"""Diagnoses routers from their gate matrices: equal rows, condition numbers, experts that are never chosen.

A router takes the experts with the K largest logits gate @ x, and among equal logits those of lower index first.

- An expert is never chosen if its row equals at least K rows of lower index: for every x those K have the same logit
  and come first. This is a proof, for arithmetic in which equal rows give equal logits. An engine does without such an
  expert (`left_out_by_layer`). If its router computed equal rows with different rounding, the whole engine would choose
  among them by rounding, and the engine without the expert still chooses those of lowest index.
- Near duplicates and condition numbers are measures, not proofs: they say how little separates experts.

Only differences between rows decide the routing, since a vector added to every row changes all logits equally. So a
large condition number of the gate itself, mergekit's measure, does harm in two cases only: the differences between the
rows are ill-conditioned too, or they are small compared with what the rows have in common. If every row is made of an
expert's own prompts minus the prompts of all other experts, the rows add up to zero: the gate's condition number is
infinite, and yet it routes well.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from export.architecture import Router

NEAR_DUPLICATE_COSINE = 0.999
# Condition number above which mergekit calls a gate degenerate (mergekit/moe/router.py, warn_degenerate_gates).
LARGE_CONDITION_NUMBER = 5.0
SMALL_SPREAD = 0.25

Gate = npt.NDArray[Any]  # [E, H] of any float dtype, ml_dtypes' bfloat16 included


@dataclass(frozen=True, kw_only=True)
class LayerRouting:
    """Diagnosis of one layer's gate. A condition number is None if it is infinite: the rows are linearly dependent."""

    layer: int
    duplicate_groups: tuple[tuple[int, ...], ...]  # experts with bitwise equal rows, lowest index first
    near_duplicates: tuple[tuple[int, int, float], ...]  # (expert, expert, cosine), not counting exact duplicates
    never_chosen: tuple[int, ...]
    condition_number: float | None  # condition number of the gate
    difference_condition_number: float | None  # condition number of gate - mean row, over its E-1 directions
    spread: float  # |gate - mean row| / |gate|, Frobenius; 0 when all rows are equal


@dataclass(frozen=True, kw_only=True)
class RoutingReport:
    """Diagnoses of the gates of all layers, for one K."""

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
        """The report as plain JSON values; an infinite condition number is null."""
        return {**asdict(self), "never_chosen": list(self.never_chosen)}


def diagnose(gates: Mapping[int, Gate], experts_per_token: int) -> RoutingReport:
    """Diagnose the gates of all layers: layer -> [E, H] of any float dtype. Raises ValueError for K outside 1..E, for
    values that are not finite, and for gates of different shapes."""
    shapes = {gate.shape for gate in gates.values()}
    if len(shapes) != 1 or len(next(iter(shapes))) != 2:
        raise ValueError(f"diagnosing gates: found shapes {sorted(shapes)}, expected one shape [E, H] for every layer")
    num_experts = next(iter(shapes))[0]
    if not 1 <= experts_per_token <= num_experts:
        raise ValueError(f"diagnosing gates: {experts_per_token} experts per token, expected 1 to {num_experts}")
    layers = tuple(_diagnose_layer(layer, gates[layer], experts_per_token) for layer in sorted(gates))
    return RoutingReport(num_experts=num_experts, experts_per_token=experts_per_token, layers=layers)


def left_out_by_layer(report: RoutingReport | None, router: Router) -> dict[int, tuple[int, ...]]:
    """Layer -> experts that an engine does without, for the layers that have such experts. Empty for a dense model, and
    for a router whose weights depend on the logits of experts that are not chosen."""
    if report is None or not router.reads_chosen_logits_alone:
        return {}
    return {layer.layer: layer.never_chosen for layer in report.layers if layer.never_chosen}


def left_out_of_every_layer(report: RoutingReport | None, router: Router) -> tuple[int, ...]:
    """Like `left_out_by_layer`, for engines whose layers all have the same experts."""
    return report.never_chosen if report is not None and left_out_by_layer(report, router) else ()


def below_the_kept(logits: npt.NDArray[np.float32], dropped: Sequence[int]) -> npt.NDArray[np.float32]:
    """Router logits [..., E] in which the experts `dropped` can not be chosen: in each row they lie below the smallest
    logit of the others by at least the span of these, and are finite. Without such experts the array itself."""
    if not dropped:
        return logits
    others = np.delete(logits, list(dropped), axis=-1)
    least, largest = others.min(axis=-1, keepdims=True), others.max(axis=-1, keepdims=True)
    found = logits.copy()
    found[..., list(dropped)] = least - (largest - least) - 1
    return found


def left_out_note(report: RoutingReport, left_out: Mapping[int, Sequence[int]]) -> str:
    """One sentence about the experts that an engine does without: layer -> experts, of at least one layer."""
    return (
        f"left out: {experts_of_layers(report, left_out)}: their gate rows equal those of experts before them, so that "
        "they can never be chosen"
    )


def experts_of_layers(report: RoutingReport, found: Mapping[int, Sequence[int]]) -> str:
    """Layer -> experts as text; layers with the same experts are told together."""
    layers: dict[tuple[int, ...], list[int]] = {}
    for layer, experts in sorted(found.items()):
        layers.setdefault(tuple(experts), []).append(layer)
    return "; ".join(f"{_experts(experts)} of {_layers(numbers, report)}" for experts, numbers in layers.items())


def warnings(report: RoutingReport) -> list[str]:
    """Warnings about a model's routing, one sentence a finding; a finding of several layers is one sentence."""
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
        condition_number=_condition_number(gate, len(gate)),
        difference_condition_number=_condition_number(gate - gate.mean(axis=0), len(gate) - 1),
        spread=_spread(gate),
    )


def _duplicate_groups(gate: npt.NDArray[np.float64]) -> tuple[tuple[int, ...], ...]:
    groups: dict[bytes, list[int]] = {}
    for expert, row in enumerate(gate + 0.0):  # + 0.0 turns -0.0 into 0.0, so that equal rows have equal bytes
        groups.setdefault(row.tobytes(), []).append(expert)
    return tuple(tuple(group) for group in groups.values() if len(group) > 1)


def _near_duplicates(
    gate: npt.NDArray[np.float64], duplicates: Sequence[Sequence[int]]
) -> tuple[tuple[int, int, float], ...]:
    """Pairs of rows with both their cosine and the ratio of their lengths above NEAR_DUPLICATE_COSINE.

    Rows of the same direction and different lengths give different logits for every token, so they are not near
    duplicates. Of a group of exact duplicates only the first row is compared.
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


def _condition_number(matrix: npt.NDArray[np.float64], rank: int) -> float | None:
    """The largest singular value divided by the `rank`-th; None for infinite. Equals numpy.linalg.cond at full rank."""
    if rank == 0:
        return 1.0
    values = np.linalg.svd(matrix, compute_uv=False)
    smallest = values[rank - 1] if rank <= len(values) else 0.0
    if smallest <= values[0] * max(matrix.shape) * np.finfo(np.float64).eps:
        return None
    return float(values[0] / smallest)


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
        f"(cosine up to {max(cosine for _, cosine in where):.6f}): which of the two is chosen depends on rounding"
        for pair, where in found.items()
    ]


def _condition_warnings(report: RoutingReport) -> list[str]:
    """Warnings about large condition numbers. Layers with exact duplicates are left out: their condition number is
    infinite for that reason, which another warning tells already."""
    found = [layer for layer in report.layers if not layer.duplicate_groups and _is_large(layer.condition_number)]
    alike = [layer for layer in found if _is_large(layer.difference_condition_number)]
    close = [layer for layer in found if layer.spread < SMALL_SPREAD]
    sentences = []
    if alike:
        sentences.append(
            f"the gate's condition number is {_range(layer.condition_number for layer in alike)} in "
            f"{_layers([layer.layer for layer in alike], report)}, that of its rows' differences "
            f"{_range(layer.difference_condition_number for layer in alike)}: some experts differ from others by much "
            "less than the rest do, and will be used little; give them prompts that differ more"
        )
    if close:
        sentences.append(
            f"the gate's condition number is {_range(layer.condition_number for layer in close)} in "
            f"{_layers([layer.layer for layer in close], report)}, and its rows differ by "
            f"{_range(layer.spread for layer in close)} of their length: experts' logits lie close together and weigh "
            "nearly the same; prompts that differ more, or negative prompts, separate them"
        )
    return sentences


def _is_large(condition_number: float | None) -> bool:
    return condition_number is None or condition_number > LARGE_CONDITION_NUMBER


def _range(values: Iterable[float | None]) -> str:
    texts = [f"{value:.2f}" if value is not None else "infinite" for value in sorted(values, key=_infinite_last)]
    return texts[0] if texts[0] == texts[-1] else f"{texts[0]} to {texts[-1]}"


def _infinite_last(value: float | None) -> float:
    return float("inf") if value is None else value


def _experts(experts: Iterable[int]) -> str:
    words = [str(expert) for expert in experts]
    return f"expert {words[0]}" if len(words) == 1 else f"experts {', '.join(words[:-1])} and {words[-1]}"


def _layers(layers: Sequence[int], report: RoutingReport) -> str:
    if len(layers) == len(report.layers) > 1:
        return f"all {len(layers)} layers"
    return f"layer{'s' if len(layers) > 1 else ''} {number_ranges(layers)}"


def number_ranges(numbers: Iterable[int]) -> str:
    """Whole numbers as text, with consecutive ones as a range: 0-3, 7."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
