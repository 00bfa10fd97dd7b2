"""Chooses the experts that an engine does without because a text hardly uses them, and measures what that costs.

An expert is dropped from a layer if its share of the layer's places over the text is below the bound; the layer keeps
as many experts as a token takes at least, those of the largest loads. The others route among themselves. Of the
text every fifth window is held out from the loads, and the price is measured there and on moeship's own held-out
text.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.errors import ConfigError, named
from export.exporter import ExportPlan
from export.families import Model
from export.reference.usage import LayerUsage, measure_usage, require_mixture
from export.reference.windows import text_windows
from export.routing import RoutingReport, experts_of_layers
from export.rows import in_units
from trt_build.comparison.cost.dropping import DroppingPrice, price_of
from trt_build.comparison.evaluation_text import own_text, read_texts
from trt_build.ort.engine import DroppedExperts, DroppedLayer
from trt_build.source import SourceModel

logger = logging.getLogger(__name__)

DEFAULT_TOKENS = 4096
PRICE_TOKENS = 1024  # of moeship's own text
_HELD_OUT = 5  # of so many windows the last

Experts = Mapping[int, tuple[int, ...]]  # layer -> experts


@dataclass(frozen=True, kw_only=True)
class DropOptions:
    """Experts whose load over the texts is below `below`, a share of a layer's places, are dropped. `num_tokens` of the
    texts are routed (None: DEFAULT_TOKENS)."""

    below: float
    texts: tuple[Path, ...]
    num_tokens: int | None = None

    def check(self, model: Model, keep_all_experts: bool) -> None:
        """Raise ConfigError for contradictions, and for a model whose experts cannot be dropped."""
        doing = f"dropping experts below a load of {self.below:g}"
        if not 0 < self.below < 1:
            raise ConfigError(f"{doing}: expected a share of a layer's places above 0 and below 1, for example 0.01")
        if keep_all_experts:
            raise ConfigError(f"{doing}: --keep-all-experts asks for the contrary; leave out one of the two")
        if not self.texts:
            raise ConfigError(f"{doing}: the load is measured over a text; name one with --text FILE")
        require_mixture(model.architecture, model.weights.checkpoint.identity, doing)
        if not model.architecture.router.reads_chosen_logits_alone:
            raise ConfigError(
                f"{doing}: the router of {named(model.weights.checkpoint.identity)} makes the weights of the logits of "
                "all experts, so the others' would change without them; leave --drop-below out"
            )


@dataclass(frozen=True, kw_only=True)
class Dropping:
    """What was chosen. `experts` has what is dropped, by layer, and `lacking` with it the experts of these layers that
    could never be chosen: an engine has neither."""

    options: DropOptions
    text: Mapping[str, Any]
    loads: Mapping[int, tuple[float, ...]]
    experts: Experts
    lacking: Experts
    prices: tuple[DroppingPrice, ...]

    def record(self, export: ExportPlan, model: Model) -> DroppedExperts:
        """What engine.json says of it."""
        return DroppedExperts(
            below=self.options.below,
            text=self.text,
            layers={
                str(layer): DroppedLayer(load=load, experts=self.experts.get(layer, ()))
                for layer, load in self.loads.items()
            },
            prices=self.prices,
            saved_bytes=self._saved_bytes(export, model),
        )

    def _saved_bytes(self, export: ExportPlan, model: Model) -> int:
        rows = {name: experts for layer, experts in self.experts.items() for name in model.mixture_rows(layer)}
        return sum(
            sum(output.num_bytes for output in job.outputs) // len(job.expert_order) * len(rows[job.source])
            for job in export.jobs
            if job.source in rows and job.expert_order and model.weights.table[job.source].stacks_experts
        )


def dropping_notes(record: DroppedExperts, report: RoutingReport) -> list[str]:
    """Sentences for whoever builds or plans the engine."""
    over = f"over {record.text['tokens']} tokens of {', '.join(record.text['names'])}"
    experts = {int(layer): found.experts for layer, found in record.layers.items() if found.experts}
    if not experts:
        return [f"dropped: no expert, since none has a load below {record.below:.2%} {over}"]
    return [
        f"dropped: {experts_of_layers(report, experts)}: their load is below {record.below:.2%} of their layers' "
        f"places {over}; this saves {in_units(record.saved_bytes)}",
        *(f"without them, against the whole model: {price.words}" for price in record.prices),
    ]


def choose_dropped(usage: LayerUsage, dead: tuple[int, ...], below: float) -> tuple[int, ...]:
    """The experts of a layer to drop, in ascending order. `dead` ones, which can never be chosen, are left out
    already."""
    load = usage.load.tolist()
    alive = sorted((expert for expert in range(len(load)) if expert not in dead), key=lambda one: (load[one], -one))
    room = len(alive) - usage.experts_per_token
    return tuple(sorted(expert for expert in alive[: max(0, room)] if load[expert] < below))


def choose_dropping(source: SourceModel, options: DropOptions, dead: Experts) -> Dropping:
    """Measure the loads and the price. Raises ConfigError for a text that is too short."""
    model, longest = source.model, source.max_sequence
    doing = f"measuring the load of the experts of {named(source.checkpoint.identity)}"
    text = read_texts(options.texts)
    tokens = source.tokenizer.encode_prompt(text.content)
    windows = text_windows(tokens, options.num_tokens or DEFAULT_TOKENS, longest, doing, "--drop-tokens")
    held_out = windows[_HELD_OUT - 1 :: _HELD_OUT]
    routed = [window for number, window in enumerate(windows, start=1) if number % _HELD_OUT]
    logger.info("%s over %d tokens", doing, sum(map(len, routed)))
    usage = measure_usage(model, routed)
    found = {layer.layer: choose_dropped(layer, dead.get(layer.layer, ()), options.below) for layer in usage.layers}
    experts = {layer: chosen for layer, chosen in found.items() if chosen}
    lacking = {layer: tuple(sorted({*chosen, *dead.get(layer, ())})) for layer, chosen in experts.items()}
    prices = []
    if experts:
        own = own_text()
        own_windows = text_windows(source.tokenizer.encode_prompt(own.content), PRICE_TOKENS, longest, doing)
        logger.info("measuring the price of dropping %d experts", sum(map(len, experts.values())))
        prices = [price_of(model, lacking, some, of) for some, of in ((held_out, text), (own_windows, own)) if some]
    return Dropping(
        options=options,
        text={**text.to_json(), "tokens": sum(map(len, routed))},
        loads={layer.layer: tuple(round(share, 6) for share in layer.load.tolist()) for layer in usage.layers},
        experts=experts,
        lacking=lacking,
        prices=tuple(prices),
    )
