"""Serves an engine with Triton, compares its greedy texts with the reference's, and measures streams under load.

The way an engine is served is a function (`Serving`) that takes an engine directory and a folder and gives an Endpoint.
`served_by_triton` packages the engine as `moeship package` does and starts the servers of `moeship serve`, one for each
rank.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import shutil
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from serving_load import Load, different_prompts, measure_level, summarise

from clients.errors import ClientError
from clients.generation import AsyncClient, Client, Generation, GenerationRequest, collect
from export.errors import ConfigError, MoeshipError
from export.tokenizer.loading import load_tokenizer
from triton_repo.packaging.package import PackageOptions, package_engine
from triton_repo.serving.server import ServerOptions, running_server
from trt_build.comparison.evaluation_text import own_text

MODEL = "ensemble"  # the model name that NVIDIA's clients use
READY_TIMEOUT_S = 1800
HTTP_TIMEOUT_S = 30


class ServingFailed(MoeshipError):  # noqa: N818 - it is a state of the run
    """A level of the load gave no figures."""

    exit_status = 1


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """A server that is ready: host:port of gRPC, http://host:port, the model's name, the number of ranks."""

    grpc_url: str
    http_url: str
    model: str
    world_size: int


# Arguments: an engine directory, the repository to make, and a file for the server's log.
Serving = Callable[[Path, Path, Path], AbstractContextManager[Endpoint]]


@contextlib.contextmanager
def served_by_triton(engine: Path, repository: Path, log: Path) -> Iterator[Endpoint]:
    """Package an engine and serve it with Triton. Raises the errors of packaging and serving."""
    package_engine(PackageOptions(engine=engine, name=MODEL, output=repository))
    options = ServerOptions(repository=repository, ready_timeout_s=READY_TIMEOUT_S, log=log)
    with running_server(options) as server:
        yield Endpoint(
            grpc_url=server.grpc_url, http_url=server.http_url, model=MODEL, world_size=server.world_size
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The requests to an engine's server. `answers` are the reference's. If `judged` is set, the engine's answers must
    be equal, except where the reference chose a token by less than `rounding` of a logit."""

    engine: Path
    repository: Path
    log: Path
    answers: Sequence[dict[str, Any]]
    text_tokens: int
    judged: bool
    rounding: float
    load: Load


def try_serving(trial: Trial, serving: Serving, keep: Callable[[], None], found: dict[str, Any]) -> None:
    """Serve an engine, compare its texts, and measure every level. Each result is saved at once.

    Raises the errors of serving, ClientError if a prompt gives no text, and at the end ServingFailed if levels failed.
    """
    check_lengths(trial.engine, trial.load)
    prompts = different_prompts(
        load_tokenizer(trial.engine), own_text().content, trial.load.num_prompts, trial.load.prompt_tokens
    )
    shutil.rmtree(trial.repository, ignore_errors=True)
    trial.repository.parent.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    with serving(trial.engine, trial.repository, trial.log) as endpoint:
        found["ready_s"] = round(time.monotonic() - started, 3)
        found.update(triton=triton_version(endpoint), world_size=endpoint.world_size, log=str(trial.log))
        keep()
        with Client(endpoint.grpc_url) as client:
            found["texts"] = [compare_texts(client, endpoint.model, answer, trial) for answer in trial.answers]
        found["failures"] = [text["failure"] for text in found["texts"] if text["failure"]]
        keep()
        found["levels"] = []
        asyncio.run(_measure(endpoint, trial.load, prompts, found["levels"], keep))
    failed = [f"{level['concurrency']} streams: {level['error']}" for level in found["levels"] if "error" in level]
    if failed:
        raise ServingFailed(f"measuring {trial.engine}: {'; '.join(failed)}; the server's log is {trial.log}")


def check_lengths(engine: Path, load: Load) -> None:
    """Raise ConfigError if prompt and answer exceed the engine's context. A tenth is added for safety, since a text
    that was cut within a word may be encoded into a few more tokens."""
    context = json.loads((engine / "engine.json").read_text(encoding="utf-8"))["max_sequence"]
    asked = load.prompt_tokens + load.output_tokens
    if 1.1 * asked > context:
        raise ConfigError(
            f"measuring {engine}: {asked} tokens of a prompt and its answer, and a tenth more to be safe, exceed the "
            f"context of {context}; ask for fewer with --prompt-tokens or --output-tokens"
        )


def triton_version(endpoint: Endpoint) -> str:
    """The version that the server reports. Raises OSError."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # no proxy, as the server is on this machine
    with opener.open(f"{endpoint.http_url}/v2", timeout=HTTP_TIMEOUT_S) as answer:
        return str(json.load(answer)["version"])


def compare_texts(client: Client, model: str, answer: dict[str, Any], trial: Trial) -> dict[str, Any]:
    """Compare a prompt's greedy text, streamed and as a whole, with the reference's; `failure` describes a difference
    that is not allowed."""
    request = GenerationRequest(
        model=model, prompt=answer["prompt"], max_tokens=trial.text_tokens, top_k=1, exclude_input_in_output=True
    )
    streamed, whole = collect(client.stream(request)), client.generate(request)
    place = first_difference(streamed, answer)
    margin = None if place is None else answer["margins"][place]
    failure = ""
    if place is None and streamed.text != answer["text"]:
        failure = f"after {answer['prompt']!r} the tokens are the reference's and the text is not"
    elif margin is not None and trial.judged and not margin <= trial.rounding:
        failure = (
            f"after {answer['prompt']!r} the text is not the reference's from token {place} on, which it chose by "
            f"{margin:.3g}; rounding explains {trial.rounding:.3g}"
        )
    return {
        "prompt": answer["prompt"],
        "text": streamed.text,
        "reference_text": answer["text"],
        "equals_reference": place is None and not failure,
        "first_different_token": place,
        "reference_margin": margin,
        "streamed_equals_whole": (streamed.text, streamed.token_ids) == (whole.text, whole.token_ids),
        "token_ids": list(streamed.token_ids),
        "failure": failure,
    }


def first_difference(found: Generation, answer: dict[str, Any]) -> int | None:
    """The index of the first token that differs from the reference's; None if all are equal. A missing end token at the
    end is no difference, as engines may leave it out."""
    expected, length = answer["token_ids"], len(found.token_ids)
    for place, (one, other) in enumerate(zip(found.token_ids, expected, strict=False)):
        if one != other:
            return place
    both_ended = found.finish_reason == answer["finish_reason"] == "stop"
    if length == len(expected) or (both_ended and length == len(expected) - 1):
        return None
    return min(length, len(expected) - 1)


async def _measure(
    endpoint: Endpoint, load: Load, prompts: Sequence[str], levels: list[dict[str, Any]], keep: Callable[[], None]
) -> None:
    """Measure every level into `levels`, one after another; one that fails says why."""
    waiting = iter(prompts)
    async with AsyncClient(endpoint.grpc_url) as client:
        for concurrency in load.concurrency:
            # The first round of a level is the warm-up.
            turns = [list(itertools.islice(waiting, load.requests(concurrency))) for _ in range(load.rounds + 1)]
            try:
                rounds = [
                    await measure_level(client, endpoint.model, turn, concurrency, load.output_tokens) for turn in turns
                ]
                levels.append(summarise(concurrency, rounds[1:]))
            except ClientError as error:
                levels.append({"concurrency": concurrency, "error": str(error)})
            keep()
