"""Verifies an engine for ONNX Runtime: compares its logits and its routing with those of the reference.

First the stored weights are compared with the checkpoint's, and the scoring graph with the reference on what is stored
(`questions/`). Then the scoring graph computes every window of the text in one call. The first window also runs through
the serving graph as in a server: its last tokens, half of it or DECODED_TOKENS, are decoded one by one through the
key/value cache, and those before them are prefilled. Last, the serving graph is compared with the scoring graph of the
same engine (`served_as_scored.py`).
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from export.checkpoint.digests import source_digests
from export.checkpoint.folder import Checkpoint, open_checkpoint
from export.errors import ConfigError
from export.families import Model, read_model
from export.reference.model import Reference
from export.tokenizer.loading import Tokenizer
from export.tokenizer.surplus import model_settings
from trt_build.comparison.answers import Answer
from trt_build.comparison.cost.dropping import PricedReference
from trt_build.comparison.cost.measuring import OF_A_FAILURE, CostOptions
from trt_build.comparison.evaluation_text import EvaluationText
from trt_build.comparison.parity import (
    MIN_TOKENS,
    WINDOW_TOKENS,
    FloatArray,
    ParityReport,
    Positions,
    Verification,
    combine,
    log_softmax,
    measure,
    next_token_loss,
    positions_of,
    split_windows,
)
from trt_build.comparison.same_tokenizer import require_same_tokenizer
from trt_build.comparison.serving_ways import serving_limits
from trt_build.comparison.stopwatch import Stopwatch
from trt_build.comparison.weights.comparing import QUESTION as OF_WEIGHTS
from trt_build.errors import EngineError
from trt_build.ort.device import open_device
from trt_build.ort.engine import Engine, read_part_records, record_verification
from trt_build.ort.int8_cache.loss import ask_about_int8_cache
from trt_build.ort.questions.cost import prepare_cost
from trt_build.ort.questions.graph import QUESTION as OF_GRAPH
from trt_build.ort.questions.graph import ask_about_graph
from trt_build.ort.questions.weights import ask_about_weights
from trt_build.ort.served_as_scored import compare_serving, where_it_begins
from trt_build.ort.session import ScoringSession, Session
from trt_build.source import with_built_experts

logger = logging.getLogger(__name__)

LONG_WINDOW_TOKENS = 2048  # length of the first window: the whole context of Phi-2
DECODED_TOKENS = 256  # at most, at the end of the first window: a large model decodes a few tokens a second


class Scorer(Protocol):
    """What computes the logits that an engine is compared with, such as `export.reference.model.Reference`."""

    def run(
        self, windows: Sequence[Sequence[int]], progress: Callable[[str], None]
    ) -> Iterator[tuple[FloatArray, FloatArray | None]]:
        """Yield for each window of S token ids its logits [S, V] and the router logits [M, S, E] of the layers that
        have experts (None for a dense model)."""


def verify_engine(
    engine: Engine,
    location: str,
    text: EvaluationText,
    num_tokens: int,
    progress: Callable[[str], None],
    cost: CostOptions | None = None,
    reference: Callable[[Model], Scorer] = Reference,
) -> Verification:
    """Compare an engine with the checkpoint at `location`. The checkpoint's tokenizer encodes the text. With `cost` the
    cost of the quantiser is told apart by layer, role and expert; without it this is done where the engine misses a
    limit, by layer and role. Raises ConfigError for too little text, EngineError for another model's checkpoint, for
    another tokenizer, and for a checkpoint whose files are not those of the build. `reference` makes what the engine is
    compared with, of the checkpoint's model."""
    watch = Stopwatch()
    open_device(engine)  # raises for a missing package or device before the reference takes its time
    manifest, model = engine.manifest, read_model(open_checkpoint(location))
    settings = model_settings(model)
    model, findings = _same_model(engine, model, settings.ids.eos)
    tokenizer = require_same_tokenizer(engine.folder, manifest.tokenizer, manifest.eos_token_ids, settings)
    windows = _windows(engine, tokenizer, text.content, num_tokens)
    token_ids = [token for window in windows for token in window]
    measure_cost = None if cost is None else prepare_cost(engine, model, token_ids, cost)
    progress("checking whether the reference is what the engine was built from")
    _require_same_files(engine, model.weights.checkpoint)
    watch.ended("files")
    questions = ask(engine, model, windows[0], progress, watch)
    whole = reference(model)
    lacking = manifest.lacking_experts
    priced = PricedReference(model, lacking, whole) if lacking else None
    report, positions = _scored(engine, priced or whole, windows, progress, watch)
    price = None if priced is None else priced.price(text)
    if price is not None:
        experts = sum(map(len, lacking.values()))
        findings = (
            *findings,
            f"the engine lacks {experts} experts that the build dropped; it is compared with the model without them, "
            f"which against the whole model has {price.words}",
        )
    ways = compare_serving(engine, windows[0], progress)
    watch.ended("serving")
    if manifest.kv_cache is not None:
        progress("serving with keys and values in int8")
        questions = (*questions, ask_about_int8_cache(engine, windows))
        watch.ended("int8 cache")
    precision = manifest.judged_as
    limits = serving_limits(precision, manifest.provider)
    ways = where_it_begins(engine, windows[0], ways, limits, progress)
    watch.ended("serving")
    missed = report.failures(manifest.thresholds)
    if missed:
        measure_cost = measure_cost or prepare_cost(engine, model, token_ids, OF_A_FAILURE)
    measured = None if measure_cost is None else measure_cost(progress)
    if measured is not None:
        watch.ended("cost")
    if missed and measured is not None and (dearest := measured.dearest(manifest.thresholds.mean_kl)) is not None:
        missed.append(dearest)
    misserved = [failure for way in ways if (failure := way.failure(way.limits(limits))) is not None]
    return Verification(
        report=report,
        failures=(
            *(failure for answer in questions for failure in answer.failures),
            *missed,
            *misserved,
        ),
        findings=(*findings, *report.findings(manifest.tokenizer_size, manifest.thresholds)),
        reference=location,
        reference_is_the_source=True,
        text=text,
        windows=tuple(map(len, windows)),
        questions=questions,
        serving=ways,
        cost=measured,
        positions=positions,
        dropping=price,
        seconds=watch.seconds,
    )


