"""Answers to prompts: where they end, and what a task's generation_kwargs may ask for."""

from __future__ import annotations

import numpy as np
import pytest

from triton_repo.errors import RequestError
from triton_repo.evaluation.errors import EvaluationError
from triton_repo.evaluation.generating import Prompt, generate, read_settings


def prompt(example, text, most_tokens=24, **fields):
    return Prompt(token_ids=tuple(example.tokenizer.encode_prompt(text)), most_tokens=most_tokens, **fields)


def test_answers_are_the_references_greedy_tokens(example):
    prompts = [prompt(example, text, most) for text, most in (("import os\n", 12), ("def main(", 6), ("class", 9))]
    expected = [example.tokenizer.decode(example.greedy(each.token_ids, each.most_tokens)) for each in prompts]
    assert generate(example.session, example.tokenizer, prompts, slots=2) == expected


def test_an_answer_ends_before_the_first_of_its_stop_texts(phixtral):
    [whole] = generate(phixtral.session, phixtral.tokenizer, [prompt(phixtral, "def main(")], slots=1)
    first, second = whole[4:7], whole[9:11]
    assert whole.index(first) < whole.index(second)
    prompts = [prompt(phixtral, "def main(", until=words) for words in ((second,), (first, second), (second, first))]
    found = generate(phixtral.session, phixtral.tokenizer, prompts, slots=3)
    assert found == [whole.partition(second)[0], whole.partition(first)[0], whole.partition(first)[0]]


def test_an_answer_ends_at_an_end_token(phixtral):
    [whole] = generate(phixtral.session, phixtral.tokenizer, [prompt(phixtral, "def main(")], slots=1)
    token_ids = phixtral.greedy(phixtral.tokenizer.encode_prompt("def main("), 5)

    class Ends:
        """A session whose logits give the end token after the fifth."""

        def __init__(self):
            self.steps = 0

        def __getattr__(self, name):
            return getattr(phixtral.session, name)

        def step(self, *arguments):
            logits = phixtral.session.step(*arguments)
            self.steps += 1
            if self.steps == 6:
                logits[-1, phixtral.session.engine.manifest.eos_token_ids[0]] = 1e6
            return logits

    found = generate(Ends(), phixtral.tokenizer, [prompt(phixtral, "def main(")], slots=1)
    assert found == [phixtral.tokenizer.decode(token_ids)]
    assert whole.startswith(found[0])


def test_more_prompts_than_slots_keep_their_order(phixtral):
    texts = ["import os\n", "def main(", "class A", "for x in", "a = 1\n", "return", "if x:\n"]
    prompts = [prompt(phixtral, text, most_tokens=3 + number) for number, text in enumerate(texts)]
    counts = []
    found = generate(phixtral.session, phixtral.tokenizer, prompts, 2, counts.append)
    assert found == [generate(phixtral.session, phixtral.tokenizer, [one], slots=1)[0] for one in prompts]
    assert counts[-1] == len(prompts)
    assert generate(phixtral.session, phixtral.tokenizer, [], slots=2) == []


def test_logits_that_are_not_finite_are_refused(phixtral):
    class Broken:
        def __getattr__(self, name):
            return getattr(phixtral.session, name)

        def step(self, *arguments):
            return np.full_like(phixtral.session.step(*arguments), np.nan)

    with pytest.raises(RequestError, match="NaN or infinity"):
        generate(Broken(), phixtral.tokenizer, [prompt(phixtral, "x")], slots=1)


@pytest.mark.parametrize(
    ("kwargs", "most_tokens", "until"),
    [
        ({}, 256, ()),
        ({"until": "\n"}, 256, ("\n",)),
        ({"until": ["a", "", "b"], "max_gen_toks": 7}, 7, ("a", "b")),
        ({"until": None, "max_new_tokens": 9}, 9, ()),
        ({"max_tokens": 5, "max_gen_toks": 6}, 6, ()),
    ],
)
def test_limits_and_stop_texts_are_read(kwargs, most_tokens, until):
    found = read_settings(kwargs, 256)
    assert (found.most_tokens, found.until, found.options.sampling_temperature) == (most_tokens, until, 0.0)


@pytest.mark.parametrize(
    ("kwargs", "temperature"),
    [
        ({"do_sample": False, "temperature": 0.7}, 0.0),
        ({"temperature": 0}, 0.0),
        ({"temperature": 0.7}, 0.7),
        ({"do_sample": True}, 1.0),
        ({"do_sample": True, "temperature": 0.6, "top_p": 0.9}, 0.6),
        ({"do_sample": True, "top_k": 1}, 0.0),
        ({"do_sample": True, "temperature": 0.0}, 0.0),
    ],
)
def test_a_temperature_is_honoured_where_tokens_are_drawn(kwargs, temperature):
    assert read_settings(kwargs, 256).options.sampling_temperature == temperature


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"num_beams": 4}, "found 'num_beams', expected do_sample, until"),
        ({"max_gen_tokens": 4}, "did you mean max_gen_toks"),
        ({"until": 3}, "until is 3, expected a text"),
        ({"until": ["a", 3]}, "expected a text or a list of texts"),
        ({"max_gen_toks": 0}, "max_gen_toks is 0, expected a number of tokens"),
        ({"max_gen_toks": "many"}, "max_gen_toks is 'many'"),
        ({"do_sample": True, "temperature": -1}, "temperature: found -1, expected 0, or 0.001 to 1000"),
        ({"temperature": "hot"}, "temperature: found 'hot', expected a number"),
        ({"do_sample": "yes"}, "do_sample is 'yes', expected true or false"),
    ],
)
def test_what_is_not_honoured_is_refused(kwargs, message):
    with pytest.raises(EvaluationError, match=f"generation_kwargs of a task.*{message}"):
        read_settings(kwargs, 256)
