"""Damage to good inputs, and what a reader must hold to whatever it is given.

    reader = Reader(name="merge YAML", seeds=lambda: [b"..."], read=read_yaml)
    assert faults(reader, seed=1, inputs=300, folder=tmp_path) == []

A reader may take an input or refuse it with an error of moeship's own: never another exception, never more than
MAX_SECONDS or MAX_BYTES of memory, never a message of more than MAX_MESSAGE_BYTES or with control characters.
`fuzz_readers.READERS` is the table of readers; ci/fuzz.py runs it for longer.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.errors import MoeshipError

MAX_SECONDS = 5.0  # of computing, so that a busy machine is no fault of a reader
MAX_WAIT_SECONDS = 20.0
MAX_BYTES = 500_000_000
MAX_MESSAGE_BYTES = 2000

Mutation = Callable[[random.Random, bytes], bytes]

# What a value may be replaced by: other types, ends of ranges, sizes without measure, texts that terminals obey.
HOSTILE_VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1, 1, 2**31, 2**53 + 1, 2**63 - 1, 2**64, 10**30, 10**400, 0.0, -0.0, 1e-320, 1e308, 0.5,
    float("nan"), float("inf"), "", "x", "\x1b[31mred\x1b[0m", "line\nline", "\u202egnp.exe", "a\x00b",
    "../../etc/passwd", "A" * 300, "B" * 100_000, "\ud800", "😀" * 1000, [], [[]], [0] * 2000, [None], {},
    {"a": {"b": {}}}, list(range(300)), {f"key{index}": index for index in range(500)},
)  # fmt: skip
HOSTILE_BYTES = (
    b"\x00", b"\xff\xfe", b"\xef\xbb\xbf", b"\x1b[2J", b"NaN", b"-Infinity", b"-0", b"1e999", b"9" * 5000,
    b"0x" + b"f" * 6000, b"[" * 5000, b"{" * 5000, b'{"a":' * 2000, b"\\ud800", b"\\u0000", b",", b'"',
    b"!!bool x", b"!!int ''", b"&a [*a]",
    b"!!timestamp x", b"!!binary x", b"!!python/name:os.system", b"? ", b"<<: *a", b"\r", b"\xc2\x85", b"(a+)+$",
)  # fmt: skip
_ENCODINGS = ("utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-7", "cp037", "utf-8-sig")


@dataclass(frozen=True, kw_only=True)
class Reader:
    """A reader of files or messages: `read(data, folder)` gives it `data`, in files of `folder` where it wants files.

    `seeds` makes good inputs; `mutate` damages one. `setup(folder)` is called once, before the first input.
    """

    name: str
    seeds: Callable[[], list[bytes]]
    read: Callable[[bytes, Path], object]
    mutate: Mutation | None = None
    setup: Callable[[Path], object] = lambda _: None


def inputs_of(reader: Reader, seed: int, count: int) -> Iterator[bytes]:
    """`count` damaged inputs, always the same for a seed."""
    rng = random.Random(f"{reader.name} {seed}")
    seeds, mutate = reader.seeds(), reader.mutate or mutated_bytes
    for _ in range(count):
        data = rng.choice(seeds)
        for _ in range(rng.choice((1, 1, 1, 2, 4))):
            data = mutate(rng, data)
        yield data


def faults(reader: Reader, *, seed: int, inputs: int, folder: Path) -> list[str]:
    """What a reader did with damaged inputs that it must not do."""
    reader.setup(folder)
    found = [(data, fault(reader, data, folder)) for data in inputs_of(reader, seed, inputs)]
    return [f"{reader.name} on {data[:200]!r} ({len(data)} bytes): {problem}" for data, problem in found if problem]


def fault(reader: Reader, data: bytes, folder: Path) -> str | None:
    """What the reader did with one input that it must not do; None where all is well."""
    before = _restart_peak()
    started, processed = time.perf_counter(), time.process_time()
    problem = None
    try:
        reader.read(data, folder)
    except MoeshipError as error:
        problem = _message_fault(str(error))
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        problem = f"{type(error).__module__}.{type(error).__name__}: {str(error)[:300]!r}"
    seconds, waited = time.process_time() - processed, time.perf_counter() - started
    grown = _peak() - before
    if seconds > MAX_SECONDS or waited > MAX_WAIT_SECONDS:
        problem = f"{seconds:.1f} s of computing, {waited:.1f} s in all"
    if grown > MAX_BYTES:
        problem = f"{grown / 1e6:.0f} MB more memory"
    return problem


def _message_fault(text: str) -> str | None:
    if len(text.encode()) > MAX_MESSAGE_BYTES:
        return f"a message of {len(text.encode())} bytes"
    if not text.replace("\n", "").replace("\t", "").isprintable():
        return f"a message with control characters: {text!r:.200}"
    return None


def _restart_peak() -> int:
    """Begin the peak of resident memory anew; returns the present, in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return _peak()


