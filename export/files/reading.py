"""Reads files that others wrote, within bounds: bytes, text and JSON. Every failure raises the caller's error class.

    config = read_json(folder / "config.json", "config.json of the checkpoint")

Only regular files are read: reading a pipe could block for ever, and opening a device can have side effects. The size
of a file is checked before it is read, and the number of its values before they are created, so that memory and time
are bounded by constants. Text is UTF-8 without a byte-order mark, as RFC 8259 requires for JSON. An object with the
same key twice is refused, since JSON readers differ in which of the two values they take.
"""

from __future__ import annotations

import io
import json
import os
import re
import stat
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

from export.errors import ConfigError, MoeshipError, kind_of, named, shown

MAX_JSON_BYTES = 32 << 20  # enough for the index of a checkpoint of 250,000 tensors
# Limit on brackets and commas in a JSON text: it has at most one value more. A value takes up to 250 bytes of memory.
MAX_JSON_VALUES = 1_000_000
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

Kind = type[MoeshipError]


@contextmanager
def open_regular(path: Path, doing: str, error: Kind = ConfigError) -> Iterator[io.FileIO]:
    """Open a regular file for reading, without a buffer. Raises `error`, whose message begins with `doing`, for
    anything that is not a regular file, and if the system refuses."""
    with _mended(path, doing, error):
        if not stat.S_ISREG(os.stat(path).st_mode):  # noqa: PTH116 - checked before opening: a device may react
            _refuse_irregular(path, doing, error)
        file = open(path, "rb", buffering=0, opener=_without_waiting)  # noqa: SIM115 - closed below
    with file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            _refuse_irregular(path, doing, error)
        yield file


def _refuse_irregular(path: Path, doing: str, error: Kind) -> NoReturn:
    raise error(
        f"{doing}: {named(path)} is a folder, a pipe or a device, expected a regular file; put a regular file there"
    )


def is_regular(path: Path) -> bool:
    """Whether `path` is a regular file or a link to one; false for a name that no file can have."""
    try:
        return stat.S_ISREG(os.stat(path).st_mode)  # noqa: PTH116 - of a name that may not be one
    except (OSError, ValueError):
        return False


def is_there(path: Path) -> bool:
    """Whether anything of that name exists, a broken link included; false for a name that no file can have.

    Use it for optional files: a broken link shows that a file was meant to be there, so it must be refused and not
    taken for a missing file.
    """
    return os.path.lexists(path)


def is_folder(path: Path) -> bool:
    """Whether `path` is a folder or a link to one; false for a name that no file can have."""
    return os.path.isdir(path)  # noqa: PTH112 - Path.is_dir raises for such a name


def check_name(path: Path | str, doing: str, error: Kind = ConfigError) -> None:
    """Raise `error` for a path that is not UTF-8: it could not be written in a manifest or given to ONNX Runtime."""
    try:
        os.fspath(path).encode()
    except UnicodeEncodeError as reason:
        raise error(f"{doing}: the name {named(path)} is not UTF-8; rename it") from reason


def read_bytes(path: Path, what: str, *, most: int = MAX_JSON_BYTES, error: Kind = ConfigError) -> bytes:
    """Read a regular file of at most `most` bytes. Raises `error`, also if the file changes while it is read."""
    doing = f"reading {what}"
    with open_regular(path, doing, error) as file, _mended(path, doing, error):
        before = os.fstat(file.fileno())
        if before.st_size > most:
            raise error(
                f"{doing}: {named(path)} has {before.st_size} bytes, expected at most {most}; check that it is the "
                "right file"
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
    """Decode UTF-8 without a byte-order mark. Raises `error`."""
    if data.startswith(_BYTE_ORDER_MARK):
        raise error(f"{doing}: {named(path)} begins with a byte-order mark; save it as UTF-8 without one")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as reason:
        raise error(
            f"{doing}: {named(path)} is not UTF-8 (byte {reason.start}: {reason.reason}); save it as UTF-8"
        ) from reason


def read_text(path: Path, what: str, *, most: int = MAX_JSON_BYTES, error: Kind = ConfigError) -> str:
    """Read the text of a regular UTF-8 file of at most `most` bytes. Raises `error`."""
    return decode_text(read_bytes(path, what, most=most, error=error), f"reading {what}", path, error)


def read_json(path: Path, what: str, error: Kind = ConfigError) -> dict[str, Any]:
    """Read a JSON object from a file. Raises `error` if the file is missing, not JSON, or not an object."""
    text = read_text(path, what, error=error)
    try:
        value = parse_json(text)
    except ValueError as reason:
        raise error(f"reading {what}: {named(path)} is not readable JSON ({reason})") from reason
    if not isinstance(value, dict):
        raise error(f"reading {what}: {named(path)} holds {kind_of(value)}, expected a JSON object")
    return value


def whole_number(text: str, least: int, most: int) -> int | None:
    """Parse a whole number from `least` to `most`, written in digits only; None for any other text. A long text is not
    converted, so that the time stays small."""
    digits = text.lstrip("0") or text[:1]
    if not text.isdecimal() or len(digits) > len(str(most)):
        return None
    number = int(digits)
    return number if least <= number <= most else None


def parse_json(text: str, *, standard: bool = False) -> Any:  # noqa: ANN401 - JSON value
    """Parse a JSON text. Raises ValueError with the reason in one line.

    Besides what Python's `json` refuses, these are refused: the same key twice in an object, more than MAX_JSON_VALUES
    values, nesting too deep for Python, and unpaired surrogates, which cannot be encoded in a file name or output.
    `standard` also refuses NaN, Infinity and -0, which Python reads and Rust's serde_json does not.
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
    except ValueError as error:
        raise ValueError(words_of(error)) from error
    return value


def words_of(error: ValueError) -> str:
    """The words of an error of Python's `json`, without those that name Python's own functions."""
    if str(error).startswith("Exceeds the limit"):
        return f"a whole number in it has more than {sys.get_int_max_str_digits()} digits"
    return str(error)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise ValueError(f"the key {shown(twice)} occurs twice in one object")
    return found


def _refuse_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number in JSON")


def _unsigned_zero(text: str) -> int:
    if text == "-0":
        raise ValueError("-0 is not a whole number here")
    return int(text)


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


@contextmanager
def _mended(path: Path, doing: str, error: Kind) -> Iterator[None]:
    """Turn an OSError in the block, and the ValueError for a path with a NUL character, into `error`."""
    try:
        yield
    except FileNotFoundError as reason:
        raise error(
            f"{doing}: {named(path)} does not exist; check that {named(path.parent)} is the right folder"
        ) from reason
    except OSError as reason:
        raise error(
            f"{doing}: {named(path)} cannot be read ({reason.strerror or reason}); correct that, or name another path"
        ) from reason
    except ValueError as reason:
        raise error(f"{doing}: {named(path)} is not a path ({reason}); name another") from reason
