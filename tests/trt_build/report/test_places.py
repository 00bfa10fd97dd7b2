"""Where engines and reference differ: the worst positions, in their context, apart from each other."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from conftest import EXAMPLES

from export.checkpoint.folder import open_checkpoint
from export.families import read_model
from export.reference.model import Reference
from export.tokenizer.loading import load_tokenizer
from trt_build.comparison.parity import Positions
from trt_build.report.contents import Choice
from trt_build.report.places import APART, MOST_PLACES, differing_places, greedy_texts, token_behind

CHECKPOINT = EXAMPLES / "tiny-phixtral" / "experts" / "code"


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(CHECKPOINT)


def positions(windows, kl, choices=7, probabilities=0.5):
    shape = (2, len(kl))
    return Positions(
        windows=windows, kl=np.asarray(kl, dtype=float), choices=np.full(shape, choices),
        probabilities=np.full(shape, probabilities),
    )  # fmt: skip


def test_the_worst_places_come_first_in_their_context(tokenizer):
    ids = tokenizer.encode("def read(path):\n    return open(path)\n" * 4)
    windows = (tuple(ids[:30]), tuple(ids[30:]))
    kl = np.zeros(len(ids))
    kl[[5, 40, 41, 29]] = [0.25, 1.0, 0.9, 0.5]  # 41 is beside 40; 29 is the last of its window
    one = positions(windows, kl)
    one.choices[:, 40] = [ids[3], ids[4]]
    one.probabilities[:, 40] = [0.75, 0.5]
    other = dataclasses.replace(one, kl=np.zeros(len(ids)))
    found = differing_places([one, None, other], tokenizer)
    assert [place.number for place in found] == [40, 5]  # 29 is within APART of 40
    assert APART > 11
    first = found[0]
    assert first.before == tokenizer.decode(ids[30:41])
    assert first.following == tokenizer.decode([ids[41]])
    assert first.engines == (
        Choice(text=tokenizer.decode([ids[3]]), probability=0.75),
        None,
        Choice(text=tokenizer.decode([ids[3]]), probability=0.75),
    )
    assert first.reference == Choice(text=tokenizer.decode([ids[4]]), probability=0.5)
    assert first.kl == (1.0, None, 0.0)


def test_an_engine_with_other_windows_and_engines_that_are_equal_have_no_places(tokenizer):
    ids = tuple(range(10, 50))
    one = positions((ids,), np.ones(40))
    other = positions((ids[:20], ids[20:]), np.full(40, 9.0))
    assert {place.kl for place in differing_places([one, other], tokenizer)} == {(1.0, None)}
    assert differing_places([positions((ids,), np.zeros(40))], tokenizer) == ()
    assert differing_places([None], tokenizer) == ()
    broken = positions((ids,), [np.nan, *np.zeros(39)])
    assert [place.number for place in differing_places([broken], tokenizer)] == [0]
    many = positions((tuple([20] * 2000),), np.arange(2000.0))
    assert len(differing_places([many], tokenizer)) == MOST_PLACES


def test_a_token_is_read_behind_what_comes_before(tokenizer):
    ids = tokenizer.encode("for name in names: é")
    assert "".join(token_behind(tokenizer, ids[:place], ids[place]) for place in range(1, len(ids) - 2)) in (
        "for name in names: é"
    )
    special = tokenizer.eos_token_id if hasattr(tokenizer, "eos_token_id") else 0
    assert token_behind(tokenizer, ids, special) != ""


def test_the_reference_says_where_it_would_write_otherwise(tokenizer):
    model = read_model(open_checkpoint(CHECKPOINT))
    reference = Reference(model)
    prompt = tokenizer.encode("import os\n\ndef ")
    own = list(prompt)
    for _ in range(6):
        [(logits, _)] = reference.run([own])
        own.append(int(logits[-1].argmax()))
    same = own[len(prompt) :]
    wrong = [*same[:2], (same[2] + 1) % 2000 + 1, *same[3:]]
    [text] = greedy_texts([prompt], [[same], None, [wrong], [[]]], reference, tokenizer)
    assert text.prompt == "import os\n\ndef "
    first, absent, third, empty = text.engines
    assert absent is None
    assert empty == ()
    assert [token.instead for token in first] == [None] * 6
    assert "".join(token.text for token in first) == tokenizer.decode(own)[len(text.prompt) :]
    assert [token.instead is None for token in third][:3] == [True, True, False]
    assert third[2].instead == first[2].text
