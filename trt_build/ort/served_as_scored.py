"""Compares an engine's serving graph with its scoring graph: is what is served what was scored?

Both graphs read the same weights, so the checkpoint and the quantiser are out of the comparison. The serving graph runs
in the three ways in which a server runs it:

  chunks      a prompt in chunks of unequal lengths
  decoding    the end of it once more, one token a step
  batch       several sequences of different lengths in one step, then their next tokens together, while one more prompt
              comes in

Each difference is relative to the largest logit of the position's window. A quantised engine for the CPU is run in each
way once more with float32 activations in both graphs: without rounded activations only the order of summation differs.

Where a way fails, `where_it_begins` runs both graphs once more and has each layer's parts compared, so that the failure
names the layer and the part.

An engine of an earlier format computes each row of a step by itself and gives the logits of its last token only. So
there `chunks` compares the last position of each chunk, and `batch` shows only that slots of the cache are kept apart.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt

from export.exporter import SCORING_GRAPH, SERVING_GRAPH
from export.provider import PROVIDERS
from trt_build.comparison.parity import FloatArray
from trt_build.comparison.serving_ways import NEAR_PRECISE, NEAR_ROUNDED, ServingLimits, Way
from trt_build.ort.cache import Cache
from trt_build.ort.engine import Engine
from trt_build.ort.questions.float32 import float32_experts, with_float32_activations
from trt_build.ort.questions.layer_outputs import LayerPart, layer_parts, room_for, stored_or_float32, with_outputs
from trt_build.ort.session import ScoringSession, Session
from trt_build.ort.step_call import Row

CHUNKS = (1, 2, 127, 128, 3, 64, 65)  # at and beside the largest chunk; in turns until the window ends
BATCH = (5, 64, 17, 1)  # tokens of the sequences of a batch in their first step
LATE_TOKENS = 33  # of the sequence that comes in when the others decode
BATCH_STEPS = 6  # tokens of each sequence that are decoded together
CHUNKED_TOKENS = 512
DECODED_TOKENS = 64
PARTS_BYTES = 1 << 27  # of what parts of layers give in the scoring graph, held at a time
# Differences of what a part gives that are more than the order of summation makes, which in small models of three
# layers was 5e-7 with float32 and 5e-4 with float16 between the operations; attention scaled by 1.03 makes 4e-3 and
# 1.3e-2 where it begins.
PART_LIMITS = {"float32": 1e-4, "float16": 3e-3}


@dataclass(frozen=True, kw_only=True)
class _Compared:
    """The differences of n positions, which of them are near ties [n], and those of the routers [M, n] (None: no router
    logits) and of the parts of layers [K, n]."""

    differences: npt.NDArray[np.float64]
    ties: npt.NDArray[np.bool_]
    routers: npt.NDArray[np.float64] | None
    parts: npt.NDArray[np.float64]


@dataclass(frozen=True)
class _Given:
    """What a graph gives for n tokens: logits [n, V] (of a step those that were asked for), router logits [M, n, E]
    (None without experts), and what parts of layers give, [K, n, H]."""

    logits: FloatArray
    routed: FloatArray | None
    parts: npt.NDArray[Any]

    def of(self, tokens: slice, logits: slice) -> _Given:
        """The same of some of the tokens; `logits` are the rows of those among the logits."""
        routed = None if self.routed is None else self.routed[:, tokens]
        return _Given(self.logits[logits], routed, self.parts[:, tokens])


def compare_serving(engine: Engine, window: Sequence[int], progress: Callable[[str], None]) -> tuple[Way, ...]:
    """Run a window of at least two token ids through the scoring graph and through the serving graph in each way; of a
    quantised engine for the CPU also with float32 activations in both graphs.

    Graphs for CUDA round no activations to 8 bits. Where the CPU's kernels compute them, these must not either.
    """
    progress("scoring a window to compare the serving graph with")
    if engine.manifest.provider != "cpu":
        with float32_experts():
            return _compare(engine, window)
    served = _compare(engine, window)
    if not engine.manifest.precision.quantises or not engine.has_serving_graph:
        return served
    progress("serving the same window with float32 activations")
    with float32_experts():
        graphs = [with_float32_activations(engine.folder, file) for file in (SCORING_GRAPH, SERVING_GRAPH)]
        exact = _compare(engine, window, graphs[0], graphs[1])
    return *served, *(replace(way, name=f"{way.name}, float32 activations", exact=True) for way in exact)


def where_it_begins(
    engine: Engine, window: Sequence[int], ways: Sequence[Way], served: ServingLimits, progress: Callable[[str], None]
) -> tuple[Way, ...]:
    """`ways`, with how far the parts of layers differ, until those that miss a limit show where their differences
    begin; `served` are the limits of the engine's precision. Nothing is run if none does. The parts are compared in
    groups of at most PARTS_BYTES. An engine of an earlier format shows no parts."""
    asked = {way.name: way.begins_at(way.limits(served)) for way in ways}
    failed = {name: position for name, position in asked.items() if position is not None}
    if not engine.has_serving_graph or not failed:
        return tuple(ways)
    scoring, serving = (stored_or_float32(engine, file) for file in (SCORING_GRAPH, SERVING_GRAPH))
    parts, facts = layer_parts(scoring, serving, engine), engine.manifest.architecture
    size = max(1, PARTS_BYTES // (4 * facts.hidden_size * min(CHUNKED_TOKENS, len(window))))
    limit = PART_LIMITS[PROVIDERS[engine.manifest.provider].float_type]
    found = {way.name: way for way in ways}
    for start in range(0, len(parts), size):
        group = parts[start : start + size]
        progress(f"comparing what {len(group)} of {len(parts)} parts of the layers give")
        with float32_experts():
            compared = _compare(engine, window, with_outputs(scoring, group), with_outputs(serving, group), group)
        shown = []
        for own in compared:
            for name in {own.name, f"{own.name}, float32 activations"} & failed.keys():
                found[name] = _with_parts(found[name], own, limit)
                assert own.parts is not None
                shown.append(not (own.parts[:, failed[name]] <= limit).all())
        if all(shown):
            break
    return tuple(found[way.name] for way in ways)


def _with_parts(way: Way, more: Way, limit: float) -> Way:
    """A way with the parts that another run of it was asked for, behind those that it has."""
    assert more.parts is not None
    parts = more.parts if way.parts is None else np.concatenate([way.parts, more.parts])
    return replace(way, parts=parts, part_names=(*way.part_names, *more.part_names), part_limit=limit)


def _compare(
    engine: Engine,
    window: Sequence[int],
    scoring_graph: bytes | None = None,
    serving_graph: bytes | None = None,
    parts: Sequence[LayerPart] = (),
) -> tuple[Way, ...]:
    """The three ways, with other graphs in place of the stored ones; these must give what `parts` name."""
    tokens = list(window[:CHUNKED_TOKENS])
    starts = _starts(tokens, engine.manifest.max_sequence)
    precise = scoring_graph is not None or engine.manifest.judged_as == "fp32"
    scoring = ScoringSession(engine, content=scoring_graph)
    k, near = engine.manifest.architecture.experts_per_token, NEAR_PRECISE if precise else NEAR_ROUNDED
    scored, *alone = (_Scored(_run(scoring, sequence, parts), k, near) for sequence in (tokens, *starts))
    del scoring
    served = _Served(Session(engine, content=serving_graph), tuple(parts))
    cache = served.session.new_cache()
    in_chunks = _in_chunks(served, cache, tokens, scored)
    return _decode(served, cache, tokens, scored), in_chunks, _in_a_batch(served, starts, alone)


def _run(scoring: ScoringSession, tokens: Sequence[int], parts: Sequence[LayerPart]) -> _Given:
    hidden = scoring.engine.manifest.architecture.hidden_size
    room = room_for(scoring.backend, parts, 1, len(tokens), hidden)
    return _Given(*scoring.run(tokens, room), _stacked(room, len(tokens), hidden))


def _stacked(room: Mapping[str, npt.NDArray[Any]], num_tokens: int, hidden: int) -> npt.NDArray[Any]:
    """[K, T, H] of what parts gave."""
    return np.array(list(room.values())).reshape(len(room), num_tokens, hidden)


@dataclass(frozen=True)
class _Scored:
    """What the scoring graph gives for the S tokens of a sequence. Router logits that differ by at most `near` of the
    largest are nearly equal."""

    given: _Given
    experts_per_token: int
    near: float

    def compare(self, found: _Given, first: int) -> _Compared:
        """Compare what a step gives for the positions from `first` on, of each of which it gives logits."""
        own = slice(first, first + len(found.logits))
        expected = self.given.of(own, own)
        differences = _relative(found.logits, expected.logits, np.abs(self.given.logits).max())
        parts = _relative(found.parts, expected.parts, _largest(self.given.parts))
        if expected.routed is None or found.routed is None:
            ties = np.zeros(len(found.logits), dtype=np.bool_)
            return _Compared(differences=differences, ties=ties, routers=None, parts=parts)
        assert self.given.routed is not None
        routers = _relative(found.routed, expected.routed, _largest(self.given.routed))
        ties = self._ties(expected.routed, found.routed)
        return _Compared(differences=differences, ties=ties, routers=routers, parts=parts)

    def _ties(self, expected: FloatArray, found: FloatArray) -> npt.NDArray[np.bool_]:
        """The positions [n] at which the first router that chooses other experts has them nearly equal. Behind it other
        choices are no wonder."""
        k = self.experts_per_token
        ours, theirs = (np.argsort(-logits, axis=-1, kind="stable")[..., :k] for logits in (expected, found))
        other = (np.sort(ours, axis=-1) != np.sort(theirs, axis=-1)).any(axis=-1)
        least, least_of_theirs = (
            np.take_along_axis(expected, chosen, axis=-1).min(axis=-1) for chosen in (ours, theirs)
        )
        near = other & (least - least_of_theirs <= self.near * np.abs(expected).max(axis=(1, 2))[:, None])
        ties: npt.NDArray[np.bool_] = np.take_along_axis(near, other.argmax(axis=0)[None], axis=0)[0]
        return ties


def _relative(found: npt.NDArray[Any], expected: npt.NDArray[Any], largest: Any) -> npt.NDArray[np.float64]:  # noqa: ANN401
    """The largest difference along the last axis, over `largest`, a number or one for each row. Where values are equal
    it is 0, also if all of them are 0."""
    differences: npt.NDArray[np.float64] = np.abs(found.astype(np.float64) - expected).max(axis=-1)
    with np.errstate(divide="ignore"):  # a difference from zeros alone is infinitely large
        return np.divide(differences, largest, out=np.zeros_like(differences), where=differences != 0)


def _largest(values: npt.NDArray[Any]) -> npt.NDArray[np.float64]:
    """The largest magnitude of each of values [K, S, H], as [K, 1]."""
    return np.abs(values).max(axis=(1, 2), initial=0.0).astype(np.float64)[:, None]


@dataclass(frozen=True)
class _Served:
    """A serving graph, loaded, and the parts of layers that it gives."""

    session: Session
    parts: tuple[LayerPart, ...]

    def step(self, cache: Cache, rows: Sequence[Row]) -> _Given:
        """Take a step; the logits are those that the rows ask for, everything else is of all their tokens."""
        session, tokens = self.session, sum(len(row.token_ids) for row in rows)
        hidden = session.engine.manifest.architecture.hidden_size
        more = room_for(session.backend, self.parts, tokens, hidden)
        if session.routing is None:
            logits, routed = session.step(cache, rows, more=more).copy(), None
        else:
            room = session.routing.room(tokens)
            logits = session.step(cache, rows, router_logits=room, more=more).copy()
            routed = session.routing.in_checkpoint_order(room)
        return _Given(logits, routed, _stacked(more, tokens, hidden))


def _way(name: str, compared: Sequence[_Compared], places: Sequence[str], served: _Served, scored: _Scored) -> Way:
    session = served.session
    routers = [own.routers for own in compared if own.routers is not None]
    return Way(
        name=name,
        differences=np.concatenate([own.differences for own in compared]),
        places=tuple(places),
        ties=np.concatenate([own.ties for own in compared]),
        routers=np.concatenate(routers, axis=1) if routers else None,
        layers=() if session.routing is None else session.routing.layers,
        near=scored.near,
        parts=np.concatenate([own.parts for own in compared], axis=1) if served.parts else None,
        part_names=tuple(part.name for part in served.parts),
    )


def _in_chunks(served: _Served, cache: Cache, tokens: Sequence[int], scored: _Scored) -> Way:
    start, number = 0, 0
    compared, places = [], []
    while start < len(tokens):
        chunk = tokens[start : start + CHUNKS[number % len(CHUNKS)]]
        num_logits = len(chunk) if served.session.engine.has_serving_graph else 1
        given = served.step(cache, [Row(slot=0, token_ids=chunk, num_logits=num_logits)])
        start, number = start + len(chunk), number + 1
        compared.append(scored.compare(given, start - num_logits))
        places += [f"position {place}" for place in range(start - num_logits, start)]
    return _way("chunks", compared, places, served, scored)


def _decode(served: _Served, cache: Cache, tokens: Sequence[int], scored: _Scored) -> Way:
    """Append the last tokens one by one. The cache holds those before them since they were computed in chunks."""
    start = max(0, len(tokens) - 1 - DECODED_TOKENS)
    cache.shorten(0, start)
    compared = []
    for place in range(start, len(tokens)):
        given = served.step(cache, [Row(slot=0, token_ids=tokens[place : place + 1])])
        compared.append(scored.compare(given, place))
    return _way("decoding", compared, [f"position {place}" for place in range(start, len(tokens))], served, scored)


def _starts(tokens: Sequence[int], longest: int) -> list[list[int]]:
    """The sequences of a batch: parts of the window, each as long as its first step and what is decoded after it. The
    last is the one that comes late."""
    lengths = [min(size + BATCH_STEPS, longest) for size in BATCH] + [min(LATE_TOKENS, longest)]
    found = []
    for number, length in enumerate(lengths):
        start = number * len(tokens) // len(lengths)
        found.append([tokens[(start + place) % len(tokens)] for place in range(length)])
    return found


def _in_a_batch(served: _Served, sequences: Sequence[Sequence[int]], scored: Sequence[_Scored]) -> Way:
    """All sequences but the last in one step, then one token of each in a step. The last comes in at the third of
    these steps, into a slot between the others."""
    late = len(sequences) - 1
    slots = [0, 1, 3, 4, 2]
    cache = served.session.new_cache(slots=len(sequences))
    done = [0] * len(sequences)
    compared: list[_Compared] = []
    places: list[str] = []
    for step in range(BATCH_STEPS + 1):
        rows, spans = [], []
        for number, sequence in enumerate(sequences):
            size = 1 if step else (BATCH[number] if number != late else 0)
            if number == late:
                size = len(sequence) if step == 3 else 0
            size = min(size, len(sequence) - done[number])
            if size:
                num_logits = size if served.session.engine.has_serving_graph else 1
                chunk = sequence[done[number] : done[number] + size]
                rows.append(Row(slot=slots[number], token_ids=chunk, num_logits=num_logits))
                done[number] += size
                spans.append((number, done[number] - num_logits, done[number]))
        if not rows:
            break
        given, begin = served.step(cache, rows), 0
        for number, first, stop in spans:
            own = slice(begin, begin + stop - first)
            compared.append(scored[number].compare(given.of(own, own), first))
            places += [f"position {place} of sequence {number + 1}" for place in range(first, stop)]
            begin += stop - first
    return _way("a batch", compared, places, served, scored[0])