def ask(
    engine: Engine, model: Model, window: Sequence[int], progress: Callable[[str], None], watch: Stopwatch
) -> tuple[Answer, ...]:
    """Ask whether an engine's weights are those of its model, and whether its graph computes what they say. Engines of
    earlier formats are not asked, since their weights may be packed for the kernels of one machine. Those whose
    engine.json names no method were quantised by another search for scales: only their graph is asked."""
    if engine.old:
        reason = f"format {engine.manifest.format_version} is not read back; build the engine again"
        return tuple(Answer(question=question, unasked=reason) for question in (OF_WEIGHTS, OF_GRAPH))
    if engine.manifest.precision.quantises and not engine.manifest.precision.names_methods:
        reason = "engine.json does not say by which method its codes were chosen; build the engine again"
        weights = Answer(question=OF_WEIGHTS, unasked=reason)
    else:
        weights = ask_about_weights(engine, model, progress)
    watch.ended("weights")
    graph = ask_about_graph(engine, model, window, progress, open_device(engine))
    watch.ended("graph")
    return weights, graph


def record(engine: Engine, verification: Verification) -> None:
    """Write the result of a verification into engine.json, in place of an earlier result. Where it failed, the text and
    the figures of the last that passed are kept under `last_passed`."""
    written, before = verification.to_json(brief=True), engine.manifest.verification
    if verification.failures and before is not None:
        passed = before.get("last_passed") if before.get("failures") else before
        written |= {"last_passed": passed} if passed is not None else {}
        if passed is before:
            logger.warning("engine.json said that %s passed; this failure is written in its place", engine.folder)
    record_verification(engine, written)


def compare(
    engine: Engine,
    reference: Scorer,
    windows: Sequence[Sequence[int]],
    progress: Callable[[str], None],
) -> ParityReport:
    """Compare an engine with its reference over windows of token ids."""
    return _scored(engine, reference, windows, progress, Stopwatch())[0]


