"""Text that every Python installation carries, in four slices, split into training and held-out documents.

  code     standard-library modules, docstrings and comments removed
  prose    those docstrings and comments, the language reference's help topics, the licence
  tests    the standard library's own test suite (Lib/test)
  headers  CPython's C headers

A document is held out when the SHA-256 of its name says so: one in sixteen, the same on every machine. Prose goes
with its module, so no text of a held-out module is trained on in another slice.

    python corpus.py OUT   writes OUT/<slice>.txt, the held-out text of each slice
"""

from __future__ import annotations

import argparse
import hashlib
import io
import sys
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

SLICES = ("code", "prose", "tests", "headers")
HELD_OUT_ONE_IN = 16
# Not the standard library's own text: packages installed beside it, and tables of numbers.
SKIPPED_FOLDERS = {"site-packages", "dist-packages", "__pycache__", "ensurepip", "lib-dynload", "encodings"}


@dataclass(frozen=True)
class Document:
    """One piece of text: its slice, the name that decides the split, and the text."""

    slice: str
    name: str
    text: str

    @property
    def held_out(self) -> bool:
        return is_held_out(self.name)


def is_held_out(name: str) -> bool:
    digest = hashlib.sha256(name.encode()).digest()
    return int.from_bytes(digest[:4], "big") % HELD_OUT_ONE_IN == 0


def split_code_and_prose(source: str) -> tuple[str, str]:
    """Separate a module into code without docstrings and comments, and the text of those."""
    code: list[str] = []
    prose: list[str] = []
    lines = source.splitlines(keepends=True)
    drop: set[int] = set()
    at_statement_start = True
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            prose.append(token.string.lstrip("#! ") + "\n")
            row, column = token.start
            kept = lines[row - 1][:column].rstrip()
            lines[row - 1] = kept + "\n"
            if not kept:
                drop.add(row)
        elif token.type == tokenize.STRING and at_statement_start:
            prose.append(token.string.strip("rRbBuU\"'") + "\n")
            drop.update(range(token.start[0], token.end[0] + 1))
        if token.type not in (tokenize.NL, tokenize.COMMENT):
            at_statement_start = token.type in (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    blank = 0
    for row, line in enumerate(lines, start=1):
        if row in drop:
            continue
        blank = blank + 1 if not line.strip() else 0
        if blank <= 1:
            code.append(line)
    return "".join(code).strip() + "\n", "".join(prose).strip() + "\n"


def documents(*, only_held_out: bool = False) -> Iterator[Document]:
    """Every document of this Python installation, in a fixed order. `only_held_out` leaves out modules that are not
    held out without reading them, which takes a tenth of the time."""
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.rglob("*.py")):
        parts = path.relative_to(library).parts
        if SKIPPED_FOLDERS & set(parts) or parts[0] == "pydoc_data":
            continue
        name = "/".join(parts)
        if only_held_out and not is_held_out(name):
            continue
        try:
            source = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # some test files are not UTF-8 on purpose
            continue
        if {"test", "tests", "idle_test"} & set(parts):
            yield Document("tests", name, source)
            continue
        try:
            code, prose = split_code_and_prose(source)
        except (tokenize.TokenError, SyntaxError):  # lib2to3 carries Python 2 files
            continue
        yield Document("code", name, code)
        yield Document("prose", name, prose)
    yield from _reference_documents()
    include = Path(sysconfig.get_path("include"))
    for path in sorted(include.rglob("*.h")):
        name = "/".join(path.relative_to(include).parts)
        yield Document("headers", name, path.read_text(encoding="utf-8", errors="replace"))


def _reference_documents() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        yield Document("prose", f"topics/{name}", text)
    licence = Path(sysconfig.get_path("stdlib")) / "LICENSE.txt"
    if licence.is_file():
        yield Document("prose", "LICENSE.txt", licence.read_text(encoding="utf-8"))


def held_out_texts() -> dict[str, str]:
    """Slice name -> its held-out documents joined; a slice this installation does not carry is absent."""
    texts: dict[str, list[str]] = {}
    for document in documents(only_held_out=True):
        if document.held_out and len(document.text) > 200:
            texts.setdefault(document.slice, []).append(document.text)
    return {name: "\n".join(texts[name]) for name in SLICES if name in texts}


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the held-out text of each slice.")
    parser.add_argument("output", type=Path, metavar="OUT")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    for name, text in held_out_texts().items():
        (options.output / f"{name}.txt").write_text(text, encoding="utf-8")
        print(f"{name}: {len(text)} characters", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
