"""Compares an engine's serving graph with its scoring graph: is what is served what was scored?

Both graphs read the same weights, so the checkpoint and the quantiser are out of the comparison. The serving graph runs
in the three ways in which a server runs it:

  chunks      a prompt in chunks of unequal lengths
  decoding    the end of it once more, one token a step
  batch       several sequences of different lengths in one step, then their next tokens together, while one more prompt
              comes in

Each difference is relative to the largest logit of the position's window. A quantised engine for the CPU is run in each
way once more with float32 activations in both graphs: without rounded activations only the order of summation differs.

Where a way fails, `where_it_begins` runs it once more, up to the position that the failure names, and has each layer's
parts compared there, so that the failure names the layer and the part.

An engine of an earlier format computes each row of a step by itself and gives the logits of its last token only. So
there `chunks` compares the last position of each chunk, and `batch` shows only that slots of the cache are kept apart.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
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
from trt_build.ort.questions.layer_outputs import (
    PART_LIMITS,
    LayerPart,
    groups_of,
    layer_parts,
    room_for,
    stored_or_float32,
    with_outputs,
)
from trt_build.ort.session import ScoringSession, Session
from trt_build.ort.step_call import Row

CHUNKS = (1, 2, 127, 128, 3, 64, 65)  # at and beside the largest chunk; in turns until the window ends
BATCH = (5, 64, 17, 1)  # tokens of the sequences of a batch in their first step
LATE_TOKENS = 33  # of the sequence that comes in when the others decode
BATCH_STEPS = 6  # tokens of each sequence that are decoded together
CHUNKED_TOKENS = 512
DECODED_TOKENS = 64
CHUNKED, DECODED, BATCHED = "chunks", "decoding", "a batch"  # the ways
_END = 1 << 30  # behind every position
EXACT = ", float32 activations"  # behind the name of a way that both graphs run with them


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
    (None without experts), and what each of K parts of layers gives, [n, H]."""

    logits: FloatArray
    routed: FloatArray | None
    parts: tuple[npt.NDArray[Any], ...]

    def of(self, tokens: slice, logits: slice) -> _Given:
        """The same of some of the tokens; `logits` are the rows of those among the logits."""
        routed = None if self.routed is None else self.routed[:, tokens]
        return _Given(self.logits[logits], routed, tuple(part[tokens] for part in self.parts))


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
    return *served, *(replace(way, name=way.name + EXACT, exact=True) for way in exact)


def where_it_begins(
    engine: Engine, window: Sequence[int], ways: Sequence[Way], served: ServingLimits, progress: Callable[[str], None]
) -> tuple[Way, ...]:
    """`ways`; those that miss a limit with how far the parts of layers differ at each position up to the one that the
    failure names. `served` are the limits of the engine's precision. Nothing is run if none misses its own. The parts
    are compared in groups of at most PARTS_BYTES, until each way shows where its difference begins. An engine of an
    earlier format shows no parts."""
    asked = {way.name: way.begins_at(way.limits(served)) for way in ways}
    failed = {name: position for name, position in asked.items() if position is not None}
    if not engine.has_serving_graph or not failed:
        return tuple(ways)
    scoring, serving = (stored_or_float32(engine, file) for file in (SCORING_GRAPH, SERVING_GRAPH))
    parts, facts = layer_parts(engine, scoring, serving), engine.manifest.architecture
    until: dict[str, int] = {}  # with the same graphs, a way and its run with float32 activations are one
    for name, position in failed.items():
        way = name.removesuffix(EXACT)
        until[way] = max(position, until.get(way, 0))
    limit = PART_LIMITS[PROVIDERS[engine.manifest.provider].float_type]
    found = {way.name: way for way in ways}
    for group in groups_of(parts, facts.hidden_size, min(CHUNKED_TOKENS, len(window))):
        progress(f"comparing what {len(group)} of {len(parts)} parts of the layers give")
        with float32_experts():
            graphs = with_outputs(scoring, group), with_outputs(serving, group)
            compared = _compare(engine, window, *graphs, parts=group, until=until)
        shown = []
        for own in compared:
            for name in {own.name, own.name + EXACT} & failed.keys():
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
    until: Mapping[str, int] | None = None,
) -> tuple[Way, ...]:
    """The three ways, with other graphs in place of the stored ones; these must give what `parts` name. With `until`
    only the ways that it names, each up to one of its positions, and what that position needs."""
    tokens = list(window[:CHUNKED_TOKENS])
    until = dict.fromkeys((DECODED, CHUNKED, BATCHED), _END) if until is None else until
    first = max(0, len(tokens) - 1 - DECODED_TOKENS)
    decoded = range(first, len(tokens))[: until.get(DECODED, -1) + 1]
    num_chunked = max(until.get(CHUNKED, -1) + 1, first if decoded else 0)
    chunks = [chunk for chunk in _chunks(len(tokens)) if chunk.start < num_chunked]
    num_scored = max([0, *(span.stop for span in (*chunks, decoded) if span)])
    starts = _starts(tokens, engine.manifest.max_sequence) if BATCHED in until else []
    precise = scoring_graph is not None or engine.manifest.judged_as == "fp32"
    scoring = ScoringSession(engine, content=scoring_graph)
    k, near = engine.manifest.architecture.experts_per_token, NEAR_PRECISE if precise else NEAR_ROUNDED
    scored, alone = (
        [_Scored(_run(scoring, sequence, parts), k, near) for sequence in sequences if sequence]
        for sequences in ([tokens[:num_scored]], starts)
    )
    del scoring
    served, found = _Served(Session(engine, content=serving_graph), tuple(parts)), []
    if scored:
        cache = served.session.new_cache()
        in_chunks = _in_chunks(served, cache, tokens, chunks, scored[0])
        found += [_decode(served, cache, tokens, decoded, scored[0])] if decoded else []
        found += [in_chunks] if in_chunks is not None and CHUNKED in until else []
    if starts:
        found.append(_in_a_batch(served, starts, alone, until[BATCHED]))
    return tuple(found)


