"""Files that others wrote, read within bounds: bytes, text, JSON and YAML, and one kind of error for each.

    config = read_json(folder / "config.json", "config.json of the checkpoint")

Only regular files are read: a pipe would block for ever, a device can do anything. A file's size is looked at before
it is read, and the number of its values before they are made, so that memory and time are bounded by constants. Text
is UTF-8 without a byte-order mark, as RFC 8259 has it for JSON; no key of an object may stand twice, since readers
differ in which of the two they take.
"""

from __future__ import annotations

import io
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from export.errors import ConfigError, MoeshipError, named, shown

MAX_JSON_BYTES = 32 << 20  # the index of a checkpoint of 250,000 tensors
# Brackets and commas of a JSON text, which its values cannot outnumber by more than one. A value takes up to 250 bytes.
MAX_JSON_VALUES = 1_000_000
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

Kind = type[MoeshipError]


@contextmanager
def open_regular(path: Path, doing: str, error: Kind = ConfigError) -> Iterator[io.FileIO]:
    """A regular file, open for reading without a buffer. Raises `error`, which says what was being done, for whatever
    else lies there and where the system refuses."""
    with _mended(path, doing, error):
        if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116 - looked at before it is opened: a device may react
            _refuse_irregular(path, doing, error)
        file = open(path, "rb", buffering=0, opener=_without_waiting)  # noqa: SIM115 - closed below
    with file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            _refuse_irregular(path, doing, error)
        yield file


def _refuse_irregular(path: Path, doing: str, error: Kind) -> NoReturn:
    raise error(
        f"{doing}: {named(path)} is a folder, a pipe or a device, expected a regular file; put the file itself there"
    )


def is_regular(path: Path) -> bool:
    """Whether a regular file lies there; false for a name that no file can have."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)  # noqa: PTH116 - of a name that may not be one
    except (OSError, ValueError):
        return False


def is_there(path: Path) -> bool:
    """Whether anything lies there, of whatever kind, a link to nothing too: whoever put it there meant a file, and to
    do without would lose what the file says. False for a name that no file can have."""
    return os.path.lexists(path)


def is_folder(path: Path) -> bool:
    """Whether a folder lies there; false for a name that no file can have."""
    return os.path.isdir(path)  # noqa: PTH112 - Path.is_dir raises for such a name


def check_name(path: Path | str, doing: str, error: Kind = ConfigError) -> None:
    """Raise `error` for a path with bytes that are no UTF-8: manifests are text, and ONNX Runtime takes text."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError as reason:
        raise error(f"{doing}: the name {named(path)} is not UTF-8; rename it") from reason


def read_bytes(path: Path, what: str, *, most: int = MAX_JSON_BYTES, error: Kind = ConfigError) -> bytes:
    """The bytes of a regular file of at most `most`. Raises `error`, also where the file changes meanwhile."""
    doing = f"reading {what}"
    with open_regular(path, doing, error) as file, _mended(path, doing, error):
        before = os.fstat(file.fileno())
        if before.st_size > most:
            raise error(
                f"{doing}: {named(path)} has {before.st_size} bytes, expected at most {most}; is it the right file?"
            )
        pieces, size = [], 0
        while size <= before.st_size and (piece := file.read(before.st_size + 1 - size)):
            pieces.append(piece)
            size += len(piece)
        after = os.fstat(file.fileno())
    if (before.st_size, before.st_mtime_ns) != (after.st_size, after.st_mtime_ns) or size != before.st_size:
        raise error(f"{doing}: {named(path)} changed while it was read; read it again when nothing writes to it")
    return b"".join(pieces)


def decode_text(data: bytes, doing: str, path: Path, error: Kind = ConfigError) -> str:
    """UTF-8 without a byte-order mark, as text. Raises `error`."""
    if data.startswith(_BYTE_ORDER_MARK):
        raise error(f"{doing}: {named(path)} begins with a byte-order mark; save it as UTF-8 without one")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as reason:
        raise error(
            f"{doing}: {named(path)} is not UTF-8 (byte {reason.start}: {reason.reason}); save it as UTF-8"
        ) from reason


def read_text(path: Path, what: str, *, most: int = MAX_JSON_BYTES, error: Kind = ConfigError) -> str:
    """The text of a regular UTF-8 file of at most `most` bytes. Raises `error`."""
    return decode_text(read_bytes(path, what, most=most, error=error), f"reading {what}", path, error)


def read_json(path: Path, what: str, error: Kind = ConfigError) -> dict[str, Any]:
    """A JSON object from a file. Raises `error` when the file is absent, not JSON, or not an object."""
    text = read_text(path, what, error=error)
    try:
        value = parse_json(text)
    except ValueError as reason:
        raise error(f"reading {what}: {named(path)} is not readable JSON ({reason})") from reason
    if not isinstance(value, dict):
        raise error(f"reading {what}: {named(path)} holds a {type(value).__name__}, expected a JSON object")
    return value


def whole_number(text: str, least: int, most: int) -> int | None:
    """The number that a text of digits alone says, where it lies between the two; None for any other text. The time it
    takes does not grow with the text."""
    digits = text.lstrip("0") or text[:1]
    if not text.isdecimal() or len(digits) > len(str(most)):
        return None
    number = int(digits)
    return number if least <= number <= most else None


def parse_json(text: str, *, standard: bool = False) -> Any:  # noqa: ANN401 - JSON value
    """The value of a JSON text. Raises ValueError with the reason in one line.

    Refused beside what `json` refuses: a key that stands twice in an object, more than MAX_JSON_VALUES values,
    nesting that Python cannot follow, and halves of surrogate pairs, which no file name and no output can hold.
    `standard` also refuses NaN, Infinity and a -0, which Python reads and Rust's serde_json does not.
    """
    if text.count("[") + text.count("{") + text.count(",") > MAX_JSON_VALUES:
        raise ValueError(f"it holds more than {MAX_JSON_VALUES} values")
    constant = _refuse_number if standard else None
    integer = _unsigned_zero if standard and "-0" in text else None
    try:
        value = json.loads(text, object_pairs_hook=_unique, parse_constant=constant, parse_int=integer)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    except UnicodeEncodeError as error:
        raise ValueError("a text in it holds half of a surrogate pair") from error
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(twice)} stands twice in one object")
    return found


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no number of JSON")


def _unsigned_zero(text: str) -> int:
    if text == "-0":
        raise ValueError("-0 is no whole number here")
    return int(text)


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


@contextmanager
def _mended(path: Path, doing: str, error: Kind) -> Iterator[None]:
    """What the system refuses, and paths that are none (a NUL in them), as `error`."""
    try:
        yield
    except FileNotFoundError as reason:
        raise error(f"{doing}: {named(path)} does not exist; is {named(path.parent)} the right folder?") from reason
    except OSError as reason:
        raise error(
            f"{doing}: {named(path)} cannot be read ({reason.strerror or reason}); mend that, or name another path"
        ) from reason
    except ValueError as reason:
        raise error(f"{doing}: {named(path)} is not a path ({reason}); name another") from reason
