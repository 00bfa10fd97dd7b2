"""The answers of an unfinished job on the disk, and the output that they become.

While the output NAME is made, there is a folder `.NAME.partial` beside it:

    lock               locked (flock) by the process that runs the job
    job.json           the facts of the job; written and flushed before the first request is sent
    answers-*.jsonl    records of answers, in the order in which they came; each run, and each attempt of a task of Ray,
                       writes a file of its own
    index, merged      made at the end: where each answer is, and the output before it has its name

A record is a line: CRC-32 of what follows as 8 hexadecimal digits, the line's place in the output, + or - for whether
the request got what it asked for, and the line of the output. A file is only ever appended to by the process that made
it. So what a killed process or a machine without power left at its end, or a block within it that never reached the
disk, fails its CRC, counts as absent, and is asked for again. Where a line has several records, the first good one is
taken. The output appears by one link or rename, after all of it was flushed, and never in the place of another file.
"""

from __future__ import annotations

import contextlib
import errno
import json
import mmap
import os
import secrets
import shlex
import stat
import zlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from clients.batch.job import Job
from clients.errors import BatchInputInvalid
from export.errors import OutputError, listing, named
from export.files.output import flush_to_disk, refuse_existing, replace_file
from export.files.own_files import open_own, remove, write_all
from export.files.reading import read_json
from export.files.resume import locked_folder, partial_path

MOST_RECORD = 80 << 20  # bytes; an answer is at most 64 MiB (endpoints.py)
_OFFSET_BITS = 44  # of an entry of the index; above them is 1 + the place of the file
_ENTRY = 8  # bytes
_BEGIN = b'{"id":"batch_req_'  # of each line of an output
_MOST_OPEN = 64  # files of records that are open at a time
_NO_LINKS = (errno.EPERM, errno.EOPNOTSUPP, errno.ENOSYS, errno.EMLINK)


