"""Reads a trace of requests: a JSON object a line, with when each arrives and how long it and its answer are.

The fields are those of Mooncake's traces (github.com/kvcache-ai/Mooncake, FAST25-release), which aiperf reads too:
`timestamp` in milliseconds, `input_length` and `output_length` in tokens, and `hash_ids`, one a block of 512 tokens of
the prompt; equal ids are equal blocks. In place of lengths a line may have the texts themselves: `prompt` or
`text_input`, and `max_tokens`.
"""

from __future__ import annotations

import math
import random
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clients.bench.load import MOST_TOKENS, Lengths, Sampling, Work
from clients.bench.prompts import MAX_PROMPTS_BYTES, synthetic
from export.errors import ConfigError, listing, named, shown
from export.files.reading import parse_json, read_text

BLOCK_TOKENS = 512
_MOST_BLOCKS = 4096  # texts of blocks that are kept
_WARM_UP_TOKENS = 32  # of a prompt in place of one that is given as a text


@dataclass(frozen=True, kw_only=True)
class Traced:
    """One request of a trace. Either `prompt` is given, or `input_length` with or without the ids of its blocks."""

    at_s: float
    prompt: str | None = None
    input_length: int | None = None
    blocks: tuple[int, ...] = ()
    max_tokens: int | None = None


def read_trace(path: Path) -> list[Traced]:
    """The requests of a trace by their time, which begins at 0 with the first. Raises ConfigError that names every
    line that is broken, has a time below 0, or has no length."""
    found: list[Traced] = []
    problems = []
    for number, line in enumerate(read_text(path, "a trace", most=MAX_PROMPTS_BYTES).split("\n"), 1):
        if not line.strip():
            continue
        try:
            found.append(_traced(parse_json(line)))
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    if problems:
        raise ConfigError(
            f"reading the trace {named(path)}: {len(problems)} of {len(found) + len(problems)} lines cannot be sent; "
            'expected a JSON object a line such as {"timestamp": 1500, "input_length": 64, "output_length": 32}, with '
            f"the time in milliseconds:{listing(problems)}"
        )
    if not found:
        raise ConfigError(f"reading the trace {named(path)}: found no request, expected a JSON object a line")
    found.sort(key=lambda one: one.at_s)
    begin = found[0].at_s
    return [Traced(**{**vars(one), "at_s": one.at_s - begin}) for one in found]


def _traced(value: Any) -> Traced:  # noqa: ANN401 - whatever a file has
    """One line. Raises ValueError that says what is wrong."""
    if not isinstance(value, dict):
        raise ValueError(f"found {shown(value)}, expected an object")
    at = value.get("timestamp")
    if isinstance(at, bool) or not isinstance(at, int | float) or not 0 <= at <= sys.float_info.max:
        raise ValueError(f"timestamp is {shown(at)}, expected milliseconds of 0 or more")
    prompt = value.get("prompt", value.get("text_input"))
    if prompt is not None and (not isinstance(prompt, str) or not prompt):
        raise ValueError(f"the prompt is {shown(prompt)}, expected a text")
    length = _count(value, "input_length")
    if (prompt is None) == (length is None):
        raise ValueError("expected either a prompt or an input_length")
    blocks = value.get("hash_ids") or []
    if not isinstance(blocks, list) or any(type(one) is not int for one in blocks):
        raise ValueError(f"hash_ids is {shown(blocks)}, expected a list of whole numbers")
    if blocks and length is not None and len(blocks) != math.ceil(length / BLOCK_TOKENS):
        raise ValueError(
            f"it has {len(blocks)} hash_ids, expected {math.ceil(length / BLOCK_TOKENS)} for {length} tokens, one for "
            f"{BLOCK_TOKENS}"
        )
    most = _count(value, "output_length")
    most = _count(value, "max_tokens") if most is None else most
    return Traced(at_s=at / 1e3, prompt=prompt, input_length=length, blocks=tuple(blocks), max_tokens=most)


def _count(value: dict[str, Any], name: str) -> int | None:
    found = value.get(name)
    if found is not None and (type(found) is not int or not 1 <= found <= MOST_TOKENS):
        raise ValueError(f"{name} is {shown(found)}, expected tokens from 1 to {MOST_TOKENS}")
    return found


@dataclass(kw_only=True)
class TraceWorks:
    """The requests of a trace, as the generator takes them. Prompts of a length are synthetic; `counter` counts their
    tokens, else they have as many words. `max_tokens` is for lines without a length of the answer. Numbers beyond the
    trace are requests of the same lengths with other texts, to warm a server up."""

    trace: Sequence[Traced]
    max_tokens: Lengths
    counter: Callable[[str], int] | None = None
    sampling: Sampling = field(default_factory=Sampling)
    seed: int = 0
    _ready: dict[int, Work] = field(default_factory=dict)
    _blocks: dict[int, str] = field(default_factory=dict)

    def describe(self) -> dict[str, Any]:
        """What is sent, as JSON values."""
        return {
            "prompts": f"{len(self.trace)} of a trace of {self.trace[-1].at_s:g} s",
            "max_tokens": str(self.max_tokens),
            "sampling": vars(self.sampling),
            "seed": self.seed,
        }

    def prepare(self, first: int, count: int) -> None:
        """Make requests ahead of time, so that making them takes no time while others are measured."""
        for index in range(first, first + count):
            self._ready[index] = self._make(index)

    def work(self, index: int) -> Work:
        """Request number `index`."""
        ready = self._ready.pop(index, None)
        return self._make(index) if ready is None else ready

    def _make(self, index: int) -> Work:
        one, source = self.trace[index % len(self.trace)], random.Random(f"trace/{self.seed}/{index}")
        is_of_trace = index < len(self.trace)
        prompt = one.prompt if is_of_trace else None
        if prompt is None and one.blocks and is_of_trace:
            prompt = self._of_blocks(one)
        elif prompt is None:
            prompt = synthetic(source, one.input_length or _WARM_UP_TOKENS, self.counter)
        return Work(
            prompt=prompt,
            max_tokens=one.max_tokens or self.max_tokens.draw(source),
            seed=source.getrandbits(31),
            sampling=self.sampling,
        )

    def _of_blocks(self, one: Traced) -> str:
        """A prompt of blocks, each of which is the same text wherever its id comes. The last is cut to the length."""
        last = (one.input_length or 1) - BLOCK_TOKENS * (len(one.blocks) - 1)
        whole = [self._block(block) for block in one.blocks[:-1]]
        return " ".join([*whole, synthetic(self._source(one.blocks[-1]), last, self.counter)])

    def _block(self, block: int) -> str:
        if block not in self._blocks:
            if len(self._blocks) >= _MOST_BLOCKS:
                self._blocks.clear()
            self._blocks[block] = synthetic(self._source(block), BLOCK_TOKENS, self.counter)
        return self._blocks[block]

    def _source(self, block: int) -> random.Random:
        return random.Random(f"block/{self.seed}/{block}")
