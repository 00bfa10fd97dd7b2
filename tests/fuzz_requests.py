"""Damaged wire requests: the readers of them for `fuzz_readers.READERS`, which get them as Triton hands them to a
model, and what ci/fuzz_wire.py sends to a live server.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import tokenizers
from fuzzing import HOSTILE_VALUES, Reader, mutated_json
from tokenizers import decoders, models, pre_tokenizers

from export.tokenizer.loading import Tokenizer
from triton_repo.contracts.ensemble import ADDED_ENGINE_NAMES, ENGINE_NAMES, QUERY_NAMES
from triton_repo.contracts.model_parameters import TextParameters
from triton_repo.contracts.wire import COMPATIBILITY_INPUTS, INPUTS, TritonDtype, WireTensor
from triton_repo.runtime.answer import Answer, AnswerPlan
from triton_repo.runtime.batching.alone import answered
from triton_repo.runtime.request_reading import read_options
from triton_repo.runtime.single.generation import generate
from triton_repo.runtime.steps.preprocessing import Preprocessor
from triton_repo.runtime.steps.token_engine import token_request
from triton_repo.runtime.steps.token_request import read_token_request
from triton_repo.runtime.text.prompt import most_bytes
from trt_build.ort.routing import Routing
from trt_build.ort.step_call import Row

MAX_SEQUENCE = 64
DTYPES: Mapping[TritonDtype, Any] = {
    "STRING": np.object_, "INT32": np.int32, "INT64": np.int64, "UINT64": np.uint64, "FP32": np.float32,
    "BOOL": np.bool_,
}  # fmt: skip
TENSORS: Mapping[str, WireTensor] = {tensor.name: tensor for tensor in (*INPUTS, *COMPATIBILITY_INPUTS)}
GOOD: tuple[dict[str, Any], ...] = (
    {"text_input": ["def main("], "max_tokens": [4]},
    {"text_input": ["naïve 😀"], "max_tokens": [6], "stream": [True], "temperature": [0.7], "top_k": [40],
     "top_p": [0.9], "seed": [7], "min_tokens": [2], "stop_words": ["zz", "\n\n"], "bad_words": ["qq", "ab"]},
    {"text_input": ["x"], "max_tokens": [3], "repetition_penalty": [1.1], "presence_penalty": [0.5],
     "frequency_penalty": [-0.5], "return_log_probs": [True], "exclude_input_in_output": [False], "end_id": [-1],
     "pad_id": [0], "beam_width": [1]},
    {"text_input": ["x"], "max_tokens": [3], "min_length": [1], "random_seed": [3], "num_return_sequences": [1],
     "length_penalty": [1.0], "return_num_input_tokens": [True], "return_context_logits": [False]},
    {"text_input": ["x"], "max_tokens": [3], "min_p": [0.1], "logit_bias_ids": [5, 6], "logit_bias_values": [1.0, -3.0],
     "num_log_probs": [3], "embedding_bias_words": ["ab", ""], "embedding_bias_weights": [0.5, 1.0],
     "return_routed_experts": [True]},
    {"text_input": [""], "input_ids": [5, 6, 7], "max_tokens": [3]},
)  # fmt: skip
# Values at the ends of what each data type holds.
_ENDS: Mapping[TritonDtype, tuple[Any, ...]] = {
    "INT32": (0, 1, -1, 2, 3, 1024, 1025, 2**31 - 1, -(2**31)),
    "UINT64": (0, 1, 2**63, 2**64 - 1),
    "FP32": (0.0, -0.0, 1.0, -1.0, 0.5, 1e-38, 1e-45, 3e38, 1000.0, float("nan"), float("inf"), -float("inf")),
    "BOOL": (True, False),
    "STRING": (
        "", "a", " ", "\x00", "\x1b[2J", "é" * 600, "ab" * 5000, "q" * 300_000, " " * 100_000, "<|end|>" * 300,
        b"\xff", b"\xf0\x9f\x98", "\u202e", "ValueError", "語" * 300,
    ),
}  # fmt: skip


def array_of(tensor: WireTensor, values: Any) -> np.ndarray | None:
    """A tensor as Triton would hand it to a model: of its data type, [1, n]; None for what cannot be one."""
    items = values if isinstance(values, list) else [values]
    try:
        if tensor.dtype == "STRING":
            items = [item.encode(errors="surrogatepass") if isinstance(item, str) else item for item in items]
            if not all(isinstance(item, bytes) for item in items):
                return None
            made = np.empty((1, len(items)), dtype=np.object_)
            made[0, :] = items
            return made
        target = np.dtype(DTYPES[tensor.dtype])
        if target.kind in "iu" and not all(np.iinfo(target).min <= item <= np.iinfo(target).max for item in items):
            return None
        with np.errstate(all="ignore"):
            return np.array([items], dtype=target)
    except (TypeError, ValueError, OverflowError):
        return None


def tensors_of(request: Any) -> dict[str, np.ndarray]:
    """The tensors of a request that is a mapping from names to values; what is no tensor is left out."""
    made = {name: array_of(TENSORS[name], values) for name, values in dict(request).items() if name in TENSORS}
    return {name: tensor for name, tensor in made.items() if tensor is not None and tensor.ndim == 2}


END_ID = 256  # of the end token, behind a token for each byte


@cache
def tokenizer() -> Tokenizer:
    """Bytes as tokens, and an end token."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|end|>"])
    return Tokenizer(backend=backend, size=len(letters) + 1)


