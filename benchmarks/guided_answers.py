"""Answers of an engine on ONNX Runtime that are kept to random JSON schemas: whether they are valid, and what it costs.

    python benchmarks/guided_answers.py ENGINE --schemas 200

Each schema of schemas/random_schemas.py is answered greedily and sampled, by the code that serves, and the answer is
judged by the package jsonschema. Then as many tokens are generated without a guide. Times are those of steps one after
the other, each with one sequence.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import jsonschema

from export.tokenizer.loading import load_tokenizer
from schemas.random_schemas import random_schema
from triton_repo.runtime.batching.alone import answered
from triton_repo.runtime.guided.guides import Guides
from triton_repo.runtime.options import GenerationOptions, plan_generation
from triton_repo.runtime.single.generation import text_request
from trt_build.ort.engine import open_engine
from trt_build.ort.session import Session

PROMPT = "def main() -> dict:\n    return "
SAMPLED = {"temperature": 1.0, "top_p": 0.95}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("engine", type=Path)
    parser.add_argument("--schemas", type=int, default=200, metavar="N")
    options = parser.parse_args()
    session, tokenizer = Session(open_engine(options.engine), 1), load_tokenizer(options.engine)
    guides = Guides(tokenizer)
    end_ids = session.engine.manifest.eos_token_ids
    longest = session.max_sequence - len(tokenizer.encode_prompt(PROMPT))

    def ask(**fields: Any) -> tuple[Any, float]:  # noqa: ANN401 - options of a request
        given = {"prompt": PROMPT, "max_tokens": longest, "random_seed": 1, **fields}
        plan = plan_generation(
            GenerationOptions(**given), tokenizer, max_sequence=session.max_sequence, end_token_ids=end_ids
        )
        begun = time.perf_counter()
        found = answered(session, lambda outlet: text_request(plan, tokenizer, outlet, joined=True, guides=guides))
        [(piece, _)] = list(found)
        return piece, time.perf_counter() - begun

    for name, fields in (("greedy", {}), ("sampled", SAMPLED)):
        valid, cut, wrong, tokens, seconds, free_tokens, free_seconds = 0, 0, [], 0, 0.0, 0, 0.0
        for number in range(options.schemas):
            schema = random_schema(random.Random(number), bounded=True).json
            guide = {"guided_decoding_guide_type": "json_schema", "guided_decoding_guide": json.dumps(schema)}
            guides.compile("json_schema", guide["guided_decoding_guide"])
            piece, took = ask(**guide, **fields)
            tokens, seconds = tokens + piece.num_output_tokens, seconds + took
            if piece.finish_reason != "stop":
                cut += 1
                continue
            try:
                jsonschema.validate(json.loads(piece.text), schema, format_checker=jsonschema.FormatChecker())
                valid += 1
            except (ValueError, jsonschema.ValidationError) as error:
                wrong.append(f"{number}: {str(error).splitlines()[0]}")
            piece, took = ask(max_tokens=piece.num_output_tokens, end_id=-1, **fields)
            free_tokens, free_seconds = free_tokens + piece.num_output_tokens, free_seconds + took
        cost = [1e3 * seconds / tokens, 1e3 * free_seconds / max(1, free_tokens)]
        print(
            f"{name}: {valid} valid, {len(wrong)} invalid, {cut} cut at {longest} tokens; ms a token: "
            f"{cost[0]:.3f} with a guide, {cost[1]:.3f} without, {cost[0] - cost[1]:.3f} added; {tokens} tokens"
        )
        print(*wrong, sep="\n")


if __name__ == "__main__":
    main()
