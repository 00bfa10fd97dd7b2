"""A contender that stays loaded: `python -m decode.turns TASK`. It answers an order `{"tokens": N}` with the seconds of
decoding N tokens, each of which follows what it has decoded so far."""

from __future__ import annotations

import json
import sys
import time

import numpy as np

from decode.contenders import load
from decode.orders import answers, orders, refusals
from decode.worker import task_from_json

PROMPT_TOKENS = 64


def main() -> None:
    with answers() as answer, refusals(answer):
        task = task_from_json(json.loads(sys.argv[1]))
        contender = load(task)
        draw = np.random.default_rng(0)

        def tokens(count: int) -> list[int]:
            # Random tokens, because greedy ones of random weights soon repeat. Then the experts repeat too, and stay in
            # the processor's cache.
            return [int(token) for token in draw.integers(0, task.model.vocab_size, count)]

        contender.run(tokens(PROMPT_TOKENS))
        answer({})
        for order in orders():
            following = tokens(order["tokens"])
            begun = time.perf_counter()
            for token in following:
                contender.run([token])
            answer({"seconds": time.perf_counter() - begun})


if __name__ == "__main__":
    main()