class _Cache:
    """Counts positions."""

    positions = MAX_SEQUENCE

    def __init__(self, slots: int) -> None:
        self.num_slots, self.lengths = slots, [0] * slots

    can_copy = True

    def bytes_of(self, positions: int) -> int:
        return positions

    def shorten(self, slot: int, length: int) -> None:
        self.lengths[slot] = length

    def release(self, slot: int, length: int = 0) -> None:
        self.lengths[slot] = length

    def copy(self, source: int, target: int, length: int | None = None) -> None:
        self.lengths[target] = self.lengths[source] if length is None else length


class _Session:
    """Logits drawn from the tokens that it is given. All routers choose the first experts."""

    max_sequence = MAX_SEQUENCE
    routing = Routing(layers=(0, 1), expert_order=(0, 1, 2, 3), experts_per_token=2)

    def __init__(self) -> None:
        manifest = SimpleNamespace(eos_token_ids=(END_ID,), tokenizer_size=tokenizer().size)
        self.engine = SimpleNamespace(manifest=manifest)

    def new_cache(self, slots: int = 1) -> _Cache:
        return _Cache(slots)

    def step(self, cache: _Cache, rows: Sequence[Row], router_logits: np.ndarray | None = None) -> np.ndarray:
        if router_logits is not None:
            router_logits[:] = 0
        drawn = []
        for row in rows:
            cache.lengths[row.slot] += len(row.token_ids)
            generator = np.random.default_rng(int(sum(row.token_ids)) % 1000)
            drawn.append(generator.normal(size=(row.num_logits, tokenizer().size)).astype(np.float32))
        return np.concatenate(drawn)


def answer_alone(request: Any) -> list[Any]:
    """What the model without steps does with a request."""
    options = read_options(tensors_of(request), most_bytes(tokenizer(), MAX_SEQUENCE - 1))
    return list(generate(_Session(), tokenizer(), options))


@cache
def _preprocessor() -> Preprocessor:
    parameters = TextParameters(
        max_sequence=MAX_SEQUENCE, max_prompt=MAX_SEQUENCE - 1, end_ids=(END_ID, 5),
        num_ids=tokenizer().size,
    )  # fmt: skip
    return Preprocessor(tokenizer(), parameters)


def answer_in_steps(request: Any) -> list[Any]:
    """What the steps of an ensemble do with it."""
    prepared = _preprocessor().prepare({QUERY_NAMES[name]: array for name, array in tensors_of(request).items()})
    names = ENGINE_NAMES | ADDED_ENGINE_NAMES
    tensors = {names[name]: tensor for name, tensor in prepared.items() if name in names}
    answer = Answer(AnswerPlan.from_json(prepared["ANSWER"].reshape(-1)[0].decode()), tokenizer())
    session = _Session()
    asked = read_token_request(tensors, MAX_SEQUENCE, tokenizer().size, (END_ID, 5))
    pieces = []
    size = tokenizer().size
    for response, _ in answered(session, lambda outlet: token_request(asked, size, outlet)):
        for token in response["output_ids"].reshape(-1).tolist():
            pieces.append(answer.extend(token))
    return pieces


def _read(data: bytes) -> Any:
    """A request written as JSON; None for what is no object."""
    try:
        found = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def _reader(name: str, answer: Any) -> Reader:
    def read(data: bytes, folder: Path) -> None:
        request = _read(data)
        if request is not None:
            answer(request)

    return Reader(name=name, seeds=lambda: [json.dumps(good).encode() for good in GOOD], read=read, mutate=mutated_json)


READERS = (_reader("wire requests", answer_alone), _reader("wire requests in steps", answer_in_steps))


def damaged_requests(seed: int, count: int) -> Iterator[dict[str, Any]]:
    """Requests of which some tensors hold values that they should not, or are absent; always the same for a seed."""
    rng = random.Random(f"wire {seed}")
    for _ in range(count):
        request: dict[str, Any] = {name: list(values) for name, values in rng.choice(GOOD).items()}
        for _ in range(rng.choice((1, 1, 2, 4))):
            name = rng.choice(list(TENSORS))
            kind = rng.randrange(5)
            if kind == 0:
                request.pop(name, None)
            elif kind == 1:
                value = rng.choice(_ENDS[TENSORS[name].dtype])
                size = len(value) if isinstance(value, str | bytes) else 1
                # Some megabytes at most: what more takes to arrive is not the model's doing.
                request[name] = [value] * (rng.choice((0, 1, 2, 1000, 5000)) if size < 400 else 2)
            elif kind == 2:
                request[name] = [rng.choice(HOSTILE_VALUES)]
            else:
                request[name] = [rng.choice(_ENDS[TENSORS[name].dtype])]
        yield request
