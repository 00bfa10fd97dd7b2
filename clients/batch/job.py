"""A batch job: what decides its output, found in one pass over the input before anything is sent.

The pass reads the file line by line. It takes memory for the distinct models and the table of shards alone: digests of
the lines' `custom_id`s go to files by their first byte, and each of those is searched for duplicates by itself.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from clients.batch.lines import Form, LineInvalid, RawLine, form_of, parse, read_lines, read_request
from clients.errors import BatchInputInvalid
from export.errors import listing, named
from export.files.reading import open_regular

FORMAT_VERSION = 1  # of the folder of an unfinished job
MOST_MODELS = 100  # distinct models of a job's lines that are compared with those of the endpoints
# How files begin whose lines can only be read after another program; without this, every line would fail by itself.
_ENCODED = {
    b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd", b"BZh": "bzip2", b"\xfd7zXZ": "xz", b"PK\x03\x04": "zip",
    b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16",
}  # fmt: skip
_ANY_MODEL = {"model": "any"}
_BLOCK = 1 << 20
_BUCKETS = 256
_MOST_FOUND = 1000  # duplicates; of more only the number is kept
_DIGEST = 16  # bytes of a digest of a custom_id
_RECORD = _DIGEST + 8  # and of the line's number


@dataclass(frozen=True, kw_only=True)
class Shard:
    """A run of lines that are not blank: where it begins, and how many they are."""

    index: int  # of the first of them
    number: int  # its number in the file
    offset: int  # bytes before it
    num_lines: int


@dataclass(frozen=True, kw_only=True)
class Scan:
    """What the first pass found."""

    sha256: str
    num_bytes: int
    num_lines: int  # that are not blank
    form: Form
    shards: tuple[Shard, ...]
    models: frozenset[str]  # that lines name, at most MOST_MODELS
    lacks_model: bool  # whether a line names none


@dataclass(frozen=True, kw_only=True)
class Job:
    """Everything that decides which requests are sent and what a line of the output looks like."""

    path: Path
    sha256: str
    num_bytes: int
    num_lines: int
    form: Form
    model: str | None  # that takes the place of those that lines name
    defaults: Mapping[str, Any] = field(default_factory=dict)  # fields of a body where a line has none

    def facts(self) -> dict[str, Any]:
        """The facts by which an interrupted job is recognised, as JSON values. The endpoints are not among them."""
        return {
            "version": FORMAT_VERSION,
            "input": {"sha256": self.sha256, "bytes": self.num_bytes, "lines": self.num_lines},
            "settings": {"format": self.form, "model": self.model, "body": dict(self.defaults)},
        }

    def answer_id(self, number: int) -> str:
        """The id of the answer to the line of that number: of this job alone, and the same in every run of it."""
        return f"batch_req_{self._digest()}_{number}"

    def _digest(self) -> str:
        found = self.__dict__.get("_id")
        if found is None:
            text = json.dumps(self.facts(), sort_keys=True)
            found = hashlib.sha256(text.encode()).hexdigest()[:24]
            object.__setattr__(self, "_id", found)  # hashed once for all lines
        return str(found)


def scan(
    path: Path,
    *,
    form: Form | None,
    shard_lines: int,
    scratch: Path,
    tell: Callable[[int], None] = lambda _bytes: None,
) -> Scan:
    """Read a batch once. `form` None takes the form of the first line that has one. Temporary files without a name are
    made in the folder `scratch`. `tell` is called with the bytes read so far.

    Raises ConfigError for a file that cannot be read, and BatchInputInvalid for one without lines, or with two lines of
    the same custom_id."""
    models: set[str] = set()
    shards: list[Shard] = []
    num_lines, num_bytes, lacks_model = 0, 0, False
    first = last = b""  # lines that are not blank
    content = hashlib.sha256()  # of the bytes that this pass saw: the file may grow after it

    def see(part: bytes) -> None:
        nonlocal num_bytes
        content.update(part)
        num_bytes += len(part)

    with _Duplicates(scratch) as duplicates:
        for line in read_lines(path, see=see):
            if line.index % shard_lines == 0:
                shards.append(Shard(index=line.index, number=line.number, offset=line.offset, num_lines=0))
                tell(line.offset)
            num_lines += 1
            if line.number == 1:
                _refuse_encoded(path, line.data)
            last = line.data.strip()
            first = first or last
            try:
                value = parse(line.data)
            except LineInvalid:
                continue
            if isinstance(value, dict) and isinstance(custom_id := value.get("custom_id"), str):
                duplicates.add(custom_id, line.number)
            form = form or form_of(value)
            if form is None or not _is_sent(value, form):
                continue
            model = _named_model(value, form)
            lacks_model |= model is None
            if model is not None and len(models) < MOST_MODELS:
                models.add(model)
        if not num_lines:
            raise BatchInputInvalid(f"reading the batch {path}: found no line with a request; write one a line")
        _refuse_array(path, first, last, num_lines)
        duplicates.check(path)
    whole = tuple(
        Shard(index=one.index, number=one.number, offset=one.offset, num_lines=min(shard_lines, num_lines - one.index))
        for one in shards
    )
    return Scan(
        sha256=content.hexdigest(), num_bytes=num_bytes, num_lines=num_lines, form=form or "prompts", shards=whole,
        models=frozenset(models), lacks_model=lacks_model,
    )  # fmt: skip


def _refuse_encoded(path: Path, begin: bytes) -> None:
    """Raise BatchInputInvalid for a file that begins as one that is compressed, or in UTF-16."""
    for magic, kind in _ENCODED.items():
        if begin.startswith(magic):
            raise BatchInputInvalid(
                f"reading the batch {path}: found {kind}, expected lines of JSON in UTF-8; nothing was sent: give the "
                "file unpacked, as UTF-8"
            )


def _refuse_array(path: Path, first: bytes, last: bytes, num_lines: int) -> None:
    """Raise BatchInputInvalid for a file that is one JSON array, on one line or one value a line."""
    if (num_lines == 1 and first.startswith(b"[")) or (first, last) == (b"[", b"]"):
        raise BatchInputInvalid(
            f"reading the batch {path}: found one JSON array, expected a JSON value on each line (JSONL); nothing was "
            "sent: write its values one a line, such as with jq -c '.[]'"
        )


def _is_sent(value: Any, form: Form) -> bool:  # noqa: ANN401 - JSON value
    """Whether a line is a request, if a model is found for it."""
    try:
        read_request(value, form, None, _ANY_MODEL)
    except LineInvalid:
        return False
    return True


def _named_model(value: Any, form: Form) -> str | None:  # noqa: ANN401 - JSON value
    body = value.get("body") if form == "openai" and isinstance(value, dict) else value
    model = body.get("model") if isinstance(body, dict) else None
    return model if isinstance(model, str) and model else None


def digest(path: Path) -> tuple[str, int]:
    """The SHA-256 of a file, and its bytes. Raises ConfigError for a file that cannot be read."""
    found, num_bytes = hashlib.sha256(), 0
    with open_regular(path, f"reading the batch {path}") as file:
        while block := file.read(_BLOCK):
            found.update(block)
            num_bytes += len(block)
    return found.hexdigest(), num_bytes


def shard_lines_of(job: Job, shard: Shard) -> Iterator[RawLine]:
    """The lines of a shard. Raises ConfigError for a file that cannot be read."""
    for line in read_lines(job.path, offset=shard.offset, index=shard.index, number=shard.number):
        if line.index >= shard.index + shard.num_lines:
            return
        yield line


class _Duplicates:
    """Finds texts that were added twice, in memory that is a small part of the texts' digests."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch

    def __enter__(self) -> _Duplicates:
        self._stack = ExitStack()
        self._buckets: list[IO[bytes]] = []
        return self

    def __exit__(self, *_error: object) -> None:
        self._stack.close()

    def add(self, text: str, number: int) -> None:
        if not self._buckets:
            for _ in range(_BUCKETS):
                bucket = tempfile.TemporaryFile(buffering=1 << 14, dir=self._scratch)  # noqa: SIM115 - see __exit__
                self._buckets.append(self._stack.enter_context(bucket))
        key = hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=_DIGEST).digest()
        self._buckets[key[0] % _BUCKETS].write(key + number.to_bytes(8, "little"))

    def check(self, path: Path) -> None:
        """Raise BatchInputInvalid that names the first lines with a custom_id that an earlier line has."""
        found: list[tuple[int, int]] = []
        num_found = 0
        for bucket in self._buckets:
            bucket.seek(0)
            seen: dict[bytes, int] = {}
            while record := bucket.read(_RECORD):
                number = int.from_bytes(record[_DIGEST:], "little")
                first = seen.setdefault(record[:_DIGEST], number)
                if first != number:
                    num_found += 1
                    found.append((number, first))
                if len(found) > _MOST_FOUND:
                    found = sorted(found)[:8]
        if found:
            found = sorted(found)[:8]
            lines = [f"line {number}: the custom_id of line {first}{_id_at(path, number)}" for number, first in found]
            raise BatchInputInvalid(
                f"reading the batch {path}: found {num_found} lines with a custom_id that an earlier line has, "
                f"expected each once to tell answers apart; nothing was sent:{listing(lines, of=num_found)}"
            )


def _id_at(path: Path, wanted: int) -> str:
    if wanted > 100_000:  # not worth another pass
        return ""
    for line in read_lines(path):
        if line.number == wanted:
            return f" ({named(parse(line.data)['custom_id'], 60)})"
    return ""
