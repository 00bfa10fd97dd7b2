"""Compares an engine's serving graph with its scoring graph: is what is served what was scored?

Both graphs read the same weights, so the checkpoint and the quantiser are out of the comparison. The serving graph runs
in the three ways in which a server runs it:

  chunks      a prompt in chunks of unequal lengths
  decoding    the end of it once more, one token a step
  batch       several sequences of different lengths in one step, then their next tokens together, while one more prompt
              comes in

Each difference is relative to the largest logit of the position's window. A quantised engine for the CPU is run in each
way once more with float32 activations in both graphs: without rounded activations only the order of summation differs.

An engine of an earlier format computes each row of a step by itself and gives the logits of its last token only. So
there `chunks` compares the last position of each chunk, and `batch` shows only that slots of the cache are kept apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from export.exporter import SCORING_GRAPH, SERVING_GRAPH
from trt_build.comparison.parity import FloatArray
from trt_build.comparison.serving_ways import NEAR_PRECISE, NEAR_ROUNDED, Way
from trt_build.ort.cache import Cache
from trt_build.ort.engine import Engine
from trt_build.ort.questions.float32 import float32_experts, with_float32_activations
from trt_build.ort.session import ScoringSession, Session
from trt_build.ort.step_call import Row

CHUNKS = (1, 2, 127, 128, 3, 64, 65)  # at and beside the largest chunk; in turns until the window ends
BATCH = (5, 64, 17, 1)  # tokens of the sequences of a batch in their first step
LATE_TOKENS = 33  # of the sequence that comes in when the others decode
BATCH_STEPS = 6  # tokens of each sequence that are decoded together
CHUNKED_TOKENS = 512
DECODED_TOKENS = 64


@dataclass(frozen=True, kw_only=True)
class _Compared:
    """The differences of n positions, which of them are near ties [n], and those of the routers [M, n] (None: no router
    logits)."""

    differences: npt.NDArray[np.float64]
    ties: npt.NDArray[np.bool_]
    routers: npt.NDArray[np.float64] | None


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
        exact = _compare(
            engine, window, *(with_float32_activations(engine.folder, file) for file in (SCORING_GRAPH, SERVING_GRAPH))
        )
    return *served, *(replace(way, name=f"{way.name}, float32 activations", exact=True) for way in exact)


def _compare(
    engine: Engine, window: Sequence[int], scoring_graph: bytes | None = None, serving_graph: bytes | None = None
) -> tuple[Way, ...]:
    """The three ways, with other graphs in place of the stored ones."""
    tokens = list(window[:CHUNKED_TOKENS])
    starts = _starts(tokens, engine.manifest.max_sequence)
    precise = scoring_graph is not None or engine.manifest.judged_as == "fp32"
    scoring = ScoringSession(engine, content=scoring_graph)
    k, near = engine.manifest.architecture.experts_per_token, NEAR_PRECISE if precise else NEAR_ROUNDED
    scored, *alone = (_Scored(*scoring.run(sequence), k, near) for sequence in (tokens, *starts))
    del scoring
    session = Session(engine, content=serving_graph)
    cache = session.new_cache()
    in_chunks = _in_chunks(session, cache, tokens, scored)
    return _decode(session, cache, tokens, scored), in_chunks, _in_a_batch(session, starts, alone)


@dataclass(frozen=True)
class _Scored:
    """What the scoring graph gives for a sequence: logits [S, V] and router logits [M, S, E] (None without experts).
    Router logits that differ by `near` of the largest at most are nearly equal."""

    logits: FloatArray
    routed: FloatArray | None
    experts_per_token: int
    near: float

    def compare(self, found: FloatArray, routed: FloatArray | None, first: int) -> _Compared:
        """Compare logits [n, V] of the positions from `first` on, and their router logits [M, n, E]."""
        own = slice(first, first + len(found))
        differences = np.abs(found.astype(np.float64) - self.logits[own]).max(axis=-1) / np.abs(self.logits).max()
        if self.routed is None or routed is None:
            return _Compared(differences=differences, ties=np.zeros(len(found), dtype=np.bool_), routers=None)
        largest = np.abs(self.routed).max(axis=(1, 2))[:, None]
        routers = np.abs(routed.astype(np.float64) - self.routed[:, own]).max(axis=-1) / largest
        return _Compared(differences=differences, ties=self._ties(self.routed[:, own], routed), routers=routers)

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


def _step(session: Session, cache: Cache, rows: Sequence[Row]) -> tuple[FloatArray, FloatArray | None]:
    """Take a step; returns the logits that the rows ask for, and the router logits [M, T, E] of all their tokens (None
    without experts)."""
    if session.routing is None:
        return session.step(cache, rows).copy(), None
    room = session.routing.room(sum(len(row.token_ids) for row in rows))
    logits = session.step(cache, rows, router_logits=room).copy()
    return logits, session.routing.in_checkpoint_order(room)


def _way(name: str, compared: Sequence[_Compared], places: Sequence[str], session: Session, scored: _Scored) -> Way:
    routers = [own.routers for own in compared if own.routers is not None]
    return Way(
        name=name,
        differences=np.concatenate([own.differences for own in compared]),
        places=tuple(places),
        ties=np.concatenate([own.ties for own in compared]),
        routers=np.concatenate(routers, axis=1) if routers else None,
        layers=() if session.routing is None else session.routing.layers,
        near=scored.near,
    )


def _in_chunks(session: Session, cache: Cache, tokens: Sequence[int], scored: _Scored) -> Way:
    start, number = 0, 0
    compared, places = [], []
    while start < len(tokens):
        chunk = tokens[start : start + CHUNKS[number % len(CHUNKS)]]
        num_logits = len(chunk) if session.engine.has_serving_graph else 1
        logits, routed = _step(session, cache, [Row(slot=0, token_ids=chunk, num_logits=num_logits)])
        start, number = start + len(chunk), number + 1
        compared.append(scored.compare(logits, routed, start - num_logits))
        places += [f"position {place}" for place in range(start - num_logits, start)]
    return _way("chunks", compared, places, session, scored)


def _decode(session: Session, cache: Cache, tokens: Sequence[int], scored: _Scored) -> Way:
    """Append the last tokens one by one. The cache holds those before them since they were computed in chunks."""
    start = max(0, len(tokens) - 1 - DECODED_TOKENS)
    cache.shorten(0, start)
    compared = []
    for place in range(start, len(tokens)):
        logits, routed = _step(session, cache, [Row(slot=0, token_ids=tokens[place : place + 1])])
        compared.append(scored.compare(logits, routed, place))
    return _way("decoding", compared, [f"position {place}" for place in range(start, len(tokens))], session, scored)


def _starts(tokens: Sequence[int], longest: int) -> list[list[int]]:
    """The sequences of a batch: parts of the window, each as long as its first step and what is decoded after it. The
    last is the one that comes late."""
    lengths = [min(size + BATCH_STEPS, longest) for size in BATCH] + [min(LATE_TOKENS, longest)]
    found = []
    for number, length in enumerate(lengths):
        start = number * len(tokens) // len(lengths)
        found.append([tokens[(start + place) % len(tokens)] for place in range(length)])
    return found


def _in_a_batch(session: Session, sequences: Sequence[Sequence[int]], scored: Sequence[_Scored]) -> Way:
    """All sequences but the last in one step, then one token of each in a step. The last comes in at the third of
    these steps, into a slot between the others."""
    late = len(sequences) - 1
    slots = [0, 1, 3, 4, 2]
    cache = session.new_cache(slots=len(sequences))
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
                num_logits = size if session.engine.has_serving_graph else 1
                chunk = sequence[done[number] : done[number] + size]
                rows.append(Row(slot=slots[number], token_ids=chunk, num_logits=num_logits))
                done[number] += size
                spans.append((number, done[number] - num_logits, done[number]))
        if not rows:
            break
        (logits, routed), begin = _step(session, cache, rows), 0
        for number, first, stop in spans:
            own = slice(begin, begin + stop - first)
            routers = None if routed is None else routed[:, own]
            compared.append(scored[number].compare(logits[own], routers, first))
            places += [f"position {place} of sequence {number + 1}" for place in range(first, stop)]
            begin += stop - first
    return _way("a batch", compared, places, session, scored[0])
