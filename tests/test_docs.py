"""What people read: the length of the README, that links lead somewhere, and that the tour of the code and each command
and flag in the docs name what exists."""

from __future__ import annotations

import argparse
import ast
import dataclasses
import importlib
import re
import shlex
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from cli.main import COMMANDS
from trt_build.ort import engine as onnx_engine
from trt_build.ort.engine import Manifest
from trt_build.trtllm import engine as trtllm_engine
from trt_build.trtllm.engine import TrtllmManifest

ROOT = Path(__file__).parents[1]
MOST_README_LINES = 150
FOLDERS = (".", "docs", "ci/gpu", "examples/tiny-phixtral", "examples/tiny-mixtral", "examples/maixtchup")
PAGES = sorted(str(path.relative_to(ROOT)) for folder in FOLDERS for path in (ROOT / folder).glob("*.md"))
TOUR = ROOT / "docs" / "architecture.md"
# Folders of the project whose files pages name.
SOURCES = ("benchmarks", "ci", "cli", "clients", "deploy", "examples", "export", "tests", "triton_repo", "trt_build")

_LINK = re.compile(r"\]\(([^)#\s]+)(?:#[^)]*)?\)")
_ANCHOR = re.compile(r"\]\(([^)#\s]*)#([^)]*)\)")
_PLACE = re.compile(r"`([\w./]+\.py): ([\w., ]+)`")
_FILE = re.compile(rf"\b(?:{'|'.join(SOURCES)})/[\w./*-]+\.(?:py|cpp|h|sh|json|svg|md|yml)\b")
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
_INLINE = re.compile(r"`([^`\n]+)`")