def _peak() -> int:
    [line] = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


def mutated_bytes(rng: random.Random, data: bytes) -> bytes:
    """One damage that knows nothing of the format: bits, cuts, splices, encodings, hostile pieces."""
    place = rng.randrange(len(data) + 1)
    other = rng.randrange(len(data) + 1)
    first, last = min(place, other), max(place, other)
    kind = rng.randrange(9)
    if kind == 0 and data:
        index = rng.randrange(len(data))
        return data[:index] + bytes([data[index] ^ 1 << rng.randrange(8)]) + data[index + 1 :]
    if kind == 1:
        return data[:place]
    if kind == 2:
        return data[:first] + data[last:]
    if kind == 3:
        return data[:place] + data[first : min(last, first + 2000)] + data[place:]
    if kind == 4:
        return data[:place] + data[first : first + 50] * rng.choice((2, 10, 300)) + data[place:]
    if kind == 5:
        return data[:place] + bytes(rng.randrange(256) for _ in range(rng.randrange(1, 20))) + data[place:]
    if kind == 6:
        return data.decode("utf-8", "replace").encode(rng.choice(_ENCODINGS), "replace")
    if kind == 7:
        return _other_number(rng, data)
    return data[:place] + rng.choice(HOSTILE_BYTES) + data[place:]


def _other_number(rng: random.Random, data: bytes) -> bytes:
    places = [index for index, byte in enumerate(data) if 48 <= byte <= 57]
    if not places:
        return data
    index = rng.choice(places)
    return data[:index] + rng.choice((b"0", b"-1", b"1e9", b"1000000000", b"9" * 30, b"9" * 5000)) + data[index + 1 :]


def mutated_json(rng: random.Random, data: bytes) -> bytes:
    """One damage to a JSON text: a value of another kind, a key gone, added or twice, deep nesting; or to its bytes."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return mutated_bytes(rng, data)
    containers = list(_containers(value))
    if not containers or rng.random() < 0.3:
        return mutated_bytes(rng, data)
    holder = rng.choice(containers)
    places = list(holder) if isinstance(holder, dict) else list(range(len(holder)))
    kind = rng.randrange(6)
    if not places or kind == 0:
        if isinstance(holder, dict):
            holder[rng.choice(("extra", "", "a\x1b[0m", "K" * 5000))] = rng.choice(HOSTILE_VALUES)
        else:
            holder.append(rng.choice(HOSTILE_VALUES))
        return json.dumps(value).encode()
    place = rng.choice(places)
    if kind == 1:
        del holder[place]
    elif kind == 2 and isinstance(holder, dict):
        text, key = json.dumps(value), json.dumps(place)
        return text.replace(f"{key}:", f"{key}: {json.dumps(rng.choice(HOSTILE_VALUES))}, {key}:", 1).encode()
    elif kind == 3:
        depth = rng.choice((3, 90, 900, 30_000))
        holder[place] = "@deep@"
        return json.dumps(value).replace('"@deep@"', "[" * depth + "]" * depth).encode()
    elif kind == 4:
        holder[place] = holder[rng.choice(places)]
    else:
        holder[place] = rng.choice(HOSTILE_VALUES)
    return json.dumps(value).encode()


def _containers(value: Any) -> Iterator[Any]:
    """Every object and list of a JSON value, itself first, some levels deep."""
    level = [value]
    for _ in range(8):
        level = [item for item in level if isinstance(item, dict | list)]
        yield from level
        level = [inner for item in level for inner in (item.values() if isinstance(item, dict) else item[:50])]
