"""The text that verify measures on: complete, of every kind, and stated in the result."""

from __future__ import annotations

import ast
import hashlib
import json
import shutil
from pathlib import Path

import pytest
import yaml
from conftest import EXAMPLES

from cli.main import main
from export.errors import ConfigError
from export.tokenizer.loading import load_tokenizer
from trt_build.comparison import evaluation_text
from trt_build.comparison.evaluation_text import KINDS, NUM_SECTIONS, own_text, read_texts

TEXTS = Path(evaluation_text.__file__).parent / "texts"


def sections(kind) -> list[str]:
    return (TEXTS / f"{kind}.txt").read_text("utf-8").removesuffix("\n").split("\n\f\n")


def test_every_file_is_a_kind_of_four_short_sections_and_the_text_has_them_all_once():
    assert sorted(path.stem for path in TEXTS.iterdir()) == sorted(KINDS)
    content = own_text().content
    assert len(content.encode()) >= 24_000
    for kind in KINDS:
        assert len(sections(kind)) == NUM_SECTIONS
        for section in sections(kind):
            assert content.count(section) == 1
            assert 100 <= len(section.encode()) <= 500


def test_the_first_quarter_has_a_section_of_every_kind():
    content = own_text().content
    places = [content.index(section) for kind in KINDS for section in sections(kind)[:1]]
    later = [content.index(section) for kind in KINDS for section in sections(kind)[1:]]
    assert max(places) < min(later)
    assert max(places) < len(content) / 3


@pytest.mark.parametrize("example", ["tiny-phixtral/experts/code", "tiny-mixtral/checkpoint"])
def test_the_text_is_as_long_as_the_demo_asks(example):
    assert len(load_tokenizer(EXAMPLES / example).encode_prompt(own_text().content)) >= 8192


def test_what_is_meant_to_be_python_json_and_yaml_is():
    for kind in ("python", "python-tools"):
        for section in sections(kind):
            ast.parse(section)
    for kind, parse in (("json", json.loads), ("yaml", yaml.safe_load)):
        for section in sections(kind):
            assert parse(section)


def test_the_result_names_the_text_its_digest_and_how_much_of_it_was_scored(
    tmp_path, tiny_checkpoint, tiny_engines, capsys
):
    engine = shutil.copytree(tiny_engines("fp32"), tmp_path / "engine")
    own = tmp_path / "own.txt"
    own.write_text("Grüße aus der Küche. " * 40, "utf-8")
    words = ["-q", "verify", str(engine), "--reference", str(tiny_checkpoint)]
    found = {}
    for name, more in (("own", ["--text", str(own), "--tokens", "700"]), ("default", ["--tokens", "64"])):
        assert main([*words, *more, "--json"]) == 0
        found[name] = json.loads(capsys.readouterr().out)["text"]
    data = own.read_bytes()
    assert found["own"] == {
        "names": [str(own)], "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest(),
        "tokens": 700, "windows": 2,
    }  # fmt: skip
    assert found["default"]["names"] == ["moeship's held-out text"]
    assert (found["default"]["tokens"], found["default"]["windows"]) == (64, 1)
    kept = json.loads((engine / "engine.json").read_text())["verification"]
    assert kept["text"] == found["default"]
    assert main([*words, "--tokens", "64"]) == 0
    digest = found["default"]["sha256"]
    assert f"64 tokens in 1 window of moeship's held-out text (SHA-256 {digest[:12]}…)" in capsys.readouterr().out


def test_a_text_that_is_no_utf8_is_wrong_input(tmp_path):
    (tmp_path / "latin").write_bytes("Grüße".encode("latin-1"))
    with pytest.raises(ConfigError, match="pass text files in UTF-8"):
        read_texts([tmp_path / "latin"])
