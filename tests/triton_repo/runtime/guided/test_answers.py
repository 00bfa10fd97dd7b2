"""Guided answers from both layouts: they fit whatever the logits are, and end with the reason `stop`."""

from __future__ import annotations

import json
import re

import jsonschema
import numpy as np
import pytest
from random_logits import RandomSession
from served import Sent, answers

from triton_repo.contracts.model_parameters import ModelParameters
from triton_repo.errors import RequestError
from triton_repo.runtime.batching import engine
from triton_repo.runtime.batching.loading import start
from triton_repo.runtime.single.service import Request, Service

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "é", 5, None]}, "maxItems": 3},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


def request(guide_type: str, guide: str = "", **values) -> dict:
    given = {"text_input": b"def ", "max_tokens": 900, "guided_decoding_guide_type": guide_type.encode(), **values}
    if guide:
        given["guided_decoding_guide"] = guide.encode()
    return {
        name: np.array([[value]], dtype=object if isinstance(value, bytes) else None) for name, value in given.items()
    }


WORDS = re.compile("(語|😀|no)(, (語|😀|no)){2}")
SAMPLED = {"temperature": np.float32(1), "top_p": np.float32(1)}


@pytest.mark.parametrize("options", [{}, SAMPLED, {"temperature": np.float32(1), "top_k": 5}], ids=str)
def test_an_answer_by_a_schema_is_valid_and_ends_by_itself(byte_level, options):
    for seed in range(8):
        [piece] = answers(
            RandomSession(byte_level, seed=seed), byte_level, request("json_schema", json.dumps(PERSON), **options)
        )
        jsonschema.validate(json.loads(piece.text), PERSON)
        assert piece.finish_reason == "stop"


@pytest.mark.parametrize(
    ("guide_type", "guide", "matches"),
    [
        ("regex", "^[a-c]{2,5}@(x|é)$", re.compile("[a-c]{2,5}@(x|é)")),
        ("ebnf_grammar", 'root ::= "<" ([a-z]{1,3} | root) ">"', re.compile("<+[a-z]{1,3}>+")),
        ("ebnf_grammar", 'root ::= word (", " word){2}\nword ::= "語" | "😀" | "no"', WORDS),
    ],
)  # fmt: skip
def test_an_answer_by_a_regular_expression_or_a_grammar_matches_it(
    byte_level, byte_fallback, guide_type, guide, matches
):
    for tokenizer in (byte_level, byte_fallback):
        for seed in range(4):
            [piece] = answers(RandomSession(tokenizer, seed=seed), tokenizer, request(guide_type, guide, **SAMPLED))
            assert matches.fullmatch(piece.text), piece.text
            assert piece.finish_reason == "stop"


def test_a_stop_word_ends_an_answer_in_the_middle_and_a_limit_leaves_a_beginning(byte_level):
    asked = request("regex", "[ab]{40}x[0-9]{9}", stop_words=b"x")
    [piece] = answers(RandomSession(byte_level), byte_level, asked)
    assert re.fullmatch("[ab]{40}", piece.text)
    assert piece.finish_reason == "stop"
    asked["max_tokens"] = np.array([[5]])
    [piece] = answers(RandomSession(byte_level), byte_level, asked)
    assert re.fullmatch("[ab]{5,}", piece.text)
    assert (piece.finish_reason, piece.num_output_tokens) == ("length", 5)


def test_bad_words_are_kept_out_of_what_is_allowed_and_fail_where_they_leave_nothing(byte_level):
    bad = request("regex", "(ab|ba|cc){6}", bad_words=b"bb", **SAMPLED)
    for seed in range(6):
        [piece] = answers(RandomSession(byte_level, seed=seed), byte_level, bad)
        assert re.fullmatch("(ab|ba|cc){6}", piece.text)
        assert "bb" not in piece.text
    with pytest.raises(RequestError, match="bad_words and min_length and the guide together leave none"):
        answers(RandomSession(byte_level), byte_level, request("regex", "abc", bad_words=b"b"))


