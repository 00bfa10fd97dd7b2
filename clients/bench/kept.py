"""The file of a load test: every request that has ended, one JSON object a line, written while the test runs.

The first line names the format and says what is measured. A line of kind "load" begins each load, "request" lines
follow, and an "end" line has the window and the figures. Whatever ends the test, what was measured until then is in the
file: a load without its end line is read as one that was broken off, and its window ends with its last sample.
"""

from __future__ import annotations

import dataclasses
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from clients.bench.load import Load
from clients.bench.objective import Objective, read_objective
from clients.bench.records import Record, Run
from clients.bench.report import summarise
from export.errors import ConfigError, OutputError, named
from export.files.output import refuse_existing
from export.files.reading import open_regular

FORMAT, VERSION = "moeship load test", 1
BROKEN_OFF = "the file breaks off"
_FLUSH_S = 1.0  # longest time that an ended request waits in memory
_MOST_BYTES = 1 << 34
_HINT = "expected a file that `moeship bench --output` wrote"


@dataclass(frozen=True, kw_only=True)
class Level:
    """One load: its name, its figures, its requests and what the server said of itself meanwhile."""

    name: str
    report: Mapping[str, Any]
    records: Sequence[Record]
    metrics: Mapping[str, Any] | None = None


@dataclass(frozen=True, kw_only=True)
class LoadTest:
    """A load test: what was measured, and its loads in order."""

    about: Mapping[str, Any]
    levels: Sequence[Level]

    @property
    def ended(self) -> str | None:
        """Why the test ended before it was whole; None if it was."""
        early = [level.report["ended_early"] for level in self.levels if level.report["ended_early"]]
        asked = self.about.get("loads") or []
        if early:
            return str(early[0])
        return BROKEN_OFF if len(self.levels) < len(asked) else None


class Keeper:
    """Writes the file of a load test. A context; does nothing where `path` is None. `about` is written when the first
    load begins; where none does, no file is left. Raises OutputError where the file cannot be made.

    An error of the disk later on does not end the test: nothing more is written, and `fault` is the error to raise when
    the figures have been told."""

    def __init__(self, path: Path | None, about: Mapping[str, Any]) -> None:
        self._path, self._about = path, about
        self._file: TextIO | None = None
        self._flushed = 0.0  # when the file was last flushed
        self._load, self._has_begun = "", False
        self.fault: OutputError | None = None
        if path is not None:
            refuse_existing(path, "the load test")
            self._file = self._open(path)

    def __enter__(self) -> Keeper:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._path is None or self._file is None:
            return
        try:
            self._file.close()
        except OSError as reason:
            self._fail(reason)
        if not self._has_begun:
            self._path.unlink(missing_ok=True)

    def begin(self, name: str, load: Load, works: Mapping[str, Any]) -> None:
        """Begin a load."""
        if not self._has_begun:
            self._write({"kind": FORMAT, "version": VERSION, "about": self._about}, at_once=True)
            self._has_begun = True
        values = {key: value for key, value in vars(load).items() if key != "schedule" and value is not None}
        is_trace = load.schedule is not None
        self._load = name
        self._write({"kind": "load", "load": name, "is_trace": is_trace, **values, "works": works}, at_once=True)

    def keep(self, record: Record) -> None:
        """Write a request that has ended."""
        self._write({"kind": "request", "load": self._load, **vars(record)})

    def end(self, run: Run, level: Level, cores: int) -> None:
        """End the load."""
        facts = {"window_s": run.window_s, "cpu_s": run.cpu_s, "counting": run.counting, "ended": run.ended}
        figures = {"cores": cores, "report": level.report, "metrics": level.metrics}
        self._write({"kind": "end", "load": level.name, **facts, **figures}, at_once=True)

    def _open(self, path: Path) -> TextIO:
        try:
            return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644), "w", encoding="utf-8")
        except OSError as error:
            raise OutputError(f"writing the load test to {path}: {error.strerror}; name another output") from error

    def _write(self, line: Mapping[str, Any], *, at_once: bool = False) -> None:
        if self._file is None or self.fault is not None:
            return
        try:
            self._file.write(json.dumps(line, ensure_ascii=True) + "\n")
            now = time.monotonic()
            if at_once or now - self._flushed >= _FLUSH_S:
                self._file.flush()
                self._flushed = now
        except OSError as error:
            self._fail(error)

    def _fail(self, error: OSError) -> None:
        if self.fault is None:
            self.fault = OutputError(
                f"writing the load test to {self._path}: {error.strerror}; the file has what was measured before that. "
                "Make room, or name another output"
            )


