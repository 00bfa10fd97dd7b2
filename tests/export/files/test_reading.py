"""Files that others wrote: what is no regular file, no UTF-8, no JSON or YAML, or beyond the bounds is refused."""

from __future__ import annotations

import json
import os
import time

import pytest

from export.errors import ConfigError, MoeshipError, listing, named, shown
from export.files import reading
from export.files.reading import parse_json, read_bytes, read_json, read_text, whole_number
from export.files.yaml_reading import read_yaml


def refusal(read, path, *arguments):
    started = time.process_time()
    with pytest.raises(ConfigError) as caught:
        read(path, *arguments)
    assert time.process_time() - started < 5
    text = str(caught.value)
    assert len(text.encode()) <= 2000
    return text


def written(folder, data):
    path = folder / "file"
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "link to a device"])
def test_only_regular_files_are_read(tmp_path, kind):
    path = tmp_path / "config.json"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "device":
        path = reading.Path("/dev/zero")
    else:
        path.symlink_to("/dev/zero")
    assert "is a folder, a pipe or a device, expected a regular file" in refusal(read_json, path, "config.json")


def test_a_pipe_that_takes_a_files_place_while_it_is_opened_is_refused(tmp_path, monkeypatch):
    path, pipe = written(tmp_path, "{}"), tmp_path / "pipe"
    os.mkfifo(pipe)
    opened = os.open
    monkeypatch.setattr(os, "open", lambda _path, flags, *rest: opened(pipe, flags, *rest))
    assert "expected a regular file" in refusal(read_json, path, "config.json")


@pytest.mark.parametrize("name", ["n" * 300, "a\0b", "absent"])
def test_names_that_no_file_has_are_refused(tmp_path, name):
    text = refusal(read_json, tmp_path / name, "config.json")
    assert any(words in text for words in ("does not exist", "File name too long", "is not a path"))
    assert "\0" not in text


def test_a_file_that_is_too_large_is_refused_before_it_is_read(tmp_path):
    path = tmp_path / "config.json"
    with path.open("wb") as file:
        file.truncate(1 << 40)  # a hole: it takes no room
    assert f"has {1 << 40} bytes, expected at most" in refusal(read_json, path, "config.json")


@pytest.mark.parametrize("change", ["grows", "shrinks", "is written"])
def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path, monkeypatch, change):
    path = written(tmp_path, json.dumps({"a": "b" * 100}))
    state, first = os.fstat, []

    def changing(descriptor):
        found = state(descriptor)
        first.append(found)
        if len(first) == 2:  # after the size was taken, before the bytes are read
            with path.open("r+b") as file:
                file.truncate({"grows": 200, "shrinks": 50, "is written": 109}[change])
            os.utime(path, ns=(0, found.st_mtime_ns + 1))
        return found

    monkeypatch.setattr(os, "fstat", changing)
    assert "changed while it was read" in refusal(read_json, path, "config.json")


@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-8-sig", "cp037"])
@pytest.mark.parametrize("read", [read_json, read_yaml])
def test_every_encoding_but_utf_8_is_refused(tmp_path, encoding, read):
    text = refusal(read, written(tmp_path, '{"model_type": "phi", "ä": 1}'.encode(encoding, "replace")), "config.json")
    words = ("is not UTF-8", "begins with a byte-order mark", "is not readable")
    assert any(word in text for word in words)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('{"a": 1, "b": {"c": 1, "c": 2}}', "the key 'c' occurs twice in one object"),
        ('{"a": ' + "9" * 5000 + "}", "a whole number in it has more than 4300 digits"),
        ("[" * 100_000, "nested too deeply"),
        ('{"a":' * 100_000, "nested too deeply"),
        ('{"a": "\\ud800"}', "half of a surrogate pair"),
        ("[" + "0," * 1_100_000 + "0]", "holds more than 1000000 values"),
        ('{"a": 1}}', "Extra data"),
    ],
)
def test_json_that_python_would_take_or_choke_on_is_refused(text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_json(text)


def test_a_pair_of_surrogates_is_one_character():
    assert parse_json('{"a": "\\ud83d\\ude00"}') == {"a": "😀"}


@pytest.mark.parametrize("text", ["[NaN]", "[Infinity]", "[-Infinity]", "[-0]"])
def test_the_standards_json_has_no_other_numbers(text):
    parse_json(text)
    with pytest.raises(ValueError, match="is no"):
        parse_json(text, standard=True)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("a: !!bool x", "'x' is no bool"),
        ("a: !!int ''", "'' is no int"),
        ("a: !!int _", "'_' is no int"),
        ("a: !!float x", "'x' is no float"),
        ("a: !!timestamp x", "'x' is no timestamp"),
        ("a: 2026-13-45", "'2026-13-45' is no timestamp"),
        ("a: 0x" + "f" * 6000, "a whole number of 24000 bits"),
        ("a: 1" + ":59" * 3000, "a whole number of"),
        ("a: &x [*x]", "an alias is inside the value that it refers to"),
        ("[" * 5000, "nested deeper than 32 levels"),
        ("- " * 5000, "nested deeper than 32 levels"),
        ("".join(f"k{index}: {index}\n" for index in range(20_000)), "more than 20000 values"),
        ("a: 1\nb: 2\na: 3\n", "a stands twice"),
        ("a: 1\n---\nb: 2\n", "expected a single document"),
        ("a: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
        ('a: "\\ud800"', "holds half of a surrogate pair"),
        ('"\\udfff": a', "holds half of a surrogate pair"),
        ("a: \x07", "special characters are not allowed"),
    ],
)
def test_yaml_that_its_library_would_choke_on_is_refused(tmp_path, text, reason):
    assert reason in refusal(read_yaml, written(tmp_path, text), "the merge configuration")


