"""Says before a merge what it makes, what each expert loses, which experts are dead, and what the merge needs.

    explanation = explain_merge(read_merge_config(Path("merge.yml")))
    explanation.experts[1].lost["attention"]      # |expert - base| / |base| of all that the merge drops of it there

Everything that a merge drops of an expert is read, in chunks, and compared with the base's. Nothing is written.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from export import routing
from export.checkpoint.tensor_table import CHUNK_ELEMENTS, Role
from export.families import Model
from export.merge.adapters import AdaptedCheckpoint
from export.merge.checks import differences_by_role, facts_of_the_base
from export.merge.config import GateMode, MergeConfig
from export.merge.gates import gate_matrices, prompts_of
from export.merge.layout import MergeSources
from export.merge.plan import MergePlan, plan_merge
from export.rows import Rows, in_units

logger = logging.getLogger(__name__)

_MEASURED_BYTES = 1 << 26  # of the output: what is read and converted to measure a rate
_HELD_CHUNKS = 8  # chunks in float32 that reading, converting and writing hold at a time


@dataclass(frozen=True, kw_only=True)
class ExpertLoss:
    """What a merge drops of an expert. `lost`: role -> |expert - base| / |base| over all weights of that role that are
    taken from the base; `facts`: numbers in which the expert differs, its own and the base's."""

    model: str
    is_base: bool
    lost: Mapping[str, float]
    facts: Mapping[str, tuple[object, object]]


@dataclass(frozen=True, kw_only=True)
class MergeExplanation:
    """A merge that has not run. Bytes are of tensors, without headers.

    - `experts`: a shared expert comes after the `num_experts` others.
    - `equal_gates`: groups of experts whose gate rows will be equal; `never_chosen`: those that no input can choose.
    - `memory_bytes`: beside the interpreter and its libraries.
    - `seconds`: of reading and converting, at `bytes_per_second`, which was measured; `gate_seconds`: of computing
      the gates. Writing is not in them.
    """

    family: str
    sources: str
    dtype: str
    num_experts: int
    experts_per_token: int
    num_parameters: int
    active_parameters: int
    num_tensors: int
    num_bytes: int
    read_bytes: int
    gate_mode: str
    equal_gates: tuple[tuple[int, ...], ...]
    never_chosen: tuple[int, ...]
    experts: tuple[ExpertLoss, ...]
    notes: tuple[str, ...]
    memory_bytes: int
    bytes_per_second: float
    seconds: float
    gate_seconds: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def tables(self) -> list[tuple[str, Rows]]:
        """The explanation as headings and rows."""
        made: Rows = [
            ("experts", f"{self.num_experts}, {self.experts_per_token} per token"),
            ("parameters", f"{self.num_parameters:,}"),
            ("active per token", f"{self.active_parameters:,}"),
            ("tensors", f"{self.num_tensors:,}, {self.dtype}"),
            ("bytes on disk", f"{self.num_bytes:,} ({in_units(self.num_bytes)})"),
        ]
        needs: Rows = [
            ("reads", in_units(self.read_bytes)),
            ("memory", f"{in_units(self.memory_bytes)} beside the interpreter's"),
            ("gates", f"{self.gate_mode}, about {self.gate_seconds:.1f} s"),
            (
                "reading and converting",
                f"about {self.seconds:.1f} s, at {in_units(int(self.bytes_per_second))} a second as measured; writing "
                "as much comes on top",
            ),
        ]
        tables = [(f"a {self.family} of {self.sources} models", made)]
        for index, expert in enumerate(self.experts):
            who = f"expert {index}" if index < self.num_experts else "the shared expert"
            tables.append((f"{who}: {expert.model}", _loss_rows(expert)))
        tables.append(("the router", self._router_rows()))
        tables.append(("the merge", needs))
        if self.notes:
            tables.append(("notes", [("", note) for note in self.notes]))
        return tables

    def _router_rows(self) -> Rows:
        groups = "; ".join(" and ".join(map(str, group)) for group in self.equal_gates)
        dead = ", ".join(map(str, self.never_chosen))
        return [
            ("equal gate rows", f"experts {groups}" if groups else "none"),
            (
                "never chosen",
                f"experts {dead}, whose rows equal those of experts before them" if dead else "none proved",
            ),
        ]


