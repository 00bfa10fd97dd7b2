"""Damaged bodies for a gateway. Each answer must have the right status, OpenAI's form, and nothing of other requests.

    assert faults(url, "phixtral", seed=1, count=300) == []

Each body has a marker of its own in its prompt. The server behind the gateway answers with the prompt, so that an
answer with another request's marker shows a leak. After each damaged body a good one must be answered with its own.
"""

from __future__ import annotations

import http.client
import json
import random
import re
from collections.abc import Iterator
from contextlib import closing
from typing import Any

from fuzzing import mutated_json

STATUSES = {200, 400, 404, 413}  # 404: another model's name
MARKER = re.compile(r"@\d+@")
CHAT, COMPLETION = "/v1/chat/completions", "/v1/completions"


def good_bodies(model: str, marker: str) -> list[tuple[str, dict[str, Any]]]:
    """Bodies with every field that is taken, by path."""
    shared = {
        "model": model, "temperature": 0.5, "top_p": 0.9, "n": 1, "stop": ["\n\n"], "seed": 7, "presence_penalty": 0.1,
        "frequency_penalty": -0.1, "logit_bias": {"5": 1.5}, "top_k": 4, "min_p": 0.1, "user": "u", "max_tokens": 4,
    }  # fmt: skip
    message = [{"role": "system", "content": "s"}, {"role": "user", "content": [{"type": "text", "text": marker}]}]
    return [
        (CHAT, {**shared, "messages": message, "logprobs": True, "top_logprobs": 2}),
        (CHAT, {"model": model, "messages": message, "stream": True, "stream_options": {"include_usage": True}}),
        (COMPLETION, {**shared, "prompt": [marker], "echo": True, "logprobs": 1, "best_of": 1}),
        (COMPLETION, {"model": model, "prompt": marker, "stream": True, "return_token_ids": True}),
        ("/v1/responses", {"model": model, "input": message, "instructions": "s", "max_output_tokens": 4,
                           "text": {"format": {"type": "text"}}, "tools": []}),
        ("/v1/responses", {"model": model, "input": marker, "stream": True, "temperature": 0}),
        ("/tokenize", {"model": model, "prompt": marker, "return_token_strs": True}),
        ("/detokenize", {"model": model, "tokens": [5, 6]}),
    ]  # fmt: skip


def faults(url: str, model: str, *, seed: int, count: int) -> list[str]:
    """What the gateway at `url` (http://HOST:PORT) did wrong with `count` damaged bodies."""
    return list(_faults(url, model, random.Random(f"gateway {seed}"), count))


def _faults(url: str, model: str, rng: random.Random, count: int) -> Iterator[str]:
    with closing(http.client.HTTPConnection(url.removeprefix("http://"), timeout=30)) as connection:
        for number in range(count):
            yield from _faults_of(connection, model, rng, number)


def _faults_of(connection: http.client.HTTPConnection, model: str, rng: random.Random, number: int) -> Iterator[str]:
    marker = f"@{number}@"
    path, body = rng.choice(good_bodies(model, marker))
    data = json.dumps(body).encode()
    for _ in range(rng.choice((1, 1, 2, 4))):
        data = mutated_json(rng, data)
    status, answer = _post(connection, path, data)
    problem = _problem(status, answer, data)
    if problem:
        yield f"{path} {data[:300]!r}: {problem}: {answer[:300]!r}"
    whole = {"model": model, "prompt": f"@{number}@!", "max_tokens": 4}
    status, answer = _post(connection, COMPLETION, json.dumps(whole).encode())
    if status != 200 or MARKER.findall(answer) != [marker]:
        yield f"the good request after {data[:300]!r}: {status} {answer[:300]!r}"


def _post(connection: http.client.HTTPConnection, path: str, data: bytes) -> tuple[int, str]:
    connection.request("POST", path, data, {"Content-Type": "application/json"})
    response = connection.getresponse()
    return response.status, response.read().decode()


def _problem(status: int, answer: str, data: bytes) -> str | None:
    if status not in STATUSES:
        return f"status {status}"
    own = set(MARKER.findall(data.decode(errors="replace")))  # damage may have changed the marker
    if set(MARKER.findall(answer)) - own:
        return "another request's prompt"
    if status == 200:
        return None
    try:
        error = json.loads(answer)["error"]
    except (ValueError, KeyError, TypeError):
        return "no error object"
    if set(error) != {"message", "type", "param", "code"} or not isinstance(error["message"], str):
        return "another error object than OpenAI's"
    if len(answer) > 8000 or any(ord(letter) < 32 and letter not in "\n\t" for letter in error["message"]):
        return "a message that is too long, or that a terminal obeys"
    return None
