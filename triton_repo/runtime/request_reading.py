"""Reads the options of one generation request from its wire tensors.

    options = read_options({"text_input": array([[b"def "]]), "max_tokens": array([[32]])})

It checks what can be checked without the model, and raises one RequestError that lists every problem.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from triton_repo.contracts.wire import COMPATIBILITY_INPUTS, FIELD_NAMES, INPUTS, WireTensor
from triton_repo.runtime.options import (
    BIASES,
    MAX_WORDS,
    WIRE_NAMES,
    WORDS,
    GenerationOptions,
    refusal,
    size_problem,
    value_problems,
)
from triton_repo.runtime.text.prompt import PromptTooLongError, check_bytes

MAX_INPUT_IDS = 1 << 20  # before the context's limit is known
# Inputs that are accepted for compatibility and have no effect. For _ONLY_ONE and _FALSE_ONLY, any value that would
# change the output on TensorRT-LLM is refused.
_ONLY_ONE = ("beam_width",)
_FALSE_ONLY = ("return_context_logits", "return_generation_logits", "return_perf_metrics")
_IGNORED = ("pad_id", "length_penalty", "return_num_input_tokens", "return_num_output_tokens", "stop")


def read_options(tensors: Mapping[str, npt.NDArray[Any]], most_prompt_bytes: int | None = None) -> GenerationOptions:
    """The options in wire tensors [1, *dims]; texts are object arrays of UTF-8 bytes. A prompt of more than
    `most_prompt_bytes` is refused before it is decoded.

    Raises RequestError that lists every tensor that is absent, has another size, is not UTF-8, or has a refused value.
    """
    values: dict[str, Any] = {}
    problems: list[str] = []
    for spec in (*INPUTS, *COMPATIBILITY_INPUTS):
        if spec.name not in tensors:
            if not spec.optional:
                problems.append(f"{spec.name}: absent, and it is required; send {spec.unit}")
            continue
        try:
            value = _read_value(spec, tensors[spec.name], most_prompt_bytes)
        except ValueError as error:
            problems.append(str(error))
            continue
        field = FIELD_NAMES.get(spec.name, spec.name)
        if field in _ONLY_ONE and value != 1:
            problems.append(f"{field}: found {value}, expected 1; send one request for each sequence that you want")
        if field in _FALSE_ONLY and value:
            problems.append(f"{field}: found true, expected false; this server has no such output")
        given = WIRE_NAMES.get(field, field)  # if both names of a value are sent, the one that came first
        if field in values and values[field] != value:
            problems.append(f"{spec.name}: found {value}, but {given} says {values[field]}; send one of the two")
        if field not in (*_ONLY_ONE, *_FALSE_ONLY, *_IGNORED):
            values[field] = value
    for field, names in BIASES.items():
        things, numbers = (values.pop(name, ()) for name in names)
        if len(things) != len(numbers):
            problems.append(
                f"{names[0]}: found {len(things)} values and {len(numbers)} in {names[1]}, expected the same number"
            )
        elif things:
            values[field] = tuple(zip(things, numbers, strict=True))
    problems += value_problems(values)
    if problems:
        raise refusal(problems)
    return GenerationOptions(**values)


def _read_value(spec: WireTensor, tensor: npt.NDArray[Any], most_prompt_bytes: int | None) -> Any:  # noqa: ANN401 - as many types as the contract has
    """The Python value of one tensor. The text of the ValueError that it raises is the problem."""
    if tensor.ndim == 2 and tensor.shape[0] != 1:
        raise ValueError(
            f"{spec.name}: found a batch of {tensor.shape[0]}, expected shape {[1, *spec.dims]}; "
            "send one request for each prompt"
        )
    if spec.dims == (1,) and tensor.size != 1:
        raise ValueError(f"{spec.name}: found {tensor.size} values, expected 1; send shape [1, 1]")
    most = MAX_INPUT_IDS if spec.name == "input_ids" else MAX_WORDS
    if tensor.size > most:
        kind = "words" if spec.dtype == "STRING" else "values"
        raise ValueError(f"{spec.name}: found {tensor.size} {kind}, expected at most {most}; send fewer")
    items = tensor.reshape(-1).tolist()
    if spec.name == "text_input" and most_prompt_bytes is not None:
        try:
            check_bytes(len(items[0]), most_prompt_bytes)
        except PromptTooLongError as error:
            raise ValueError(f"{spec.name}: {error}") from error
    if spec.dtype == "STRING" and spec.dims == (-1,) and (problems := size_problem(items)):
        raise ValueError(f"{spec.name}: {problems[0]}")
    if spec.dtype == "STRING":
        items = [_text(spec.name, item) for item in items]
    elif spec.dtype == "FP32":
        items = [shortest(item) for item in items]
    if spec.dims == (1,):
        return items[0]
    # NVIDIA's examples send an empty text to say that there is no word.
    return tuple(item for item in items if item != "" or spec.name not in WORDS)


def shortest(value: float) -> float:
    """The float64 with the shortest decimal form of a float32, so that 0.7 on the wire equals 0.7 in Python."""
    return float(str(np.float32(value)))


def _text(name: str, item: bytes | str) -> str:
    if isinstance(item, str):
        return item
    try:
        return item.decode()
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: found bytes that are not UTF-8 (byte {error.start} is 0x{item[error.start]:02x}), "
            "expected UTF-8; encode the text as UTF-8"
        ) from error
