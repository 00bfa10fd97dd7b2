"""Fits the routers of a merged mixture to texts: `moeship merge --train-gates`.

    training = GateTraining(texts=(TrainingText(name="notes.txt", content=...),))
    trained = train_gates(mixture, experts, training)
    trained.gates[3]                    # float32 [E, H]
    trained.perplexities["expert 0, code"]    # of the held-out windows: one for each text, then one for all

Each single expert computes the next-token losses of the texts. Where an expert's losses around a token are the lowest,
the routers shall choose it: a token's target is the softmax over the experts of minus the sum of the losses of the
NEIGHBOURS tokens on either side and its own. That is the posterior probability of each expert, all equally likely
before, of having written that stretch. The mixture then computes the texts layer by layer; in each layer the gate is
fitted to the targets by logistic regression on what enters the router there (logistic.py), and the layer goes on with
the fitted gate. So each layer's inputs are those that the trained gates before it make. Nothing but the gates changes.

A fifth of each text's windows, in one stretch, is held out: no gate sees it. `seed` says which of the five stretches.

Memory: what `export/reference/model.py` holds for all windows of the texts together, T*E losses, and in a layer what
`fit_rows` says. Every expert is read once, the mixture three times: before, in training, and after.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from export.errors import MergeError, named
from export.families import Model
from export.merge.logistic import Fit, fit_rows
from export.reference.model import Reference
from export.tokenizer.settings import read_settings

logger = logging.getLogger(__name__)

WINDOW_TOKENS, LEAST_WINDOW = 256, 64
STRETCHES = 5  # of the windows of a text; one of them is held out
NEIGHBOURS = 32
PENALTY = 0.1  # of 0.01, 0.1, 0.5, 2 and 10 among the best on the tiny phixtral, with few tokens and with many
MOST_STEPS = 100

Doubles = npt.NDArray[np.float64]
Windows = list[list[int]]


_BEFORE, _AFTER = "mixture, gates untrained", "mixture, gates trained"  # of `TrainedGates.perplexities`


@dataclass(frozen=True, kw_only=True)
class TrainingText:
    """A text for the gates; `name` is that of its file."""

    name: str
    content: str


@dataclass(frozen=True, kw_only=True)
class GateTraining:
    """What gates are fitted to: texts, of each of which at most `tokens` tokens are taken. `progress` is told of each
    layer."""

    texts: tuple[TrainingText, ...]
    tokens: int = 8192
    progress: Callable[[str], None] = lambda _: None


@dataclass(frozen=True, kw_only=True)
class TrainedGates:
    """Fitted gates, layer -> float32 [E, H], and what was measured.

    - `perplexities`: who -> the perplexity over the held-out windows of each text, then over all of them. The single
      experts, and the mixture before; `measured_after` adds the mixture with the trained gates as they are stored.
    - `best`: [E], the share of training tokens for which each expert has the largest target.
    - `fits`: of each layer that has experts.
    """

    gates: Mapping[int, npt.NDArray[np.float32]]
    texts: tuple[TrainingText, ...]
    num_training_tokens: tuple[int, ...]
    num_held_out_tokens: tuple[int, ...]
    perplexities: Mapping[str, tuple[float, ...]]
    best: tuple[float, ...]
    fits: tuple[Fit, ...]
    seed: int
    held_out: tuple[Windows, ...]

    @property
    def never_best(self) -> tuple[int, ...]:
        """Experts that are best for no token of the training windows."""
        return tuple(expert for expert, share in enumerate(self.best) if share == 0)

    @property
    def finding(self) -> str | None:
        """A sentence where the trained gates predict the held-out parts of all texts no better than those before."""
        before, after = (self.perplexities.get(who, (math.nan,))[-1] for who in (_BEFORE, _AFTER))
        if not after >= before:
            return None
        return (
            f"the trained gates predict the held-out parts of the texts no better than the gates before them: "
            f"perplexity {after:.3f} against {before:.3f}, from {sum(self.num_training_tokens)} tokens; take more "
            "tokens or other texts, or merge without --train-gates"
        )

    def to_json(self) -> dict[str, Any]:
        """What the merged folder keeps of the training."""
        return {
            "method": "logistic regression on the routers' inputs, targets from the single experts' next-token losses",
            "seed": self.seed,
            "neighbours": NEIGHBOURS,
            "penalty": PENALTY,
            "texts": [
                {
                    "name": text.name,
                    "sha256": hashlib.sha256(text.content.encode()).hexdigest(),
                    "training_tokens": training,
                    "held_out_tokens": held_out,
                }
                for text, training, held_out in zip(
                    self.texts, self.num_training_tokens, self.num_held_out_tokens, strict=True
                )
            ],
            "best_expert": list(self.best),
            "layers": [{"loss": fit.loss, "steps": fit.steps} for fit in self.fits],
            "held_out_perplexity": {who: list(values) for who, values in self.perplexities.items()},
        }

    def lines(self) -> list[str]:
        """The table of perplexities: a line for each expert and the mixture, a column for each text and for all."""
        names = [*(_short(text.name) for text in self.texts), "all"]
        widths = [max(9, len(name)) for name in names]
        width = max(map(len, [*self.perplexities, "held-out perplexity"]))
        lines = ["  ".join(["held-out perplexity".ljust(width), *map(str.rjust, names, widths)])]
        for who, values in self.perplexities.items():
            cells = [f"{value:.3f}".rjust(room) for value, room in zip(values, widths, strict=True)]
            lines.append("  ".join([who.ljust(width), *cells]))
        return lines


def train_gates(mixture: Model, experts: Sequence[Model], training: GateTraining, *, seed: int) -> TrainedGates:
    """Fit the gates of a merged mixture, whose checkpoint has gates already, to texts. `experts` are the dense models
    that it was merged from, in order. Raises MergeError for a text that is too short, and CheckpointError for an expert
    that cannot be computed on the tokens."""
    windows = [_windows(mixture, text, training.tokens, seed) for text in training.texts]
    taught = [window for train, _ in windows for window in train]
    held = [window for _, held_out in windows for window in held_out]
    held_by_text = tuple(held_out for _, held_out in windows)
    perplexities: dict[str, tuple[float, ...]] = {}
    found: dict[int, list[Doubles]] = {}  # a model that is given several times is computed once
    for index, expert in enumerate(experts):
        logger.info("training the gates: expert %d of %d computes the texts", index, len(experts))
        if id(expert) not in found:
            found[id(expert)] = token_losses(expert, [*taught, *held], training.progress)
        losses = found[id(expert)]
        who = f"expert {index}, {_short(expert.weights.checkpoint.identity)}"
        perplexities[who] = _perplexities(losses[len(taught) :], held_by_text)
    every = [found[id(expert)] for expert in experts]
    targets = np.concatenate(
        [_targets(np.stack([own[index] for own in every], axis=1)) for index in range(len(taught))]
    )
    del found, every
    logger.info("training the gates: the mixture computes the held-out text with its gates as they are")
    before = token_losses(mixture, held, training.progress)
    perplexities[_BEFORE] = _perplexities(before, held_by_text)
    fits: list[Fit] = []

    def fitted(_mixture: int, x: npt.NDArray[np.float32], _logits: object) -> npt.NDArray[np.float32]:
        fits.append(fit_rows(x, targets, penalty=PENALTY, most_steps=MOST_STEPS))
        logits: npt.NDArray[np.float32] = x @ fits[-1].rows.T
        return logits

    logger.info("training the gates: fitting layer by layer over %d tokens", len(targets))
    for _ in Reference(mixture).router_logits(taught, training.progress, adjust=fitted):
        pass
    layers = mixture.architecture.mixture_layers
    largest = np.argmax(targets, axis=1)
    return TrainedGates(
        gates={layer: fit.rows for layer, fit in zip(layers, fits, strict=True)},
        texts=training.texts,
        num_training_tokens=tuple(sum(map(len, train)) for train, _ in windows),
        num_held_out_tokens=tuple(sum(map(len, held_out)) for _, held_out in windows),
        perplexities=perplexities,
        best=tuple((np.bincount(largest, minlength=len(experts)) / len(largest)).tolist()),
        fits=tuple(fits),
        seed=seed,
        held_out=held_by_text,
    )


def measured_after(trained: TrainedGates, mixture: Model, progress: Callable[[str], None]) -> TrainedGates:
    """`trained` with the perplexity of the mixture whose checkpoint has the trained gates."""
    logger.info("training the gates: the mixture computes the held-out text with the trained gates")
    losses = token_losses(mixture, [window for windows in trained.held_out for window in windows], progress)
    after = {_AFTER: _perplexities(losses, trained.held_out)}
    return replace(trained, perplexities={**trained.perplexities, **after})


def token_losses(model: Model, windows: Windows, progress: Callable[[str], None]) -> list[Doubles]:
    """For each window of S tokens the losses of its next tokens in nats, [S]: that of position i is of token i + 1, and
    the last is NaN."""
    found = []
    for window, (logits, _) in zip(windows, Reference(model).run(windows, progress), strict=True):
        losses = np.full(len(window), np.nan)
        for start in range(0, len(window) - 1, NEIGHBOURS):  # few rows at a time, since float64 copies are large
            rows = slice(start, min(start + NEIGHBOURS, len(window) - 1))
            wide = logits[rows].astype(np.float64)
            wide -= wide.max(axis=1, keepdims=True)
            following = np.asarray(window[rows.start + 1 : rows.stop + 1])
            losses[rows] = np.log(np.exp(wide).sum(axis=1)) - wide[np.arange(len(wide)), following]
        found.append(losses)
    return found


def _targets(losses: Doubles) -> Doubles:
    """The targets [S, E] of a window's tokens from the experts' losses [S, E]."""
    sums = np.vstack([np.zeros(losses.shape[1]), np.cumsum(np.nan_to_num(losses), axis=0)])
    places = np.arange(len(losses))
    first, last = np.maximum(0, places - NEIGHBOURS), np.minimum(len(losses), places + NEIGHBOURS + 1)
    evidence = sums[first] - sums[last]
    evidence -= evidence.max(axis=1, keepdims=True)
    chances: Doubles = np.exp(evidence)
    chances /= chances.sum(axis=1, keepdims=True)
    return chances


def _perplexities(losses: Sequence[Doubles], by_text: Sequence[Windows]) -> tuple[float, ...]:
    """exp of the mean loss over the windows of each text, and over all. `losses` has the windows of all texts."""
    ends = list(itertools.accumulate(map(len, by_text), initial=0))
    groups = [*(losses[first:last] for first, last in itertools.pairwise(ends)), losses]
    return tuple(float(np.exp(np.nanmean(np.concatenate(group)))) for group in groups)


def _windows(mixture: Model, text: TrainingText, most: int, seed: int) -> tuple[Windows, Windows]:
    """Windows of a text to train on and to hold out: as many as `most` tokens fill, spread evenly over the text. The
    held-out ones are one of STRETCHES stretches, so at most two of its documents are in both."""
    doing = f"training gates on {named(text.name)}"
    checkpoint = mixture.weights.checkpoint
    token_ids = read_settings(checkpoint.folder, checkpoint.config).tokenizer.encode(text.content)
    longest = min(WINDOW_TOKENS, mixture.architecture.max_positions)
    available = min(len(token_ids), most)
    size = min(longest, available // STRETCHES)
    if size < min(LEAST_WINDOW, longest):
        least = STRETCHES * min(LEAST_WINDOW, longest)
        taken = f", {most} of them are taken" if most < len(token_ids) else ""
        raise MergeError(
            f"{doing}: it has {len(token_ids)} tokens{taken}, expected at least {least}: {STRETCHES} windows of "
            f"{min(LEAST_WINDOW, longest)}, one of which is held out; pass a longer text"
        )
    count = available // size
    starts = [turn * (len(token_ids) - size) // max(1, count - 1) for turn in range(count)]
    windows = [token_ids[start : start + size] for start in starts]
    stretch = (STRETCHES - 1 - seed) % STRETCHES
    first, last = stretch * count // STRETCHES, (stretch + 1) * count // STRETCHES
    return [*windows[:first], *windows[last:]], windows[first:last]


def _short(name: str) -> str:
    """The last part of a path."""
    return name.rsplit("/", 1)[-1]