def _scored(
    engine: Engine,
    reference: Scorer,
    windows: Sequence[Sequence[int]],
    progress: Callable[[str], None],
    watch: Stopwatch,
) -> tuple[ParityReport, Positions]:
    """The report of `compare`, and the positions that it sums up."""
    if not windows:
        raise ConfigError(f"measuring {engine.folder}: no window of at least two tokens; pass a longer text")
    scoring = ScoringSession(engine)
    experts_per_token = engine.manifest.architecture.experts_per_token
    sums, late_logits = [], np.empty(0, dtype=np.float32)
    start = max(1, len(windows[0]) // 2, len(windows[0]) - DECODED_TOKENS)
    for index, (expected, expected_routing) in enumerate(reference.run(windows, progress)):
        watch.ended("reference")
        progress(f"scored {index} of {len(windows)} windows of text")
        window = windows[index]
        found, found_routing = scoring.run(window)
        sums.append(measure(found, expected, window, found_routing, expected_routing, experts_per_token))
        if index == 0:
            late_logits = expected[start - 1 :].copy()
        watch.ended("scoring")
        del found, expected  # two windows of logits of a large vocabulary are most of the memory
    del scoring
    progress(f"scored {len(windows)} windows; decoding {len(windows[0]) - start} tokens through the cache")
    decoded = _decode(engine, windows[0], start)
    watch.ended("decoding")
    report = combine(sums, measure(decoded, late_logits, windows[0][start - 1 :]))
    return report, positions_of(windows, sums)


def perplexity(engine: Engine, windows: Sequence[Sequence[int]]) -> float:
    """exp of the mean next-token loss of an engine over windows of token ids."""
    scoring = ScoringSession(engine)
    losses = [next_token_loss(log_softmax(scoring.run(window)[0]), np.asarray(window[1:])) for window in windows]
    return float(np.exp(sum(losses) / sum(len(window) - 1 for window in windows)))


def _windows(engine: Engine, tokenizer: Tokenizer, text: str, num_tokens: int) -> list[Sequence[int]]:
    """The windows of a text. The first is as long as the context and LONG_WINDOW_TOKENS allow, so that it covers late
    positions and several prefill chunks; the others have WINDOW_TOKENS tokens. Raises ConfigError for a text that does
    not fill the first."""
    doing, longest = f"measuring {engine.folder}", engine.manifest.max_sequence
    if num_tokens < MIN_TOKENS:
        raise ConfigError(
            f"{doing}: asked for {num_tokens} tokens, expected at least {MIN_TOKENS}; ask for more tokens"
        )
    token_ids = tokenizer.encode_prompt(text)
    asked = min(num_tokens, len(token_ids))
    first = min(longest, LONG_WINDOW_TOKENS, num_tokens)
    if asked < first:
        fewer = f", or --tokens {asked}" if asked >= MIN_TOKENS else ""
        raise ConfigError(
            f"{doing}: the text has {asked} tokens, expected at least {first}, the first window of a measurement of "
            f"{num_tokens} tokens; pass a longer text{fewer}"
        )
    rest = split_windows(token_ids[first:asked], min(WINDOW_TOKENS, longest), asked - first)
    windows = [token_ids[:first], *rest] if first > 1 else []
    if not windows:
        raise ConfigError(f"measuring {engine.folder}: its context of {longest} token leaves nothing to predict")
    return windows


def _require_same_files(engine: Engine, checkpoint: Checkpoint) -> None:
    """Raise EngineError if a file of the checkpoint is not what the engine was built from."""
    runs = {name: found for record in read_part_records(engine.folder) for name, found in record.sources.items()}
    found, expected = source_digests(checkpoint, runs), engine.manifest.source.digests
    for name in sorted(found.keys() | expected.keys(), key=lambda name: (name != "config.json", name)):
        if found.get(name) != expected.get(name):
            raise EngineError(
                f"verifying {engine.folder} against {checkpoint.identity}: {name} is not what the engine was built "
                f"from (digest {_digest(found.get(name))}, in engine.json {_digest(expected.get(name))}); build the "
                "engine again, or name the checkpoint as it was"
            )


def _digest(sha256: str | None) -> str:
    return "none" if sha256 is None else f"{sha256[:12]}…"


def _same_model(engine: Engine, model: Model, end_ids: tuple[int, ...]) -> tuple[Model, tuple[str, ...]]:
    """The model with the engine's number of experts per token, which a build may override, and a finding where
    that is not the checkpoint's. Raises EngineError for another model."""
    facts = engine.manifest.architecture
    # As in a build: where no file of the checkpoint names an end token, it is the tokenizer's.
    model = dataclasses.replace(model, architecture=dataclasses.replace(model.architecture, eos_token_ids=end_ids))
    model, findings = with_built_experts(model, facts)
    if model.architecture != facts:
        different = [
            f"{field.name}: engine {getattr(facts, field.name)}, checkpoint {getattr(model.architecture, field.name)}"
            for field in dataclasses.fields(facts)
            if getattr(facts, field.name) != getattr(model.architecture, field.name)
        ]
        raise EngineError(
            f"verifying {engine.folder} against {model.weights.checkpoint.identity}: they are not the same model "
            f"({'; '.join(different)}); name the checkpoint that the engine was built from"
        )
    return model, findings


def _decode(engine: Engine, window: Sequence[int], start: int) -> FloatArray:
    """Logits [S - start + 1, V] of the serving graph: one row from prefilling the first `start` tokens of the window,
    then one row for each decoded token."""
    session = Session(engine)
    cache = session.new_cache()
    logits = np.empty((len(window) - start + 1, session.vocab_size), dtype=np.float32)
    logits[0] = session.run(cache, window[:start])
    for row, token in enumerate(window[start:], start=1):
        logits[row] = session.run(cache, [token])
    return logits
