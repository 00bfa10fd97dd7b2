"""Compares an engine's serving graph with its scoring graph: is what is served what was scored?

Both graphs read the same weights, so the checkpoint and the quantiser are out of the comparison. The serving graph runs
in the three ways in which a server runs it:

  decoding    one token a step, through the cache
  chunks      a prompt in chunks of unequal lengths
  batch       several sequences of different lengths in one step, then their next tokens together, while one more prompt
              comes in

Each difference is relative to the largest logit of the position's window. A quantised engine for the CPU is run in each
way once more with float32 activations in both graphs: without rounded activations only the order of summation differs.

An engine of an earlier format computes each row of a step by itself and gives the logits of its last token only. So
there `chunks` compares the last position of each chunk, and `batch` shows only that slots of the cache are kept apart.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from export.exporter import SCORING_GRAPH, SERVING_GRAPH
from trt_build.comparison.parity import FloatArray
from trt_build.comparison.serving_ways import Way
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
    if not engine.manifest.precision.bits or not engine.has_serving_graph:
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
    decoded_from = max(1, len(tokens) - DECODED_TOKENS)
    starts = _starts(tokens, engine.manifest.max_sequence)
    scoring = ScoringSession(engine, content=scoring_graph)
    scored = scoring.run(tokens)[0]
    alone = [scoring.run(sequence)[0] for sequence in starts]
    del scoring
    session = Session(engine, content=serving_graph)
    return (
        _decode(session, tokens, decoded_from, scored),
        _in_chunks(session, tokens, scored),
        _in_a_batch(session, starts, alone),
    )


def _relative(found: FloatArray, expected: FloatArray, scale: float) -> npt.NDArray[np.float64]:
    return np.abs(found.astype(np.float64) - expected).max(axis=-1) / scale


def _scale(logits: FloatArray) -> float:
    return float(np.abs(logits).max())


def _decode(session: Session, tokens: Sequence[int], start: int, scored: FloatArray) -> Way:
    """Prefill the tokens before `start`, then append the rest one by one."""
    cache, places = session.new_cache(), range(start - 1, len(tokens))
    rows = [session.run(cache, tokens[:start]).copy()]
    rows += [session.run(cache, [token]).copy() for token in tokens[start:]]
    differences = _relative(np.stack(rows), scored[start - 1 :], _scale(scored))
    return Way(name="decoding", differences=differences, places=tuple(f"position {place}" for place in places))


def _in_chunks(session: Session, tokens: Sequence[int], scored: FloatArray) -> Way:
    cache, start, number = session.new_cache(), 0, 0
    rows, places = [], []
    while start < len(tokens):
        chunk = tokens[start : start + CHUNKS[number % len(CHUNKS)]]
        num_logits = len(chunk) if session.engine.has_serving_graph else 1
        rows.append(session.step(cache, [Row(slot=0, token_ids=chunk, num_logits=num_logits)]).copy())
        start, number = start + len(chunk), number + 1
        places += list(range(start - num_logits, start))
    differences = _relative(np.concatenate(rows), scored[places], _scale(scored))
    return Way(name="chunks", differences=differences, places=tuple(f"position {place}" for place in places))


def _starts(tokens: Sequence[int], longest: int) -> list[list[int]]:
    """The sequences of a batch: parts of the window, each as long as its first step and what is decoded after it. The
    last is the one that comes late."""
    lengths = [min(size + BATCH_STEPS, longest) for size in BATCH] + [min(LATE_TOKENS, longest)]
    found = []
    for number, length in enumerate(lengths):
        start = number * len(tokens) // len(lengths)
        found.append([tokens[(start + place) % len(tokens)] for place in range(length)])
    return found


def _in_a_batch(session: Session, sequences: Sequence[Sequence[int]], scored: Sequence[FloatArray]) -> Way:
    """All sequences but the last in one step, then one token of each in a step. The last comes in at the third of
    these steps, into a slot between the others."""
    late = len(sequences) - 1
    slots = [0, 1, 3, 4, 2]
    cache = session.new_cache(slots=len(sequences))
    done = [0] * len(sequences)
    differences: list[npt.NDArray[np.float64]] = []
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
        logits, begin = session.step(cache, rows), 0
        for number, first, stop in spans:
            found = logits[begin : begin + stop - first]
            differences.append(_relative(found, scored[number][first:stop], _scale(scored[number])))
            places += [f"position {place} of sequence {number + 1}" for place in range(first, stop)]
            begin += stop - first
    return Way(name="a batch", differences=np.concatenate(differences), places=tuple(places))