def test_each_of_several_answers_keeps_to_the_guide_and_a_stream_gives_the_same(byte_level):
    asked = request("json_schema", json.dumps(PERSON), num_return_sequences=3, seed=np.uint64(3), **SAMPLED)
    whole = {piece.sequence_index: piece.text for piece in answers(RandomSession(byte_level), byte_level, asked)}
    for text in whole.values():
        jsonschema.validate(json.loads(text), PERSON)
    assert len(set(whole.values())) == 3
    pieces = answers(RandomSession(byte_level), byte_level, asked | {"stream": np.array([[True]])})
    for index, text in whole.items():
        assert "".join(piece.text for piece in pieces if piece.sequence_index == index) == text


def test_an_end_token_of_the_request_ends_a_guided_answer_and_is_no_part_of_it(byte_level):
    end = byte_level.encode("q")[0]
    likely = np.zeros(byte_level.size, np.float32)
    likely[end] = 50
    session = RandomSession(byte_level, bias=likely)
    [piece] = answers(session, byte_level, request("regex", "[a-z]{3}[a-z]*", end_id=np.int32(end)))
    assert re.fullmatch("[a-pr-z]{3,}", piece.text)
    assert (piece.token_ids[-1], piece.finish_reason) == (end, "stop")
    [piece] = answers(session, byte_level, request("regex", "[a-z]{3}", end_id=np.int32(-1)))
    assert re.fullmatch("[a-z]{3}", piece.text)
    assert piece.finish_reason == "stop"


class Oracle:
    """Drafts what an answer goes on with, and at every fifth place something else."""

    def __init__(self, tokens):
        self.tokens, self.drafted = tokens, 0

    def drafts(self, sequences, room, most_s):
        return self.drafts_beside_prompts(sequences, room)

    def drafts_beside_prompts(self, sequences, room):
        found = {}
        for sequence in sequences:
            done = len(sequence.tokens) - len(sequence.request.prompt_ids)
            tokens = [token if place % 5 else 7 for place, token in enumerate(self.tokens[done : done + 4], done)]
            tokens = tokens[: sequence.request.num_positions - len(sequence.tokens)]
            tokens = tokens[: sequence.writer.sampler.guide.num_taken(tokens)]
            found |= {sequence: tuple(tokens)} if tokens else {}
            self.drafted += len(tokens)
        return found

    def learn(self, rows, drafted, seconds):
        pass


@pytest.mark.parametrize("options", [{}, SAMPLED], ids=["greedy", "sampled"])
def test_drafts_change_no_answer(byte_level, monkeypatch, options):
    for seed in range(4):
        asked = request("json_schema", json.dumps(PERSON), seed=np.uint64(5), **options)
        [plain] = answers(RandomSession(byte_level, seed=seed), byte_level, asked)
        oracle = Oracle(plain.token_ids)
        monkeypatch.setattr(engine, "Drafter", lambda oracle=oracle: oracle)
        [drafted] = answers(RandomSession(byte_level, seed=seed), byte_level, asked)
        assert drafted == plain
        assert oracle.drafted > len(plain.token_ids) / 2
        monkeypatch.undo()


def test_a_request_with_a_bad_guide_is_refused_and_others_are_answered(byte_level):
    service = Service(start(RandomSession(byte_level), ModelParameters(slots=2)), byte_level)
    try:
        sent = [
            Sent(Request, request_id=str(number), tensors=request("json_schema", text))
            for number, text in enumerate(['{"typ": "object"}', json.dumps(PERSON), '{"not": {}}', "{"])
        ]
        for one in sent:
            service.submit(one.request)
        jsonschema.validate(json.loads(sent[1].all()[0].text), PERSON)
        for one in (sent[0], sent[2], sent[3]):
            with pytest.raises(RequestError, match="guided_decoding_guide: found "):
                one.all()
    finally:
        service.runner.close()
