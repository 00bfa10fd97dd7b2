"""Random schemas: every answer is valid, by the package jsonschema, whatever the logits are."""

from __future__ import annotations

import json
import random

import jsonschema
import pytest
from random_logits import RandomSession
from wire_tensors import wire

from schemas.random_schemas import random_schema
from triton_repo.runtime.batching.alone import answered
from triton_repo.runtime.guided.guides import Guides
from triton_repo.runtime.options import plan_generation
from triton_repo.runtime.request_reading import read_options
from triton_repo.runtime.single.generation import text_request

SAMPLED = {"temperature": 1.0, "top_p": 0.9}


def answer(session, tokenizer, guides, schema, **options):
    """The piece of one answer that is kept to a schema."""
    values = {"text_input": "def ", "max_tokens": 4000, "guided_decoding_guide_type": "json_schema"}
    asked = read_options(wire(**values, guided_decoding_guide=json.dumps(schema, ensure_ascii=False), **options))
    ends = session.engine.manifest.eos_token_ids
    plan = plan_generation(asked, tokenizer, max_sequence=session.max_sequence, end_token_ids=ends)
    [(piece, _)] = answered(session, lambda outlet: text_request(plan, tokenizer, outlet, joined=True, guides=guides))
    return piece


@pytest.mark.parametrize("first", range(0, 200, 50))
def test_every_answer_of_a_model_with_random_logits_is_valid(byte_level, byte_fallback, first):
    tokenizer = byte_level if first < 100 else byte_fallback
    guides = Guides(tokenizer)
    for number in range(first, first + 50):
        schema = random_schema(random.Random(number)).json
        options = {**SAMPLED, "seed": number} if number % 2 else {}
        piece = answer(RandomSession(tokenizer, seed=number, max_sequence=8192), tokenizer, guides, schema, **options)
        assert piece.finish_reason == "stop", number
        jsonschema.validate(json.loads(piece.text), schema, format_checker=jsonschema.FormatChecker())


@pytest.mark.parametrize("number", range(200))
def test_random_schemas_and_their_values_are_sound(number):
    schema = random_schema(random.Random(number))
    jsonschema.Draft202012Validator.check_schema(schema.json)
    jsonschema.validate(schema.value(random.Random(number)), schema.json, format_checker=jsonschema.FormatChecker())