@dataclass(frozen=True, kw_only=True)
class Record:
    """An answer in a file of records."""

    index: int
    is_good: bool
    line: bytes  # of the output
    offset: int  # of the record in its file


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What an output holds: how many lines, how many of them failed, and a description of the first that did."""

    num_lines: int
    num_failed: int
    failed: tuple[str, ...] = ()


class Journal:
    """A new file of records in the folder of a job. `first` is the place of the first line that it may have."""

    def __init__(self, folder: Path, first: int = 0) -> None:
        self.path = folder / f"answers-{first:012}-{secrets.token_hex(8)}.jsonl"
        self._descriptor = os.open(
            self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600
        )
        self._fault: OSError | None = None  # of a flush; the system may tell of it only once
        flush_to_disk(folder, contents=False)

    def append(self, index: int, line: bytes, is_good: bool) -> None:
        """Add a record. It outlives this process at once, and the machine from the next `flush` on. Raises OSError,
        also where an earlier flush failed."""
        if self._fault is not None:
            raise self._fault
        rest = b"%d %s %s" % (index, b"+" if is_good else b"-", line)
        write_all(self._descriptor, b"%08x %s" % (zlib.crc32(rest), rest))

    def flush(self) -> None:
        """Have the records outlive the machine. May run in another thread. Raises OSError."""
        try:
            os.fdatasync(self._descriptor)
        except OSError as error:
            self._fault = error
            raise

    def close(self) -> None:
        """Flush and close the file. Raises OSError if this or any earlier flush failed."""
        try:
            self.flush()
        finally:
            os.close(self._descriptor)
        if self._fault is not None:
            raise self._fault


def read_records(path: Path) -> Iterator[Record]:
    """The whole records of a file. What is none is passed over."""
    offset = 0
    with path.open("rb", buffering=1 << 18) as file:
        while data := file.readline(MOST_RECORD):
            record = _read_record(data, offset)
            if record is not None:
                yield record
            offset += len(data)


def _read_record(data: bytes, offset: int) -> Record | None:
    if not data.endswith(b"\n"):
        return None
    crc, _, rest = data.partition(b" ")
    if len(crc) != 8 or crc != b"%08x" % zlib.crc32(rest):
        return None
    index, sign, line = rest.split(b" ", 2)
    return Record(index=int(index), is_good=sign == b"+", line=line, offset=offset)


class Index:
    """Where each line's answer is: an entry of 8 bytes a line, in a mapped file, so that memory does not grow with the
    number of lines. Good answers have precedence; else the first one counts. With `retries_failed` a line whose request
    failed is not done."""

    def __init__(self, folder: Path, num_lines: int, *, retries_failed: bool = False) -> None:
        self._path, self._num_lines, self._retries_failed = folder / "index", num_lines, retries_failed
        self._files = sorted(folder.glob("answers-*.jsonl"))
        remove(self._path)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        descriptor = os.open(self._path, flags, 0o600)
        try:
            # A byte a line for whether its answer is a good one, after the entries.
            os.ftruncate(descriptor, num_lines * (_ENTRY + 1))
            self._map = mmap.mmap(descriptor, num_lines * (_ENTRY + 1))
        finally:
            os.close(descriptor)
        self.num_known = self.num_good = 0
        for place, path in enumerate(self._files):
            for record in read_records(path):
                self._add(record, place)

    def _add(self, record: Record, place: int) -> None:
        index = record.index
        if not 0 <= index < self._num_lines:
            return
        is_known, was_good = self.has(index), self.is_good(index)
        if is_known and (was_good or not record.is_good):
            return
        entry = (place + 1) << _OFFSET_BITS | record.offset
        self._map[index * _ENTRY : (index + 1) * _ENTRY] = entry.to_bytes(_ENTRY, "little")
        self._map[self._num_lines * _ENTRY + index] = record.is_good
        self.num_known += not is_known
        self.num_good += record.is_good

    @property
    def num_done(self) -> int:
        return self.num_good if self._retries_failed else self.num_known

    def is_done(self, index: int) -> bool:
        return self.is_good(index) if self._retries_failed else self.has(index)

    def has(self, index: int) -> bool:
        return self._entry(index) != 0

    def is_good(self, index: int) -> bool:
        return bool(self._map[self._num_lines * _ENTRY + index])

    def _entry(self, index: int) -> int:
        return int.from_bytes(self._map[index * _ENTRY : (index + 1) * _ENTRY], "little")

    def records(self) -> Iterator[Record]:
        """The answers in the order of the lines. Raises OutputError for a line without one."""
        opened: OrderedDict[int, BinaryIO] = OrderedDict()
        with ExitStack() as stack:
            for index in range(self._num_lines):
                entry = self._entry(index)
                place, offset = (entry >> _OFFSET_BITS) - 1, entry & ((1 << _OFFSET_BITS) - 1)
                record = None
                if entry:
                    file = opened.get(place)
                    if file is None:
                        file = opened[place] = stack.enter_context(self._files[place].open("rb", buffering=1 << 16))
                        if len(opened) > _MOST_OPEN:
                            opened.popitem(last=False)[1].close()
                    opened.move_to_end(place)
                    if file.tell() != offset:
                        file.seek(offset)
                    record = _read_record(file.readline(MOST_RECORD), offset)
                if record is None or record.index != index:
                    raise OutputError(f"putting answers together: found none of line {index + 1} of those that are not "
                                      "blank, expected one each; run the same command again")  # fmt: skip
                yield record

    def close(self) -> None:
        self._map.close()
        remove(self._path)


@dataclass(kw_only=True)
class Store:
    """The folder of a job that this process has locked."""

    job: Job
    output: Path
    folder: Path
    retries_failed: bool = False

    def index(self) -> Index:
        return Index(self.folder, self.job.num_lines, retries_failed=self.retries_failed)

    def take_up(self) -> None:
        """Keep the good answers of an output that this job has made, for the output that will replace it."""
        journal = Journal(self.folder)
        try:
            with self.output.open("rb", buffering=1 << 18) as file:
                for index in range(self.job.num_lines):
                    line = file.readline(MOST_RECORD)
                    if is_good_line(line, self.job):
                        journal.append(index, line, is_good=True)
        finally:
            journal.close()

    def publish(self, tell: Callable[[int], None] = lambda _lines: None, *, replaces: bool = False) -> Outcome:
        """Make the output of all answers, in order, and give it its name. Raises OutputError. With `replaces`, an
        output of the same job that is there is replaced."""
        merged, index = self.folder / "merged", self.index()
        remove(merged)
        failed: list[str] = []
        num_failed = 0
        try:
            descriptor = os.open(merged, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o644)
            with os.fdopen(descriptor, "wb", buffering=1 << 18) as file:
                for record in index.records():
                    file.write(record.line)
                    if not record.is_good:
                        num_failed += 1
                        if len(failed) < 8:
                            failed.append(describe(record.line))
                    tell(record.index + 1)
                file.flush()
                os.fsync(file.fileno())
        finally:
            index.close()
        _name(merged, self.output, replaces=replaces)
        return Outcome(num_lines=self.job.num_lines, num_failed=num_failed, failed=tuple(failed))


def _name(merged: Path, output: Path, *, replaces: bool) -> None:
    """Give a file its name, on the disk when this returns. Raises OutputError where another file has it."""
    doing = f"writing the answers to {output}"
    try:
        if replaces:
            merged.replace(output)
        else:
            os.link(merged, output, follow_symlinks=False)
    except FileExistsError as error:
        raise OutputError(f"{doing}: it exists already; move it away, and run the same command again") from error
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        refuse_existing(output, "the answers")  # a file system without links has no rename that spares a file either
        merged.rename(output)
    flush_to_disk(output.resolve().parent, contents=False)


def describe(line: bytes) -> str:
    """What a line of the output says of its failure."""
    value = json.loads(line)
    number = str(value["id"]).rpartition("_")[2]
    error, response = value.get("error"), value.get("response") or {}
    if error:
        text = f"{error['code']}: {error['message']}"
    else:
        text = f"status {response.get('status_code')}: {json.dumps(response.get('body'))}"
    return f"line {number}: {text.removeprefix(f'invalid_line: line {number}: ')}"


@contextmanager
def open_store(job: Job, output: Path, *, retries_failed: bool = False) -> Iterator[Store]:
    """The folder of a job, made or taken up. It stays if the block raises, and goes when the output has its name.

    Raises OutputError if `output` exists, if another process runs the job, if what is there is not of a batch, and for
    errors of the disk; BatchInputInvalid if the interrupted job had another input or other settings."""
    output = output.resolve()
    folder, doing = partial_path(output), f"writing the answers to {output}"
    try:
        with locked_folder(folder, doing) as held:
            _check_job(job, folder, held, output, doing)
            yield Store(job=job, output=output, folder=folder, retries_failed=retries_failed)
            for path in sorted(folder.iterdir(), key=lambda path: path.name == "job.json"):
                if path.name != "lock":
                    remove(path)
            remove(folder)
    except OSError as error:
        if error.errno is None:
            raise
        raise OutputError(
            f"{doing}: {error.strerror} ({error.filename or folder}); the answers so far are kept: mend the cause, and "
            "run the same command again"
        ) from error


def _check_job(job: Job, folder: Path, held: int, output: Path, doing: str) -> None:
    path = folder / "job.json"
    discard = f"rm -r {shlex.quote(str(folder))}"
    if not path.exists():
        others = sorted(one.name for one in folder.iterdir() if one.name not in ("lock", "index", "merged"))
        others = [name for name in others if not name.startswith(f".{path.name}.")]
        if others:
            raise OutputError(
                f"{doing}: the folder {folder} has {named(others[0])} and no job.json, expected the answers of an "
                f"interrupted batch; name another output, or discard the folder ({discard})"
            )
        replace_file(path, json.dumps(job.facts(), indent=1) + "\n")
        flush_to_disk(folder, contents=False)
        flush_to_disk(folder.parent, contents=False)
        return
    with open_own(path.name, held, os.O_RDONLY, path, doing):
        pass
    try:
        found = read_json(path, "the job of an interrupted batch", OutputError)
    except OutputError as error:
        raise OutputError(f"{error}; name another output, or discard what was answered ({discard})") from error
    problems = _differences(found, job.facts())
    if problems:
        what = "its input is another one" if problems[0].startswith("input") else "its settings were others"
        raise BatchInputInvalid(
            f"resuming {output}: the run that was interrupted is of another job: {what}; give the same again, name "
            f"another output, or discard what was answered ({discard}):{listing(problems)}"
        )


def _differences(found: Any, expected: Mapping[str, Any]) -> list[str]:  # noqa: ANN401 - JSON value
    before = found if isinstance(found, dict) else {}
    problems = []
    for part in ("version", "input", "settings"):
        was, now = before.get(part), expected[part]
        if was == json.loads(json.dumps(now)):
            continue
        if isinstance(was, dict) and isinstance(now, dict):
            problems += [f"{part}: {key} is {_short(now[key])}, it was {_short(was.get(key))}" for key in now
                         if was.get(key) != json.loads(json.dumps(now[key]))]  # fmt: skip
        else:
            problems.append(f"{part}: found {_short(now)}, it was {_short(was)}")
    return problems


def _short(value: Any) -> str:  # noqa: ANN401 - JSON value
    return "absent" if value is None else named(value if isinstance(value, str) else json.dumps(value), 70)


def refuse_foreign(output: Path) -> None:
    """Raise OutputError for a file in the place of an output that no batch has made."""
    if not os.path.lexists(output):
        refuse_existing(output, "the answers")
        return
    doing = f"writing the answers to {output}"
    if not stat.S_ISREG(output.lstat().st_mode):
        raise OutputError(f"{doing}: it exists already and is no regular file; name another output")
    with output.open("rb") as file:
        begin = file.read(len(_BEGIN))
    if begin != _BEGIN:
        raise OutputError(
            f"{doing}: it exists already, and does not begin as the answers of a batch; it was left as it is: name "
            "another output, or move it away"
        )


def finished(job: Job, output: Path) -> Outcome | None:
    """What an output holds that this job has made, with all of its lines; None if there is no such file. Raises
    OutputError for any other file of that name, which is left as it is."""
    if not os.path.lexists(output):
        return None
    refuse_foreign(output)
    doing = f"writing the answers to {output}"
    num_lines, failed, num_failed = 0, list[str](), 0
    prefix = f'{{"id":"{job.answer_id(0)[:-1]}'.encode()
    with output.open("rb", buffering=1 << 18) as file:
        while line := file.readline(MOST_RECORD):
            if not line.startswith(prefix) or not line.endswith(b"\n"):
                raise OutputError(
                    f"{doing}: it exists already, and line {num_lines + 1} is not an answer of this batch with these "
                    "settings; it was left as it is: name another output, or move it away"
                )
            num_lines += 1
            if is_good_line(line, job):
                continue
            try:
                said = describe(line)
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                raise OutputError(
                    f"{doing}: it exists already, and line {num_lines} of it is damaged; it was left as it is: move it "
                    "away, and run the same command again"
                ) from error
            num_failed += 1
            if len(failed) < 8:
                failed.append(said)
    if num_lines != job.num_lines:
        raise OutputError(
            f"{doing}: it exists already with {num_lines} answers of this batch, expected {job.num_lines}; it was left "
            "as it is: move it away, and run the same command again"
        )
    return Outcome(num_lines=num_lines, num_failed=num_failed, failed=tuple(failed))


def is_good_line(line: bytes, job: Job) -> bool:
    """Whether the request of a line of the output got what it asked for."""
    with contextlib.suppress(ValueError, TypeError, AttributeError):
        value = json.loads(line)
        if value.get("error") is not None:
            return False
        return job.form == "prompts" or 200 <= value["response"]["status_code"] < 300
    return False