def test_yaml_of_just_the_values_and_levels_that_are_allowed_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("export.files.yaml_reading.MAX_NODES", 7)
    monkeypatch.setattr("export.files.yaml_reading.MAX_DEPTH", 3)
    # The object, its two keys, the list and its number, and once more the list and the number, which the alias names.
    text = "a: &a [1]\nb: *a\n"
    assert read_yaml(written(tmp_path, text), "it") == {"a": [1], "b": [1]}
    monkeypatch.setattr("export.files.yaml_reading.MAX_NODES", 6)
    assert "more than 6 values, counting aliases" in refusal(read_yaml, written(tmp_path, text), "it")
    assert "nested deeper than 3 levels" in refusal(read_yaml, written(tmp_path, "a: [[1]]"), "it")


@pytest.mark.parametrize("bomb", ["<<: [{}]", "x: [{}]"])
def test_aliases_that_multiply_are_refused(tmp_path, bomb):
    lines = ["a0: &a0 {x: 1}"]
    for level in range(1, 12):
        lines.append(f"a{level}: &a{level} {{{bomb.format(', '.join([f'*a{level - 1}'] * 9))}}}")
    assert "more than 20000 values, counting aliases" in refusal(read_yaml, written(tmp_path, "\n".join(lines)), "it")


def test_aliases_and_merge_keys_do_what_yaml_says(tmp_path):
    text = "base: &b {noise: 1, scale: 2}\none: &o {<<: *b, scale: 3}\ntwo: {<<: *o, noise: 4}\nthree: *b\n"
    assert read_yaml(written(tmp_path, text), "it") == {
        "base": {"noise": 1, "scale": 2},
        "one": {"noise": 1, "scale": 3},
        "two": {"noise": 4, "scale": 3},
        "three": {"noise": 1, "scale": 2},
    }


def test_a_message_is_bounded_and_without_control_characters():
    long = str(MoeshipError("start " + "ä" * 10_000 + " end"))
    assert long.startswith("start ä")
    assert long.endswith("ä end")
    assert 1850 < len(long.encode()) <= 1900
    assert str(MoeshipError("a\x1b[31mb\u202ec\x85d\r")) == "a\\x1b[31mb\\u202ec\\x85d\\r"
    assert str(MoeshipError("reading:" + listing(["one", "two"]))) == "reading:\n  - one\n  - two"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("a\nb", "'a\\nb'"),
        ({"type": "yarn"}, "{'type': 'yarn'}"),
        (10**400, "a whole number of 1329 bits"),
        ([1, 2, 3, 4, 5], "[1, 2, 3, 4, ...]"),
        ([[[[[1]]]]], "[[[[...]]]]"),
        ([1, 2, 3, 4], "[1, 2, 3, 4]"),
        ((1, 2, 3, 4, 5), "(1, 2, 3, 4, ...)"),
        ({1, 2, 3, 4, 5}, "{1, 2, 3, 4, ...}"),
        ({"a": 1, "b": 2, "c": 3, "d": 4, "e": 5}, "{'a': 1, 'b': 2, 'c': 3, 'd': 4, ...}"),
        (2**256 - 1, f"{2**256 - 1}"),
        (2**256, "a whole number of 257 bits"),
    ],
)
def test_values_are_shown_in_bounds(value, text):
    assert shown(value) == text


def test_a_name_stays_on_its_line():
    assert named("shard\n  - all is well\x1b[0m.safetensors") == "shard\\n  - all is well\\x1b[0m.safetensors"
    assert len(named("n" * 5000)) <= 160


def test_bytes_and_text_have_the_bound_that_is_asked_for(tmp_path):
    path = written(tmp_path, "12345")
    assert read_bytes(path, "it", most=5) == b"12345"
    assert "has 5 bytes, expected at most 4" in refusal(lambda path: read_text(path, "it", most=4), path)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("1", 1), ("4096", 4096), ("0004", 4), ("0", None), ("4097", None), ("9" * 5000, None), ("", None),
        ("-1", None), ("1.0", None), (" 1", None), ("auto", None), ("٣", 3), ("²", None), ("0" * 5000 + "7", 7),
    ],
)  # fmt: skip
def test_a_whole_number_is_read_within_its_range(text, number):
    assert whole_number(text, 1, 4096) == number


def test_zero_is_a_whole_number_where_the_range_holds_it():
    assert whole_number("000", 0, 9) == 0
