"""MoeshipError, the base class of moeship's errors; the errors of reading, merging, quantising and exporting; and the
functions that format names, values and lists for messages.

    MoeshipError                 anything a user can mend; the command line prints it and exits with `exit_status`
    ├── ConfigError              config.json or a YAML says something that moeship does not honour
    ├── CheckpointError          tensors or files of a checkpoint are missing, damaged or of the wrong shape
    ├── MergeError               experts that cannot be merged
    ├── ExportError              a graph that cannot be written as planned
    │   └── KernelsError         the kernels that were chosen lack what the graph needs; others may have it
    ├── QuantizationError        a tensor that the asked precision cannot hold
    ├── OutputError              the output cannot be written where it was asked
    └── MissingPackageError      an optional package is needed; the message names the extra that installs it

Every message says what was being done, to which object, what was found against what was expected, and what to do.
"""

from __future__ import annotations

import difflib
import reprlib
from collections.abc import Iterable, Sequence

_MOST_PROBLEM = 600  # bytes of one line of a listing
_MOST_SUGGESTED = 64  # longest word for which a similar one is searched: the search takes quadratic time in its length


class MoeshipError(Exception):
    """Base class of every error whose message is meant for the user.

    The message as text has control characters escaped, since a terminal would obey those that a damaged file brings
    in. It is at most `most_bytes` long in UTF-8. A longer message is cut in the middle, since the advice is at the end.
    """

    exit_status = 2
    most_bytes = 1900  # longest message; with the name of the class and what a command adds, at most 2 kB

    def __str__(self) -> str:
        return _cut(printable(super().__str__()), self.most_bytes)


class ConfigError(MoeshipError):
    """A configuration holds a key or value that is not honoured."""


class CheckpointError(MoeshipError):
    """A checkpoint's tensors or files are missing, damaged or unexpected."""


class MergeError(MoeshipError):
    """Experts cannot be merged into one checkpoint."""


class ExportError(MoeshipError):
    """A graph cannot be written as planned."""


class KernelsError(ExportError):
    """The kernels of a graph lack a router or an activation that it needs."""


class QuantizationError(MoeshipError):
    """A tensor cannot be stored in the precision that was asked for."""


class OutputError(MoeshipError):
    """The output cannot be written where it was asked for."""


class MissingPackageError(MoeshipError):
    """An optional package is not installed, or is installed and cannot be imported; then `reason` says why."""

    def __init__(self, package: str, purpose: str, extra: str, reason: str = "") -> None:
        there = f", which is installed but cannot be imported ({reason})" if reason else ""
        super().__init__(
            f"{purpose} needs the package {package}{there}; install it with: pip install 'moeship[{extra}]'"
        )


def listing(problems: Sequence[str], most: int = 8, of: int | None = None) -> str:
    """The first `most` problems as indented lines, and a last line that counts the rest. `of` is the total number of
    problems, if `problems` does not hold all of them."""
    total = len(problems) if of is None else of
    lines = [f"\n  - {_cut(problem, _MOST_PROBLEM)}" for problem in problems[:most]]
    if total > most:
        lines.append(f"\n  - and {total - most} more")
    return "".join(lines)


def printable(text: str) -> str:
    """The text with control characters escaped, except for line breaks and tabs."""
    return _escaped(text, keep="\n\t")


def named(name: object, most: int = 160) -> str:
    """A name or path from a file or the command line, made safe for one line of a message: control characters are
    escaped, and a long name is cut in the middle to about `most` bytes of UTF-8."""
    text = str(name)
    return _cut(_escaped(_cut(text, most)), most)


def names(every: Iterable[object], most: int = 8) -> str:
    """The first `most` names with commas between them, and "and N more" for the rest."""
    found = list(every)
    rest = [f"and {len(found) - most} more"] if len(found) > most else []
    return ", ".join([*(named(name, 80) for name in found[:most]), *rest])


def shown(value: object, most: int = 100) -> str:
    """The repr of a value from a file, on one line of at most `most` bytes. A large value takes no more time than a
    small one."""
    return _cut(_BOUNDED.repr(value), most)


def kind_of(value: object) -> str:
    """What a value read from JSON or YAML is, in the words of JSON: "null", "a list" and the like."""
    kinds = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return "null" if value is None else kinds.get(type(value), f"a {type(value).__name__}")


def with_article(noun: str) -> str:
    """A family's or another noun with "a" or "an" before it, by its first letter."""
    return f"{'an' if noun[:1] in tuple('aeio') else 'a'} {noun}"


def near_match(word: object, known: Iterable[str]) -> str | None:
    """The known word that is most similar to `word`; None if none is similar, or if `word` is very long."""
    if not isinstance(word, str) or len(word) > _MOST_SUGGESTED:
        return None
    return next(iter(difflib.get_close_matches(word, list(known), n=1)), None)


def suggestion(word: object, known: Iterable[str]) -> str:
    """ " (did you mean ...?)" with the known word that is most similar to `word`; empty if none is similar."""
    near = near_match(word, known)
    return f" (did you mean {near}?)" if near else ""


def unknown(word: str, known: Iterable[str], there_are: str = "There are") -> str:
    """The end of a message about an unknown name: "WORD is unknown; did you mean ...? There are: ..."."""
    near = near_match(word, known)
    hint = f"; did you mean {near}?" if near else "."
    return f"{shown(word)} is unknown{hint} {there_are}: {', '.join(known)}"


class _Bounded(reprlib.Repr):
    """repr that shows a few items of a few levels, and a very large whole number as its number of bits."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxdict, self.maxlist, self.maxtuple, self.maxset = 3, 4, 4, 4, 4
        self.maxstring = self.maxother = 100

    def repr_int(self, x: int, level: int) -> str:  # noqa: ARG002 - as the base class calls it
        bits = x.bit_length()
        return repr(x) if bits <= 256 else f"a whole number of {bits} bits"

    def repr_dict(self, x: dict[object, object], level: int) -> str:
        if level <= 0 and x:
            return "{...}"
        few = list(zip(x, range(self.maxdict), strict=False))
        pieces = [f"{self.repr1(key, level - 1)}: {self.repr1(x[key], level - 1)}" for key, _ in few]
        return "{" + ", ".join(pieces + ["..."] * (len(x) > self.maxdict)) + "}"


_BOUNDED = _Bounded()


def _escaped(text: str, keep: str = "") -> str:
    """The text with unprintable characters (control, bidirectional and others) as escapes."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape").decode() for char in text
    )


def _cut(text: str, most: int) -> str:
    """The text, cut in the middle if it takes more than `most` bytes of UTF-8."""
    if len(text) <= most and (text.isascii() or len(text.encode("utf-8", "surrogatepass")) <= most):
        return text
    tail = most // 3
    head = most - tail - len(" ... ")
    first = text[:head].encode("utf-8", "surrogatepass")[:head]
    last = text[-tail:].encode("utf-8", "surrogatepass")[-tail:]
    return f"{first.decode('utf-8', 'ignore')} ... {last.decode('utf-8', 'ignore')}"
