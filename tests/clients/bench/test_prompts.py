"""The requests of a load: lengths, prompts of files, synthetic prompts, and that a seed decides all of them."""

from __future__ import annotations

import json
import random
from statistics import median

import pytest
from bench_standin import works

from clients.bench.load import Lengths, read_lengths
from clients.bench.prompts import Prompt, read_prompts, synthetic, token_counter
from export.errors import ConfigError


def test_lengths_are_read_and_drawn():
    source = random.Random(0)
    assert {read_lengths("64", "x").draw(source) for _ in range(50)} == {64}
    assert {read_lengths("3-5", "x").draw(source) for _ in range(200)} == {3, 4, 5}
    assert {read_lengths("lognormal:100,0,180", "x").draw(source) for _ in range(50)} == {100}
    drawn = [read_lengths("lognormal:100,0.5,180", "x").draw(source) for _ in range(5000)]
    assert median(drawn) == pytest.approx(100, rel=0.05)
    assert max(drawn) == 180
    # The logarithm is normal: 15.9 % lie below the median divided by e^0.5.
    assert sum(value < 100 / 2.71828**0.5 for value in drawn) / 5000 == pytest.approx(0.159, abs=0.02)
    assert [str(read_lengths(text, "x")) for text in ("64", "3-5", "lognormal:100,0.5,180")] == [
        "64", "3-5", "lognormal:100,0.5,180",
    ]  # fmt: skip


@pytest.mark.parametrize(
    "text", ["", "0", "5-3", "-4", "1.5", "lognormal:0,1,5", "lognormal:9,1,5", "lognormal:9,0,5", "1e3", "9" * 20]
)
def test_lengths_that_are_none_are_refused(text):
    with pytest.raises(ConfigError, match="reading --max-tokens: found '.*', expected tokens such as 64"):
        read_lengths(text, "--max-tokens")


def test_a_request_depends_on_the_seed_and_its_number_alone():
    fields = {"max_tokens": Lengths(low=1, high=99), "prompt_tokens": Lengths(low=1, high=9), "early_share": 0.5}
    first, second = works(seed=1, **fields), works(seed=1, **fields)
    first.prepare(0, 10)
    made = [first.work(index) for index in range(20)]
    assert made == [second.work(index) for index in reversed(range(20))][::-1]
    assert made != [works(seed=2, **fields).work(index) for index in range(20)]
    assert len({work.prompt for work in made}) > 15
    assert len({work.seed for work in made}) == 20


def test_the_share_of_early_ends():
    made = [works(early_share=0.25).work(index) for index in range(2000)]
    early = [work for work in made if work.early_after is not None]
    assert len(early) / 2000 == pytest.approx(0.25, abs=0.03)
    assert {work.early_after for work in early} == {1, 2, 3}
    with pytest.raises(ConfigError, match="the share of early ends is 1.5, expected 0 to 1"):
        works(early_share=1.5)


def test_synthetic_prompts_have_the_number_of_tokens(tiny_checkpoint):
    counter = token_counter(tiny_checkpoint)
    assert counter(synthetic(random.Random(1), 1, counter)) == 1
    for wanted in (7, 64, 300):
        for seed in range(5):
            text = synthetic(random.Random(seed), wanted, counter)
            assert wanted - 3 <= counter(text) <= wanted
    assert len(synthetic(random.Random(0), 12, None).split()) == 12


def test_prompts_of_a_file(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "eins", "max_tokens": 7}\n\n{"prompt": "zwei \\u00e4", "id": 3}\n')
    assert read_prompts(path) == [Prompt(text="eins", max_tokens=7), Prompt(text="zwei ä")]
    made = [works(prompts=read_prompts(path)).work(index) for index in range(40)]
    assert {(work.prompt, work.max_tokens) for work in made} == {("eins", 7), ("zwei ä", 4)}


def test_a_line_of_a_file_ends_with_a_newline_alone(tmp_path):
    path, texts = tmp_path / "prompts.jsonl", ["a\u2028b", "c\x85d"]  # at which Python's splitlines() cuts
    path.write_bytes("\r\n".join(json.dumps({"prompt": text}, ensure_ascii=False) for text in texts).encode())
    assert [prompt.text for prompt in read_prompts(path)] == texts


def test_lengths_of_a_very_wide_distribution_stay_within_it():
    lengths, source = read_lengths("lognormal:5,999999,9", "x"), random.Random(0)
    assert {lengths.draw(source) for _ in range(100)} == {1, 9}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "found no prompt"),
        ("\n", "found no prompt"),
        ('{"prompt": "a"}\n{"prompt": ', "line 2: .*expected one JSON object a line"),
        ('{"prompt": ""}', "line 1: expected"),
        ("[" * 100_000, "line 1: it is nested too deeply"),
        ('{"prompt": "\\ud800"}', "line 1: .*half of a surrogate pair"),
        ('["a"]', "line 1: expected"),
        ('{"prompt": 1}', "line 1: expected"),
        ('{"prompt": "a", "max_tokens": 0}', "line 1: expected"),
        ('{"prompt": "a", "max_tokens": true}', "line 1: expected"),
    ],
)
def test_a_file_without_prompts_is_refused(tmp_path, text, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(ConfigError, match=f"reading {path}.*{message}"):
        read_prompts(path)


def test_a_tokenizer_that_is_none_is_refused(tmp_path):
    path = tmp_path / "tokenizer.json"
    path.write_text("{}")
    with pytest.raises(ConfigError, match="expected a tokenizer.json"):
        token_counter(tmp_path)