def _chunks(num_tokens: int) -> Iterator[range]:
    """The positions of each chunk of a prompt."""
    start = 0
    for size in itertools.cycle(CHUNKS):
        if start >= num_tokens:
            return
        yield range(start, min(start + size, num_tokens))
        start += size


def _run(scoring: ScoringSession, tokens: Sequence[int], parts: Sequence[LayerPart]) -> _Given:
    room = room_for(scoring.backend, parts, 1, len(tokens), scoring.engine.manifest.architecture.hidden_size)
    return _Given(*scoring.run(tokens, room), tuple(part[0] for part in room.values()))


@dataclass(frozen=True)
class _Scored:
    """What the scoring graph gives for the S tokens of a sequence. Router logits that differ by at most `near` of the
    largest are nearly equal."""

    given: _Given
    experts_per_token: int
    near: float

    @cached_property
    def largest_of_parts(self) -> tuple[float, ...]:
        """The largest magnitude that each part gives."""
        return tuple(abs(float(np.maximum(part.max(), -part.min()))) for part in self.given.parts)

    def compare(self, found: _Given, first: int) -> _Compared:
        """Compare what a step gives for the positions from `first` on, of each of which it gives logits."""
        own = slice(first, first + len(found.logits))
        expected = self.given.of(own, own)
        differences = _relative(found.logits, expected.logits, np.abs(self.given.logits).max())
        values = zip(found.parts, expected.parts, self.largest_of_parts, strict=True)
        parts = np.array([_relative(*each) for each in values]).reshape(len(found.parts), len(found.logits))
        if expected.routed is None or found.routed is None:
            ties = np.zeros(len(found.logits), dtype=np.bool_)
            return _Compared(differences=differences, ties=ties, routers=None, parts=parts)
        assert self.given.routed is not None
        largest = np.abs(self.given.routed).max(axis=(1, 2), initial=0.0).astype(np.float64)[:, None]
        routers = _relative(found.routed, expected.routed, largest)
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
        return _Given(logits, routed, tuple(more.values()))


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


def _in_chunks(
    served: _Served, cache: Cache, tokens: Sequence[int], chunks: Sequence[range], scored: _Scored
) -> Way | None:
    """None without chunks."""
    compared, places = [], []
    for chunk in chunks:
        num_logits = len(chunk) if served.session.engine.has_serving_graph else 1
        row = Row(slot=0, token_ids=tokens[chunk.start : chunk.stop], num_logits=num_logits)
        compared.append(scored.compare(served.step(cache, [row]), chunk.stop - num_logits))
        places += [f"position {place}" for place in chunk[-num_logits:]]
    return _way(CHUNKED, compared, places, served, scored) if compared else None


def _decode(served: _Served, cache: Cache, tokens: Sequence[int], decoded: range, scored: _Scored) -> Way:
    """Append tokens one by one. The cache holds those before them since they were computed in chunks."""
    cache.shorten(0, decoded.start)
    compared = []
    for place in decoded:
        given = served.step(cache, [Row(slot=0, token_ids=tokens[place : place + 1])])
        compared.append(scored.compare(given, place))
    return _way(DECODED, compared, [f"position {place}" for place in decoded], served, scored)


def _starts(tokens: Sequence[int], longest: int) -> list[list[int]]:
    """The sequences of a batch: parts of the window, each as long as its first step and what is decoded after it. The
    last is the one that comes late."""
    lengths = [min(size + BATCH_STEPS, longest) for size in BATCH] + [min(LATE_TOKENS, longest)]
    found = []
    for number, length in enumerate(lengths):
        start = number * len(tokens) // len(lengths)
        found.append([tokens[(start + place) % len(tokens)] for place in range(length)])
    return found


def _in_a_batch(
    served: _Served, sequences: Sequence[Sequence[int]], scored: Sequence[_Scored], until: int = _END
) -> Way:
    """All sequences but the last in one step, then one token of each in a step, up to the step that has the position
    `until`. The last comes in at the third of these steps, into a slot between the others."""
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
        if not rows or len(places) > until:
            break
        given, begin = served.step(cache, rows), 0
        for number, first, stop in spans:
            own = slice(begin, begin + stop - first)
            compared.append(scored[number].compare(given.of(own, own), first))
            places += [f"position {place} of sequence {number + 1}" for place in range(first, stop)]
            begin += stop - first
    return _way(BATCHED, compared, places, served, scored[0])