def _text(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", PAGES)
def test_lines_of_pages_have_120_columns_at_most(page):
    """Rows of tables, outputs of programs and pictures cannot be broken."""
    lines = _BLOCK.sub("", _text(page)).splitlines()
    assert [line for line in lines if len(line) > 120 and not line.startswith(("|", "!["))] == []


def test_the_readme_is_short():
    assert len(_text("README.md").splitlines()) <= MOST_README_LINES


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_to_files(page):
    links = [link for link in _LINK.findall(_text(page)) if ":" not in link]
    assert [link for link in links if not ((ROOT / page).parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES)
def test_links_to_headings_lead_to_headings(page):
    targets = [(path or Path(page).name, anchor) for path, anchor in _ANCHOR.findall(_text(page)) if ":" not in path]
    anchors = {path: _anchors(_text(str(Path(page).parent / path))) for path, _ in targets}
    assert [f"{path}#{anchor}" for path, anchor in targets if anchor not in anchors[path]] == []


def _anchors(text: str) -> set[str]:
    """The anchors that GitHub gives to a page's headings: lower case, hyphens for spaces, no other punctuation."""
    headings = re.findall(r"^#+ (.+)$", _BLOCK.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_page_of_the_docs_is_linked_from_the_readme():
    text = _text("README.md")
    assert [path.name for path in (ROOT / "docs").glob("*.md") if f"(docs/{path.name})" not in text] == []


@pytest.mark.parametrize("page", PAGES)
def test_files_that_pages_name_exist(page):
    named = set(_FILE.findall(_text(page)))
    assert [path for path in sorted(named) if not list(ROOT.glob(path))] == []


def test_the_tour_names_files_by_paths_that_end_as_theirs():
    """Also those without their folder, as `resume.py` beside export/."""
    files = [f"/{path.relative_to(ROOT)}" for folder in SOURCES for path in (ROOT / folder).rglob("*.*")]
    named = set(re.findall(r"(?<![\w/*.])[\w/]+\.(?:py|cpp)\b", TOUR.read_text("utf-8")))
    assert len(named) > 80
    assert [path for path in sorted(named) if not any(file.endswith(f"/{path}") for file in files)] == []


def test_the_tour_names_functions_that_exist():
    places = [(path, name) for path, names in _PLACE.findall(TOUR.read_text("utf-8")) for name in names.split(", ")]
    assert len(places) > 30, "the lives of a weight and of a request name their functions as `file.py: function`"
    assert [f"{path}: {name}" for path, name in places if name not in _definitions(path)] == []


def _definitions(path: str) -> set[str]:
    """Functions and classes of a module, methods as Class.method."""
    found = set()
    for node in ast.parse(_text(path)).body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{item.name}" for item in node.body if isinstance(item, ast.FunctionDef)}
    return found


def test_the_messages_of_the_troubleshooting_page_are_in_the_source():
    symptoms = re.findall(r"^\| `([^`]+)`", _text("docs/troubleshooting.md"), re.M)
    assert len(symptoms) > 25
    texts = _messages()
    assert [symptom for symptom in symptoms if not any(symptom in text for text in texts)] == []


def _messages() -> list[str]:
    """The texts in the source of the product, each up to the next value that is put into it."""
    folders = ("cli", "clients", "export", "triton_repo", "trt_build")
    trees = [ast.parse(path.read_text("utf-8")) for folder in folders for path in (ROOT / folder).rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    kernels = [path.read_text("utf-8") for path in (ROOT / "trt_build/ort/kernels").glob("*.cpp")]
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)] + [
        literal for text in kernels for literal in re.findall(r'"([^"\n]+)"', text)
    ]


@pytest.mark.parametrize(
    ("manifest", "heading"),
    [
        (Manifest, "## engine.json of an engine for ONNX Runtime"),
        (TrtllmManifest, "## engine.json of an engine for TensorRT-LLM"),
    ],
)
def test_the_fields_of_engine_json_are_described_and_no_others(manifest, heading):
    text = _text("docs/engine-format.md")
    section = text.partition(f"{heading}\n")[2].partition("\n## ")[0]
    shared, _, table = section.rpartition("Beside them:") if "Beside them:" in section else ("", "", section)
    named = set(re.findall(r"^\| `(\w+)`", table, re.M)) | set(re.findall(r"^\| `\w+`, `(\w+)`", table, re.M))
    named |= set(re.findall(r"`(\w+)`", shared))
    assert named == {field.name for field in dataclasses.fields(manifest)} | {"digest"}


def test_the_format_versions_that_engine_json_is_written_with_are_those_described():
    found = re.findall(r"^\| `format_version` \| (\d+)", _text("docs/engine-format.md"), re.M)
    assert found == [str(onnx_engine.FORMAT_VERSION), str(trtllm_engine.FORMAT_VERSION)]


@pytest.mark.parametrize("page", PAGES)
def test_commands_and_flags_that_pages_name_exist(page):
    problems = [f"{' '.join(words)}: {problem}" for words in _commands(_text(page)) if (problem := _problem_of(words))]
    assert problems == []


@pytest.mark.parametrize("page", ["docs/guide.md", "docs/operations.md"])
def test_the_flags_in_the_tables_of_pages_exist(page):
    """A table below the heading "moeship COMMAND" has that command's flags, any other table those of serve."""
    tables = [
        (re.match(r"moeship (\w+)", section), re.findall(r"^\| (`--[^|]*)\|", section, re.M))
        for section in _text(page).split("\n## ")
    ]
    named = [
        (heading[1] if heading else "serve", flag)
        for heading, cells in tables
        for cell in cells
        for flag in re.findall(r"--\w[\w-]*", cell)
    ]
    assert len(named) > 8
    assert [f"{command} {flag}" for command, flag in named if flag not in _flags(command)] == []


def test_a_flag_that_no_command_has_is_found():
    page = "```sh\n$ moeship build --checkpoint X \\\n  --presicion int4   # a comment\n```\nand `moeship severe X`"
    assert [_problem_of(words) for words in _commands(page)] == ["no flag --presicion", "no such command"]


def _commands(text: str) -> Iterator[list[str]]:
    """The words of each command of the project in a page's shell blocks, behind $ in its other blocks, and in inline
    code."""
    lines = []
    for language, block in _BLOCK.findall(text):
        whole = block.replace("\\\n", " ").splitlines()
        lines += [line for line in whole if language == "sh" or line.strip().startswith("$ ")]
    for line in [*lines, *_INLINE.findall(_BLOCK.sub("", text))]:
        yield from _commands_of_line(line.strip().removeprefix("$ "))


def _commands_of_line(line: str) -> Iterator[list[str]]:
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # an apostrophe in a program's output
        return
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words.pop(0)
    if not words:
        return
    ends = [at for at, word in enumerate(words) if word in ("&&", "|", ";", "&", ">")]
    command = words[: ends[0]] if ends else words
    if Path(command[0]).name in ("moeship", "make") or (command[0] in ("python", "bash") and len(command) > 1):
        yield command
    if ends:
        yield from _commands_of_line(shlex.join(words[ends[0] + 1 :]))


def _problem_of(words: list[str]) -> str | None:
    program, *rest = words
    if program == "make":
        targets = set(re.findall(r"^(\w+):", _text("Makefile"), re.M))
        return next((f"no target {word}" for word in rest if "=" not in word and word not in targets), None)
    if program in ("python", "bash"):
        script = next((word for word in rest if word.endswith((".py", ".sh"))), None)
        return None if script is None or (ROOT / script).is_file() else "no such script"
    rest = [word for word in rest if word not in ("-v", "-q")]
    if not rest or rest[0] in ("COMMAND", "X", "--version", "--help"):
        return None
    if rest[0] not in COMMANDS:
        return "no such command"
    flags = [word.partition("=")[0] for word in rest[1:] if re.match(r"--\w", word)]
    return next((f"no flag {flag}" for flag in flags if flag not in _flags(rest[0])), None)


@cache
def _flags(command: str) -> set[str]:
    parser = argparse.ArgumentParser()
    importlib.import_module(COMMANDS[command][0]).add_arguments(parser)
    return set(parser._option_string_actions)
