"""The trained example, kept to random schemas: a model with preferences of its own, which often are not JSON."""

from __future__ import annotations

import json
import random

import jsonschema
import pytest

from export.tokenizer.loading import load_tokenizer
from schemas.random_schemas import random_schema
from triton_repo.runtime.guided.guides import Guides
from triton_repo.runtime.options import GenerationOptions
from triton_repo.runtime.single.generation import generate
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.session import Session

MANY = 24  # benchmarks/guided_answers.py asks for 200


@pytest.fixture(scope="module")
def session(tmp_path_factory, trained_phixtral) -> Session:
    folder = tmp_path_factory.mktemp("guided") / "engine"
    return Session(build_engine(BuildOptions(checkpoint=str(trained_phixtral), output=folder, precision="fp32")), 1)


@pytest.mark.parametrize("sampled", [{}, {"temperature": 1.0, "top_p": 0.95}], ids=["greedy", "sampled"])
def test_every_answer_is_valid(session, sampled):
    tokenizer = load_tokenizer(session.engine.folder)
    guides = Guides(tokenizer)
    for number in range(MANY):
        schema = random_schema(random.Random(number), bounded=True).json
        options = GenerationOptions(
            prompt="def main() -> dict:\n    return ", max_tokens=480, random_seed=number,
            guided_decoding_guide_type="json_schema", guided_decoding_guide=json.dumps(schema), **sampled,
        )  # fmt: skip
        pieces = list(generate(session, tokenizer, options, guides=guides))
        assert pieces[-1].finish_reason == "stop"
        text = "".join(piece.text for piece in pieces)
        jsonschema.validate(json.loads(text), schema, format_checker=jsonschema.FormatChecker())
