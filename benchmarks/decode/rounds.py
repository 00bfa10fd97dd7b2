"""Runs the contenders in turns, one process at a time, and collects their figures.

First each choice of settings gets a trial turn that does not count. Then come the rounds. Each round has another order
of contenders and begins with a measurement of the machine's bandwidth. A contender that fails is left out of later
rounds, and the reason is recorded.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import resource
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from decode import machine
from decode.entrants import Entrant
from decode.worker import Lengths, task_as_json

RATES = ("decode_short", "decode_long", "prefill")
QUIET_CORES = 0.1  # if other programs use more cores than this, the rates suffer
QUIET_WAIT_S = 60.0
_QUIET_LOOK_S = 2.0
TURN_LIMIT_S = 1800.0
_TRIAL = {"decode": 16}
_PIECE_BYTES = 1 << 24
_BENCHMARKS = Path(__file__).resolve().parent.parent
_TAIL_CHARACTERS = 600

logger = logging.getLogger(__name__)


class TurnFailed(Exception):  # noqa: N818 - named like the verdict that it is
    """The process of a contender failed; the message says how it ended."""


@dataclass(kw_only=True)
class Record:
    """The trials, settings, turns and failure of one contender."""

    entrant: Entrant
    trials: list[dict[str, Any]] = field(default_factory=list)
    settings: Mapping[str, Any] | None = None
    turns: list[dict[str, float]] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)
    failure: str | None = None


def run_rounds(
    entrants: Sequence[Entrant],
    lengths: Lengths,
    threads: int,
    rounds: int,
    bandwidth_bytes: int,
    after_round: Callable[[list[Record], list[dict[str, float]]], None],
) -> None:
    """Run the trials and `rounds` rounds. After each round `after_round` is called with all records and bandwidths so
    far."""
    records = [Record(entrant=entrant) for entrant in entrants]
    for record in records:
        _choose(record, lengths, threads)
    bandwidths: list[dict[str, float]] = []
    for number in range(rounds):
        await_quiet("the bandwidth")
        bandwidths.append(machine.read_bandwidth(threads, bandwidth_bytes))
        rates = ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in bandwidths[-1].items())
        logger.info("round %d of %d: read bandwidth in GB/s: %s", number + 1, rounds, rates)
        for place in range(len(records)):
            _count(records[(place + number) % len(records)], lengths, threads)
        after_round(records, bandwidths)


def _choose(record: Record, lengths: Lengths, threads: int) -> None:
    """Try every choice of settings if there are several, and keep the choice with the best rates overall."""
    choices = record.entrant.choices
    if len(choices) == 1:
        record.settings = choices[0]
        return
    best = -math.inf
    reasons = []
    for settings in choices:
        try:
            turn, _ = run_turn(record.entrant, settings, dataclasses.replace(lengths, **_TRIAL), threads)
        except TurnFailed as failed:
            reasons.append(str(failed))
            record.trials.append({"settings": dict(settings), "failed": str(failed)})
            logger.info("trial of %s %s failed: %s", record.entrant.name, dict(settings), failed)
            continue
        score = statistics.fmean(math.log(turn[rate]) for rate in RATES)
        record.trials.append({"settings": dict(settings), **{rate: turn[rate] for rate in RATES}})
        logger.info("trial of %s %s: %s", record.entrant.name, dict(settings), _line(turn))
        if score > best:
            best, record.settings = score, settings
    if record.settings is None:
        record.failure = reasons[0]


def _count(record: Record, lengths: Lengths, threads: int) -> None:
    if record.failure is not None or record.settings is None:
        return
    try:
        turn, record.facts = run_turn(record.entrant, record.settings, lengths, threads)
    except TurnFailed as failed:
        record.failure = str(failed)
        logger.info("%s failed: %s", record.entrant.name, failed)
        return
    record.turns.append(turn)
    logger.info("%s: %s", record.entrant.name, _line(turn))


def run_turn(
    entrant: Entrant, settings: Mapping[str, Any], lengths: Lengths, threads: int
) -> tuple[dict[str, float], dict[str, Any]]:
    """Run one turn in a separate process; returns its figures, in tokens per second and bytes, and the runtime's
    facts."""
    for path in entrant.files:
        _read_through(path)
    await_quiet(entrant.name)
    task = task_as_json(entrant.task(lengths.positions, threads, settings))
    order: dict[str, Any] = {"task": task, "lengths": dataclasses.asdict(lengths), "started": time.monotonic()}
    others = _watch_others()
    command = [sys.executable, "-m", "decode.worker", json.dumps(order)]
    try:
        done = subprocess.run(
            command, cwd=_BENCHMARKS, env=_environment(threads), timeout=TURN_LIMIT_S,
            capture_output=True, text=True, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        raise TurnFailed(f"its turn took more than {TURN_LIMIT_S:.0f} s and was ended") from None
    if done.returncode:
        raise TurnFailed(_ending(entrant.name, done.returncode, done.stderr))
    answer = json.loads(done.stdout.splitlines()[-1])
    turn = {**answer["turn"], "other_cores": others()}
    for rate in RATES:
        turn[rate] *= entrant.prefill_scale if rate == "prefill" else entrant.decode_scale
    return turn, answer["facts"]


def await_quiet(name: str) -> None:
    """Wait until other programs leave the cores idle, for QUIET_WAIT_S at most; `name` says what waits. One busy
    process can cost a runtime most of its speed if the runtime's threads wait for each other by spinning."""
    for look in range(int(QUIET_WAIT_S / _QUIET_LOOK_S)):
        others = _watch_others()
        time.sleep(_QUIET_LOOK_S)
        if (cores := others()) <= QUIET_CORES:
            return
        if not look:
            logger.info("%s waits: others keep %.2f cores busy", name, cores)


def _watch_others() -> Callable[[], float]:
    """A function that returns the mean number of cores that programs other than this process's children kept busy since
    `_watch_others` was called."""

    def reading() -> tuple[float, float, float]:
        children = resource.getrusage(resource.RUSAGE_CHILDREN)
        return machine.busy_seconds(), children.ru_utime + children.ru_stime, time.monotonic()

    before = reading()

    def told() -> float:
        busy, ours, elapsed = (after - start for after, start in zip(reading(), before, strict=True))
        return max(0.0, busy - ours) / elapsed

    return told


def _environment(threads: int) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "false"}


def _ending(name: str, status: int, errors: str) -> str:
    if status == -signal.SIGSEGV and name.startswith("llama"):
        return (
            "llama.cpp ended in a segmentation fault; if GCC 11 or 12 compiled it for a processor with AMX, compile it "
            "again as benchmarks/decode/gcc_amx_tiles.h says"
        )
    how = signal.Signals(-status).name if status < 0 else f"status {status}"
    return f"its process ended with {how}: {errors.strip()[-_TAIL_CHARACTERS:]}"


def _read_through(path: Path) -> None:
    """Read a file into the page cache."""
    buffer = bytearray(_PIECE_BYTES)
    with path.open("rb", buffering=0) as file:
        while file.readinto(buffer):
            pass


def _line(turn: Mapping[str, float]) -> str:
    return (
        f"decode {turn['decode_short']:.2f} and {turn['decode_long']:.2f}, prefill {turn['prefill']:.1f} tokens/s, "
        f"first token {turn['first_token_s']:.1f} s, {turn['steady_bytes'] / 1e9:.2f} GB"
        + (f"; OTHERS USED {turn['other_cores']:.2f} CORES" if turn["other_cores"] > QUIET_CORES else "")
    )