def _loss_rows(expert: ExpertLoss) -> Rows:
    if expert.is_base:
        return [("loses", "nothing: it is the base")]
    lost = [(f"loses of {role}", f"{value:.3g} of the base's size") for role, value in expert.lost.items() if value]
    facts = [(f"has {name}", f"{own}, the mixture {theirs}") for name, (own, theirs) in expert.facts.items()]
    return [*lost, *facts] or [("loses", "nothing: outside its MLPs it equals the base")]


def explain_merge(config: MergeConfig) -> MergeExplanation:
    """Explain a merge. Raises what `merge` raises before it writes."""
    plan = plan_merge(config)
    groups = _equal_gates(config, plan.base)
    per_token = config.experts_per_token
    rate = _measured_rate(config, plan)
    experts = []
    for index, (expert, setting) in enumerate(zip(plan.all_experts, config.all_experts, strict=True)):
        logger.info("comparing %s with the base (%d of %d)", config.name_of(index), index + 1, len(plan.all_experts))
        experts.append(
            ExpertLoss(
                model=str(setting.model),
                is_base=expert is plan.base,
                lost={} if expert is plan.base else differences_by_role(plan.base, expert),
                facts=facts_of_the_base(plan.base, expert),
            )
        )
    number = len(plan.experts)
    routed = [tensor for tensor in plan.tensors if tensor.expert is not None and tensor.expert < number]
    per_expert = sum(tensor.planned.num_elements for tensor in routed) // number
    return MergeExplanation(
        family=plan.output.name,
        sources=plan.base.family.name,
        dtype=plan.dtype,
        num_experts=number,
        experts_per_token=per_token,
        num_parameters=plan.num_parameters,
        active_parameters=plan.num_parameters - (number - per_token) * per_expert,
        num_tensors=len(plan.tensors),
        num_bytes=plan.num_bytes,
        read_bytes=_read_bytes(plan),
        gate_mode=config.gate_mode.value,
        equal_gates=tuple(group for group in groups if len(group) > 1),
        never_chosen=tuple(sorted(expert for group in groups for expert in group[per_token:])),
        experts=tuple(experts),
        notes=tuple(_notes(config, plan)),
        memory_bytes=_memory_bytes(config, plan),
        bytes_per_second=rate,
        seconds=plan.num_bytes / rate,
        gate_seconds=_gate_seconds(config, plan, rate),
    )


def _equal_gates(config: MergeConfig, base: Model) -> list[tuple[int, ...]]:
    """The experts in groups whose gate rows will be equal: those with the same tokens in their prompts."""
    if not config.gate_mode.reads_prompts:
        return [(expert,) for expert in range(len(config.experts))]
    sides = prompts_of(config, base)
    rows: dict[object, list[int]] = {}
    for expert, prompts in zip(range(len(config.experts)), zip(*sides, strict=True), strict=False):
        if config.gate_mode is GateMode.CHEAP_EMBED:  # sums of embeddings, in any order
            key: object = tuple(tuple(sorted(token for prompt in side for token in prompt)) for side in prompts)
        else:
            key = tuple(tuple(sorted(map(tuple, side))) for side in prompts)
        rows.setdefault(key, []).append(expert)
    return [tuple(group) for group in rows.values()]