def read_test(path: Path, objective: Objective | None = None) -> LoadTest:
    """Read the file of a load test. The figures are computed anew of its samples, with `objective` in place of the one
    that it was measured with. Raises ConfigError for a file that is none, or that is damaged; a last line that is not
    whole is left out."""
    reader = _Reader(path, objective)
    for number, line in _lines(path):
        reader.take(number, line)
    return reader.finish()


def _lines(path: Path) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """The number and the object of each line. Raises ConfigError."""
    doing = f"reading the load test {named(path)}"
    try:
        with open_regular(path, doing) as raw, open(raw.fileno(), encoding="utf-8", closefd=False) as file:
            if os.fstat(raw.fileno()).st_size > _MOST_BYTES:
                raise ConfigError(f"{doing}: it has more than {_MOST_BYTES} bytes; {_HINT}")
            for number, text in enumerate(file, 1):
                try:
                    line = json.loads(text)
                except (ValueError, RecursionError) as error:
                    if number > 1 and not text.endswith("\n"):
                        return  # a writer was killed in the middle of it
                    raise ConfigError(f"{doing}, line {number}: {error}; {_HINT}") from error
                if not isinstance(line, dict) or (number == 1 and line.get("kind") != FORMAT):
                    raise ConfigError(f"{doing}, line {number}: found something else; {_HINT}")
                if number == 1 and line.get("version") != VERSION:
                    raise ConfigError(f"{doing}: its version is {line.get('version')!r}, expected {VERSION}")
                yield number, line
    except OSError as error:
        raise ConfigError(f"{doing}: {error.strerror}; {_HINT}") from error
    except UnicodeDecodeError as error:
        raise ConfigError(f"{doing}: it is no UTF-8 text; {_HINT}") from error


@dataclass
class _Works:
    described: dict[str, Any]

    def describe(self) -> dict[str, Any]:
        return self.described


@dataclass
class _Reader:
    """Gathers the lines of a file."""

    path: Path
    objective: Objective | None
    about: dict[str, Any] | None = None
    levels: list[Level] = field(default_factory=list)
    load: dict[str, Any] | None = None
    records: list[Record] = field(default_factory=list)

    def take(self, number: int, line: Mapping[str, Any]) -> None:
        """Take one line. Raises ConfigError."""
        try:
            if number == 1:
                self.about = dict(line["about"])
            elif line["kind"] == "load":
                self._close(None)
                self.load = dict(line)
            elif line["kind"] == "request":
                values = {key: value for key, value in line.items() if key not in ("kind", "load")}
                values["arrivals"] = [(float(at), int(tokens)) for at, tokens in values["arrivals"]]
                values |= {name: int(values[name]) for name in ("index", "stream", "max_tokens")}
                values |= {name: float(values[name]) for name in ("due_s", "sent_s", "end_s")}
                self.records.append(Record(**values))
            elif line["kind"] == "end":
                self._close(line)
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ConfigError(
                f"reading the load test {named(self.path)}, line {number}: {error!r}; it is damaged, measure again"
            ) from error

    def finish(self) -> LoadTest:
        """The test. Raises ConfigError for a file without a request."""
        self._close(None)
        if self.about is None or not any(level.records for level in self.levels):
            raise ConfigError(f"reading the load test {named(self.path)}: it has no request that ended; {_HINT}")
        return LoadTest(about=self.about, levels=self.levels)

    def _close(self, end: Mapping[str, Any] | None) -> None:
        if self.load is None or not (end or self.records):
            self.load, self.records = None, []
            return
        load, works = _load_of(self.load, self.records), _Works(dict(self.load["works"]))
        records = sorted(self.records, key=lambda record: record.index)
        last = max((record.end_s or 0.0 for record in records), default=0.0)
        run = Run(
            records=records,
            window_s=float(end["window_s"]) if end else last,
            cpu_s=float(end["cpu_s"]) if end else 0.0,
            counting=str(end["counting"]) if end else "what the file does not say, as it breaks off",
            ended=end["ended"] if end else BROKEN_OFF,
        )
        said = (self.about or {}).get("objective")
        objective = self.objective or (read_objective(said, "the objective of a load test") if said else None)
        report = summarise(run, load, works, int(end["cores"]) if end else os.cpu_count() or 1, objective)
        metrics = end.get("metrics") if end else None
        self.levels.append(Level(name=str(self.load["load"]), report=report, records=records, metrics=metrics))
        self.load, self.records = None, []


def _load_of(line: Mapping[str, Any], records: Sequence[Record]) -> Load:
    known = {field.name for field in dataclasses.fields(Load)}
    values = {key: value for key, value in line.items() if key in known}
    if line["is_trace"]:
        values["schedule"] = tuple(sorted(record.due_s for record in records))
    return Load(**values)
