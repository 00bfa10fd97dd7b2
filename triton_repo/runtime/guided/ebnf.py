"""Grammars in EBNF: reads them, and writes them as the library's grammars.

    root ::= "[" (item ("," item)*)? "]"     # a rule; the answer is the rule `root`
    item ::= [0-9]+ | root

This is the notation of llama.cpp's GBNF (grammars/README.md) and of xgrammar's EBNF, which TensorRT-LLM takes: texts in
double quotes, classes in brackets, "." for any character but a line's end, groups, | between alternatives, and * + ?
{2} {2,} {2,5} behind what is repeated. # begins a comment. Escapes are those of JSON, \\x41 and \\U0001F600.

The library reads a text lexeme by lexeme, and takes the longest. Where a grammar has no rule that needs itself, all of
it is one lexeme. Elsewhere each character is one, so that no way to read a text is lost.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from triton_repo.runtime.guided.needs import Needs

ROOT = "root"
_MOST_REPEATS = 1024  # in {n,m}
_LONGEST_LEXEME = 50_000  # characters of a regular expression; longer grammars are written as rules
_MOST_WRITTEN = 20 * _LONGEST_LEXEME  # the same for all rules of a grammar
_DEEPEST = 100  # groups within groups
_MOST_SIGNS = 4  # of repetition, behind one thing
_SHORT = {"n": "\n", "t": "\t", "r": "\r", "b": "\b", "f": "\f"}
_DIGITS = {"x": 2, "u": 4, "U": 8}
_TOKEN = re.compile(
    r"""(?P<space>(?:\s|\#[^\n]*)+) | (?P<name>[A-Za-z_][A-Za-z0-9_-]*)(?P<defines>\s*::=)?
    | (?P<text>"(?:[^"\\\n]|\\.)*") | (?P<class>\[(?:[^\]\\\n]|\\.)*\])
    | \{\s*(?P<least>\d+)\s*(?P<comma>,)?\s*(?P<most>\d+)?\s*\} | (?P<sign>[.()|*+?])""",
    re.VERBOSE,
)


@dataclass(frozen=True)
class Letters:
    """One character of a class, as a regular expression."""

    regex: str


@dataclass(frozen=True)
class Name:
    """The text of another rule."""

    name: str


@dataclass(frozen=True)
class Series:
    """Parts one after the other."""

    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Choice:
    """One of several parts."""

    parts: tuple[Part, ...]


@dataclass(frozen=True)
class Repeat:
    """A part `least` to `most` times, None for any number."""

    part: Part
    least: int
    most: int | None


Part = Letters | Name | Series | Choice | Repeat


def lark_of(text: str) -> str:
    """The library's grammar (its dialect of Lark) of an EBNF grammar. Raises ValueError, whose text says what is wrong
    and where."""
    rules = _Reader(text).rules()
    if ROOT not in rules:
        raise ValueError(f"found no rule {ROOT}, which is where an answer begins; add one: {ROOT} ::= ...")
    for name, part in rules.items():
        unknown = next((used for used in _names(part) if used not in rules), None)
        if unknown is not None:
            raise ValueError(f"found the rule {unknown} in {name}, which the grammar does not have; add it")
    order = _used_first(rules)
    if not _can_end(rules):
        raise ValueError(f"found a rule {ROOT} that needs itself without end, so that no finite answer meets it")
    regex = None if order is None else _regex_of(rules, order)
    if regex is not None:
        return f"start: LEXEME\nLEXEME: /{regex}/" if regex else 'start: ""'
    names = {name: f"rule{number}" for number, name in enumerate(rules)}
    lines = [f"{names[name]}: {_lark(part, names)}" for name, part in rules.items()]
    return "\n".join([f"start: {names[ROOT]}", *lines])


class _Reader:
    """Reads the rules of a grammar."""

    def __init__(self, text: str) -> None:
        self._text, self._place, self._depth = text, 0, 0
        self._next: re.Match[str] | None = None
        self._advance()

    def rules(self) -> dict[str, Part]:
        rules: dict[str, Part] = {}
        while self._next is not None:
            name = self._next["name"]
            if not self._next["defines"]:
                raise self._problem("expected a rule: its name and ::=")
            if name in rules:
                raise self._problem(f"the rule {name} is there twice; join the two with |")
            self._advance()
            rules[name] = self._choice()
        return rules

    def _advance(self) -> None:
        self._next = None
        while self._place < len(self._text):
            found = _TOKEN.match(self._text, self._place)
            if found is None:
                raise self._problem("expected a rule, a text in double quotes, a class in brackets, or a sign")
            if not found["space"]:
                self._next, self._place = found, found.end()
                return
            self._place = found.end()

    def _problem(self, problem: str) -> ValueError:
        start = self._place if self._next is None else self._next.start()
        line = self._text.count("\n", 0, start) + 1
        return ValueError(f"line {line} at {self._text[start : start + 24]!r}: {problem}")

    def _sign(self) -> str | None:
        return None if self._next is None else self._next["sign"]

    def _choice(self) -> Part:
        parts = [self._series()]
        while self._sign() == "|":
            self._advance()
            parts.append(self._series())
        return parts[0] if len(parts) == 1 else Choice(tuple(parts))

    def _series(self) -> Part:
        parts: list[Part] = []
        while (part := self._single()) is not None:
            parts.append(self._repeated(part))
        return parts[0] if len(parts) == 1 else Series(tuple(parts))

    def _single(self) -> Part | None:
        found = self._next
        if found is None or found["defines"] or found["sign"] in ("|", ")"):
            return None
        part: Part
        if found["name"]:
            part = Name(found["name"])
        elif found["text"]:
            part = Series(tuple(Letters(_code(letter)) for letter, _ in self._letters(found["text"][1:-1])))
        elif found["class"]:
            part = Letters(self._class(found["class"][1:-1]))
        elif found["sign"] == ".":
            part = Letters(r"[^\n]")
        elif found["sign"] == "(":
            part = self._group()
        else:
            raise self._problem("nothing stands before it that it could repeat")
        self._advance()
        return part

    def _group(self) -> Part:
        self._depth += 1
        if self._depth > _DEEPEST:
            raise self._problem(f"found more than {_DEEPEST} groups within groups; name the inner ones as rules")
        self._advance()
        part = self._choice()
        if self._sign() != ")":
            raise self._problem("expected ) at the end of a group")
        self._depth -= 1
        return part

    def _repeated(self, part: Part) -> Part:
        depth = 0
        while self._next is not None and (self._sign() in ("*", "+", "?") or self._next["least"]):
            depth += 1
            if depth > _MOST_SIGNS:
                raise self._problem(f"found more than {_MOST_SIGNS} signs of repetition for one thing")
            sign = self._sign()
            if sign:
                least, most = int(sign == "+"), (1 if sign == "?" else None)
            else:
                least = int(self._next["least"][:9])
                most = int(self._next["most"][:9]) if self._next["most"] else None if self._next["comma"] else least
                if max(least, most or 0) > _MOST_REPEATS or (most is not None and most < least):
                    raise self._problem(f"expected {{n,m}} with n <= m and at most {_MOST_REPEATS}")
            part = Repeat(part, least, most)
            self._advance()
        return part

    def _letters(self, text: str) -> Iterator[tuple[str, bool]]:
        """The characters of a text with escapes, and whether each was escaped."""
        place = 0
        while place < len(text):
            if text[place] != "\\":
                yield text[place], False
                place += 1
                continue
            sign, size = text[place + 1], _DIGITS.get(text[place + 1], 0)
            digits = text[place + 2 : place + 2 + size]
            if size:
                code = int(digits, 16) if re.fullmatch("[0-9A-Fa-f]+", digits) and len(digits) == size else -1
                if not 0 <= code <= 0x10FFFF or 0xD800 <= code < 0xE000:
                    raise self._problem(f"expected the {size} digits of a character's code behind \\{sign}")
                yield chr(code), True
            else:
                if sign.isalnum() and sign not in _SHORT:
                    raise self._problem(f"\\{sign} is no escape; for a class write its characters: [0-9]")
                yield _SHORT.get(sign, sign), True
            place += 2 + size

    def _class(self, text: str) -> str:
        """The regular expression of what stands between brackets."""
        is_not = text.startswith("^")
        letters = list(self._letters(text[is_not:]))
        if not letters:
            raise self._problem("expected a character in the class")
        ranges, place = [], 0
        while place < len(letters):
            first = last = letters[place][0]
            if place + 2 < len(letters) and letters[place + 1] == ("-", False):
                last = letters[place + 2][0]
                place += 2
            if last < first:
                raise self._problem(f"the range {first}-{last} is the wrong way round")
            ranges.append(f"{_code(first)}-{_code(last)}")
            place += 1
        return f"[{'^' if is_not else ''}{''.join(ranges)}]"


def _code(letter: str) -> str:
    """A character in a regular expression."""
    return rf"\x{{{ord(letter):x}}}"


def _names(part: Part) -> Iterator[str]:
    """The rules that a part names."""
    if isinstance(part, Name):
        yield part.name
    elif isinstance(part, Series | Choice):
        for one in part.parts:
            yield from _names(one)
    elif isinstance(part, Repeat):
        yield from _names(part.part)


def _used_first(rules: Mapping[str, Part]) -> list[str] | None:
    """The rules that the root needs, each behind those that it names itself; None where one needs itself."""
    order: dict[str, bool] = {}  # whether all that a rule names is there
    waiting = [(ROOT, iter([*_names(rules[ROOT])]))]
    order_done: list[str] = []
    order[ROOT] = False
    while waiting:
        name, inner = waiting[-1]
        used = next(inner, None)
        if used is None:
            waiting.pop()
            order[name] = True
            order_done.append(name)
        elif used not in order:
            order[used] = False
            waiting.append((used, iter([*_names(rules[used])])))
        elif not order[used]:
            return None
    return order_done


def _can_end(rules: Mapping[str, Part]) -> bool:
    """Whether some finite text meets the root."""
    needs = Needs()
    nothing, named = needs.all_of([]), {name: needs.later() for name in rules}

    def node(part: Part) -> int:
        if isinstance(part, Name):
            return named[part.name]
        if isinstance(part, Series):
            return needs.all_of([node(one) for one in part.parts])
        if isinstance(part, Choice):
            return needs.any_of([node(one) for one in part.parts])
        if isinstance(part, Repeat) and part.least:
            return node(part.part)
        return nothing

    for name, part in rules.items():
        needs.define(named[name], node(part))
    return needs.can_be_met(named[ROOT])


def _regex_of(rules: Mapping[str, Part], order: list[str]) -> str | None:
    """The root as one regular expression, where no rule needs itself; None if it would be too long."""
    found: dict[str, str] = {}
    total = 0
    for name in order:
        # Counted first: rules that name a long one thousands of times would be gigabytes.
        length = _length(rules[name], found)
        total += length
        if length > _LONGEST_LEXEME or total > _MOST_WRITTEN:
            return None
        found[name] = _regex(rules[name], found)
    return found[ROOT]


def _length(part: Part, found: Mapping[str, str]) -> int:
    """The characters of what `_regex` gives, but for those of groups and signs."""
    if isinstance(part, Letters):
        return len(part.regex)
    if isinstance(part, Name):
        return len(found[part.name])
    if isinstance(part, Repeat):
        return _length(part.part, found)
    return sum(_length(one, found) for one in part.parts)


def _regex(part: Part, found: Mapping[str, str]) -> str:
    if isinstance(part, Letters):
        return part.regex
    if isinstance(part, Name):
        return f"(?:{found[part.name]})"
    if isinstance(part, Repeat):
        return f"(?:{_regex(part.part, found)}){_times(part)}"
    inner = [_regex(one, found) for one in part.parts]
    return "".join(inner) if isinstance(part, Series) else f"(?:{'|'.join(inner)})"


def _lark(part: Part, names: Mapping[str, str]) -> str:
    if isinstance(part, Letters):
        return f"/{part.regex}/"
    if isinstance(part, Name):
        return names[part.name]
    if isinstance(part, Repeat):
        return f"({_lark(part.part, names)}){_times(part)}"
    inner = [_lark(one, names) for one in part.parts] or ['""']
    return " ".join(inner) if isinstance(part, Series) else f"({' | '.join(inner)})"


def _times(repeat: Repeat) -> str:
    signs = {(0, None): "*", (1, None): "+", (0, 1): "?"}
    most = "" if repeat.most is None else repeat.most
    return signs.get((repeat.least, repeat.most), f"{{{repeat.least},{most}}}")