def _notes(config: MergeConfig, plan: MergePlan) -> list[str]:
    notes = []
    if plan.base.architecture.sliding_window is not None and plan.output.drops_window:
        notes.append(f"the base has a sliding window of {plan.base.architecture.sliding_window}, the mixture none")
    if config.gate_mode is GateMode.CHEAP_EMBED:  # cheap enough to be computed here
        gates = gate_matrices(config, plan.base, seed=0)
        routers = {layer: gate[: len(config.experts)] for layer, gate in gates.items()}
        report = routing.diagnose(routers, config.experts_per_token)
        notes += routing.warnings(report)
    for index, expert in enumerate(config.all_experts):
        if config.gate_mode.reads_prompts and not any(expert.positive_prompts):
            who = config.name_of(index)
            notes.append(f"{who} has only empty prompts: its gate row comes from the start token alone")
    return notes


def _read_bytes(plan: MergePlan) -> int:
    """Bytes that the merge reads of the models, each time it reads them."""
    total = 0
    for tensor in plan.tensors:
        if tensor.row is not None:
            model = plan.base if tensor.expert is None else plan.all_experts[tensor.expert]
            parts = model.weights.table[tensor.row].parts
            for part in parts if tensor.part is None else [parts[tensor.part]]:
                total += part.num_elements * model.weights.checkpoint.tensors[part.name].itemsize
    return total


def _measured_rate(config: MergeConfig, plan: MergePlan) -> float:
    """Bytes of the output that are read and converted in a second, measured on tensors of the experts."""
    sources = MergeSources(base=plan.base, experts=plan.all_experts, settings=config.all_experts, gates={}, seed=0)
    done, started = 0, time.perf_counter()
    for tensor in plan.tensors:
        if tensor.expert is not None and tensor.row is not None:
            for chunk in sources.chunks(tensor):
                done += chunk.nbytes
                if done >= _MEASURED_BYTES:
                    return done / (time.perf_counter() - started)
    return done / max(time.perf_counter() - started, 1e-9)


def _num_tokens(config: MergeConfig, plan: MergePlan) -> int:
    if not config.gate_mode.reads_prompts:
        return 0
    return sum(len(prompt) for side in prompts_of(config, plan.base) for group in side for prompt in group)


def _memory_bytes(config: MergeConfig, plan: MergePlan) -> int:
    """Values in float32: chunks on their way, gates, an adapter's matrix, and what the reference holds for gates of
    hidden states (export/reference/model.py)."""
    facts, hidden = plan.architecture, plan.architecture.hidden_size
    values = _HELD_CHUNKS * CHUNK_ELEMENTS + 2 * facts.num_layers * len(config.all_experts) * hidden
    adapted = [
        model.weights.checkpoint.adapter.checkpoint
        for model in (plan.base, *plan.all_experts)
        if isinstance(model.weights.checkpoint, AdaptedCheckpoint)
    ]
    values += max((stored.num_bytes for adapter in adapted for stored in adapter.tensors.values()), default=0)
    if config.gate_mode.reads_prompts and config.gate_mode is not GateMode.CHEAP_EMBED:
        attention = sum(facts.qkv_rows) * hidden + facts.qkv_rows[0] * hidden
        mlp = sum(
            plan.base.weights.table[tensor.row].num_elements
            for tensor in plan.tensors
            if tensor.row is not None and tensor.expert == 0 and tensor.layer == 0
        )
        values += max(attention, mlp) + 6 * _num_tokens(config, plan) * hidden
    return 4 * values


def _gate_seconds(config: MergeConfig, plan: MergePlan, rate: float) -> float:
    """The base's products for every token of the prompts, at the measured speed of a product, and reading it once."""
    if not config.gate_mode.reads_prompts or config.gate_mode is GateMode.CHEAP_EMBED:
        return 0.0
    table = plan.base.weights.table
    values = sum(spec.num_elements for spec in table.values() if spec.role in (Role.ATTENTION, Role.FFN))
    square = np.ones((1024, 1024), dtype=np.float32)
    square @ square
    started = time.perf_counter()
    square @ square
    per_second = 2 * 1024**3 / (time.perf_counter() - started)
    return 2.0 * values * _num_tokens(config, plan) / per_second + 4 * values / rate
