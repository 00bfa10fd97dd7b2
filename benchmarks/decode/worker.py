"""Runs one turn of one contender in a separate process: `python -m decode.worker TASK`, with JSON in and out.

No other contender runs at the same time, so that thread pools do not compete for cores. A turn measures, in this order:
the time from process start to first token, decoding after a short prompt, prefill, decoding at a long context.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from decode.contenders import Contender, Task, load
from decode.orders import answers
from export.architecture import Architecture
from export.files.typed_json import read_typed

_KIB = 1024


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Numbers of tokens in a turn. `decode` tokens are decoded after a prompt whose length makes their mean context
    `short_context` or `long_context`."""

    first: int = 16  # length of the prompt before the first token
    short_context: int = 96
    long_context: int = 1024
    decode: int = 64
    prefill: int = 512

    @property
    def positions(self) -> int:
        """The largest number of positions that a turn fills."""
        return self.long_context + self.decode // 2

    def prompt_before(self, context: int) -> int:
        """The length of the prompt after which the decoded tokens have a mean context of `context` tokens."""
        return context - self.decode // 2


@dataclass(frozen=True, kw_only=True)
class Turn:
    """The figures of a turn, in seconds, tokens per second and bytes."""

    first_token_s: float
    decode_short: float
    prefill: float
    decode_long: float
    peak_bytes: int  # peak resident memory (VmHWM)
    steady_bytes: int  # resident memory while decoding (VmRSS)
    steady_anonymous_bytes: int  # the part of steady_bytes that no file backs


def measure(contender: Contender, lengths: Lengths, started: float, vocab_size: int) -> Turn:
    """Run one turn; `started` is time.monotonic at the start of the process."""
    prompt = [int(i) for i in np.random.default_rng(0).integers(0, vocab_size, lengths.positions)]
    contender.run(prompt[: lengths.first])
    first_token_s = time.monotonic() - started
    decode_short = _decode(contender, prompt[: lengths.prompt_before(lengths.short_context)], lengths.decode)
    contender.forget()
    begun = time.perf_counter()
    contender.run(prompt[: lengths.prefill])
    prefill = lengths.prefill / (time.perf_counter() - begun)
    decode_long = _decode(contender, prompt[: lengths.prompt_before(lengths.long_context)], lengths.decode)
    memory = _memory()
    return Turn(
        first_token_s=first_token_s,
        decode_short=decode_short,
        prefill=prefill,
        decode_long=decode_long,
        peak_bytes=memory["VmHWM"],
        steady_bytes=memory["VmRSS"],
        steady_anonymous_bytes=memory["RssAnon"],
    )


def _decode(contender: Contender, prompt: Sequence[int], count: int) -> float:
    """Tokens per second of decoding `count` tokens greedily after a prompt."""
    contender.forget()
    token = contender.run(prompt)
    begun = time.perf_counter()
    for _ in range(count):
        token = contender.run([token])
    return count / (time.perf_counter() - begun)


def _memory() -> dict[str, int]:
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * _KIB for words in lines if words[-1] == "kB"}


def task_as_json(task: Task) -> dict[str, Any]:
    """A task as JSON values. Its process runs in another folder, so the path is a whole one."""
    return {**dataclasses.asdict(task), "source": str(task.source.resolve()) if task.source else None}


def task_from_json(raw: dict[str, Any]) -> Task:
    source = raw.pop("source")
    return Task(source=Path(source) if source else None, model=read_typed(Architecture, raw.pop("model")), **raw)


def main() -> None:
    raw = json.loads(sys.argv[1])
    with answers() as answer:
        task = task_from_json(raw["task"])
        lengths = read_typed(Lengths, raw["lengths"])
        contender = load(task)
        turn = measure(contender, lengths, raw["started"], task.model.vocab_size)
        answer({"turn": vars(turn), "facts": contender.facts()})


if __name__ == "__main__":
    main()
