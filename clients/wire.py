"""Turns generation requests into protobuf requests, and protobuf responses into pieces. Nothing here opens a
connection.

Names, dtypes and dims are those of `triton_repo/contracts/wire.py`. Tensors are in `raw_input_contents` and
`raw_output_contents`: numbers are little-endian, and each text follows its length in bytes (4 bytes, little-endian). An
output that the contract does not have is ignored; one that it has must be as the contract says.
"""

from __future__ import annotations

import math
import re
import struct
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from numbers import Integral, Real
from typing import TYPE_CHECKING, Any

from clients._tritonclient import require_messages, require_utils
from clients.errors import BY_STATUS, RequestRejected, StreamBroken, without_ensemble
from clients.messages import GenerationRequest
from triton_repo.contracts.model_state import ModelState
from triton_repo.contracts.piece import Piece, TokenRouting
from triton_repo.contracts.wire import (
    ADDED_OUTPUTS,
    COMPATIBILITY_INPUTS,
    FIELD_NAMES,
    INPUTS,
    OUTPUTS,
    WIRE_DTYPES,
    TritonDtype,
    WireTensor,
)

if TYPE_CHECKING:
    import numpy as np
    from tritonclient.grpc import service_pb2 as pb

Metadata = tuple[tuple[str, str], ...]
# The input by which a request asks its model to end the requests with the same id.
STOP = "stop"
# Asks Triton to end a failed stream with a gRPC status. Without it an error is a text among the responses.
ERROR_STATUS_METADATA = (("triton_grpc_error", "true"),)
# An older Triton that gets this metadata uses freed memory and crashes within a few failed requests
# (triton-inference-server/server#8708, in 26.04).
ERROR_STATUS_SINCE = (2, 68)
# In older releases a cancelled call may crash Triton (triton-inference-server/server#8078).
SAFE_CANCELLATION_SINCE = (2, 57)
# The letters of the module struct and the bytes of a value.
_FORMATS: dict[TritonDtype, tuple[str, int]] = {
    "INT32": ("i", 4), "INT64": ("q", 8), "UINT64": ("Q", 8), "FP32": ("f", 4), "BOOL": ("?", 1),
}  # fmt: skip
KNOWN_OUTPUTS = {tensor.name: tensor for tensor in (*OUTPUTS, *ADDED_OUTPUTS)}


def build_request(request: GenerationRequest, *, stream: bool) -> pb.ModelInferRequest:
    """The ModelInferRequest of one generation. With `stream` there is one response for each piece instead of one in
    all.

    It always has an id, so that it can be ended (`build_stop`).
    Raises RequestRejected for a value that its tensor cannot hold.
    """
    request_id = request.request_id or uuid.uuid4().hex
    message = require_messages().ModelInferRequest(model_name=request.model, id=request_id)
    # With this parameter the last response always comes, if need be without outputs, and marks the end.
    message.parameters["triton_enable_empty_final_response"].bool_param = True
    for tensor, values in input_values(request, stream=stream):
        message.inputs.add(name=tensor.name, datatype=WIRE_DTYPES[tensor.dtype], shape=[1, len(values)])
        try:
            message.raw_input_contents.append(encode(values, tensor.dtype))
        except (ValueError, TypeError, ArithmeticError) as error:
            raise RequestRejected(
                f"a request to {request.model}: {tensor.name} is {values!r}, which {tensor.dtype} cannot hold: {error}"
            ) from error
    return message


def build_stop(model: str, request_id: str) -> pb.ModelInferRequest:
    """The ModelInferRequest that ends the requests with that id. It has a prompt and a length only because they are
    required."""
    message = require_messages().ModelInferRequest(model_name=model, id=request_id)
    message.parameters["triton_enable_empty_final_response"].bool_param = True
    required = [tensor for tensor in INPUTS if not tensor.optional]
    stop = next(tensor for tensor in COMPATIBILITY_INPUTS if tensor.name == STOP)
    for tensor in (*required, stop):
        value: Any = {"STRING": "", "INT32": 1, "BOOL": True}[tensor.dtype]
        message.inputs.add(name=tensor.name, datatype=WIRE_DTYPES[tensor.dtype], shape=[1, 1])
        message.raw_input_contents.append(encode([value], tensor.dtype))
    return message


def read_inputs(metadata: pb.ModelMetadataResponse) -> frozenset[str]:
    """The names of a model's inputs."""
    return frozenset(tensor.name for tensor in metadata.inputs)


def takes_stop(metadata: pb.ModelMetadataResponse) -> bool:
    """Whether a model has the input `stop`."""
    return STOP in read_inputs(metadata)


def input_values(request: GenerationRequest, *, stream: bool) -> list[tuple[WireTensor, list[Any]]]:
    """Each tensor to send and its values, in the order of the contract. Fields that are None or empty are not sent.

    Servers of this contract are greedy if top_k and top_p are both absent or 0. So a temperature without them is sent
    with top_p 1, which draws among all tokens.
    """
    chosen: list[tuple[WireTensor, list[Any]]] = []
    biases = request.logit_bias or {}
    given: dict[str, Any] = {
        "stream": stream,
        "logit_bias_ids": tuple(biases),
        "logit_bias_values": tuple(biases.values()),
    }
    if request.temperature not in (None, 0) and not request.top_k and not request.top_p:
        given["top_p"] = 1.0
    for tensor in INPUTS:
        field = FIELD_NAMES.get(tensor.name, tensor.name)
        value: Any = given[field] if field in given else getattr(request, field)
        values = [] if value is None else list(value) if tensor.dims == (-1,) else [value]
        if values:
            chosen.append((tensor, values))
    return chosen


def encode(values: Sequence[Any], dtype: TritonDtype) -> bytes:
    """The bytes of one tensor. Raises ValueError, TypeError or ArithmeticError for a value that does not fit."""
    import numpy as np

    if dtype == "STRING":
        texts = [_utf8(text) for text in values]
        return bytes(require_utils().serialize_byte_tensor(np.array(texts, dtype=np.object_)).item())
    target = _numpy_dtype(dtype)
    for value in values:
        _check_number(value, target)
    with np.errstate(over="raise"):
        return np.array(values, dtype=np.float64 if target.kind == "f" else target).astype(target).tobytes()


def _utf8(text: Any) -> bytes:  # noqa: ANN401 - whatever the caller gave
    if not isinstance(text, str):
        raise TypeError(f"{text!r} is not a text")
    return text.encode()


def _check_number(value: Any, target: np.dtype[Any]) -> None:  # noqa: ANN401 - whatever the caller gave
    import numpy as np

    is_bool = isinstance(value, (bool, np.bool_))
    is_number = isinstance(value, Real if target.kind == "f" else Integral)
    if is_bool != (target.kind == "b") or not (is_bool or is_number):
        raise TypeError(f"{value!r} is of another type")
    if target.kind in "iu" and not np.iinfo(target).min <= value <= np.iinfo(target).max:
        raise OverflowError("out of range")


def decode(raw: bytes, dtype: TritonDtype) -> list[Any]:
    """The values of one tensor as Python objects. Raises ValueError or struct.error for bytes that do not fit the
    dtype."""
    if dtype == "STRING":
        if len(raw) >= 4 and int.from_bytes(raw[:4], "little") == len(raw) - 4:  # one text, as in most responses
            return [raw[4:].decode()]
        return [text.decode() for text in require_utils().deserialize_bytes_tensor(raw)]
    # A response has a few numbers in each of several tensors, for which an array of numpy costs more than reading them.
    letter, size = _FORMATS[dtype]
    return list(struct.unpack(f"<{len(raw) // size}{letter}", raw))


@cache
def _numpy_dtype(dtype: TritonDtype) -> np.dtype[Any]:
    import numpy as np

    return np.dtype(require_utils().triton_to_np_dtype(WIRE_DTYPES[dtype])).newbyteorder("<")


def read_outputs(response: pb.ModelInferResponse) -> dict[str, list[Any]]:
    """The values of each known output of a ModelInferResponse. Raises StreamBroken if it does not follow the
    contract."""
    outputs, contents = response.outputs, response.raw_output_contents
    if len(contents) != len(outputs):
        raise StreamBroken(
            f"a response of {response.model_name}: found {len(contents)} raw contents for {len(outputs)} outputs"
        )
    found: dict[str, list[Any]] = {}
    for output, raw in zip(outputs, contents, strict=True):
        name = output.name
        if name in KNOWN_OUTPUTS:
            found[name] = _read_output(response, KNOWN_OUTPUTS[name], output, raw)
    return found


def _read_output(
    response: pb.ModelInferResponse,
    tensor: WireTensor,
    output: pb.ModelInferResponse.InferOutputTensor,
    raw: bytes,
) -> list[Any]:
    datatype = output.datatype
    if datatype != WIRE_DTYPES[tensor.dtype]:
        raise StreamBroken(
            f"a response of {response.model_name}: {tensor.name} is {datatype}, expected {WIRE_DTYPES[tensor.dtype]}"
        )
    try:
        values = decode(raw, tensor.dtype)
    except (ValueError, struct.error) as error:
        raise StreamBroken(f"a response of {response.model_name}: {tensor.name} cannot be decoded: {error}") from error
    if len(values) != math.prod(output.shape):
        raise StreamBroken(
            f"a response of {response.model_name}: {tensor.name} holds {len(values)} values, its shape is "
            f"{list(output.shape)}"
        )
    return values


def read_piece(response: pb.ModelInferResponse, *, log_probs: bool) -> Piece | None:
    """The piece in one ModelInferResponse; None for the empty final one. `log_probs`: whether log-probabilities were
    asked for. If not, they are not read, since TensorRT-LLM fills those outputs with zeros.
    """
    outputs = read_outputs(response)
    if not outputs:
        return None
    if not outputs.get("text_output"):
        raise StreamBroken(f"a response of {response.model_name} has no text_output; it has {', '.join(outputs)}")
    firsts = {name: values[0] for name, values in outputs.items() if values}
    return Piece(
        text=firsts["text_output"],
        token_ids=tuple(outputs.get("token_ids", ())),
        finish_reason=firsts.get("finish_reason") or None,
        num_input_tokens=firsts.get("num_input_tokens"),
        num_output_tokens=firsts.get("num_output_tokens"),
        cum_log_prob=firsts.get("cum_log_probs") if log_probs else None,
        log_probs=tuple(outputs.get("output_log_probs", ())) if log_probs else (),
        top_log_probs=_read_tops(response.model_name, outputs, "top", len(outputs.get("token_ids", ()))),
        prompt_token_ids=tuple(outputs.get("prompt_token_ids", ())),
        prompt_log_probs=tuple(outputs.get("prompt_log_probs", ())),
        prompt_top_log_probs=_read_tops(
            response.model_name, outputs, "prompt_top", len(outputs.get("prompt_log_probs", ()))
        ),
        sequence_index=firsts.get("sequence_index", 0),
        routing=_read_routing(response, outputs),
        num_experts=firsts.get("num_experts"),
    )


def _read_routing(response: pb.ModelInferResponse, outputs: dict[str, list[Any]]) -> tuple[TokenRouting, ...]:
    """The experts of each token of a response and their weights. Raises StreamBroken."""
    names = [name for name in ("routed_experts", "expert_weights") if outputs.get(name)]
    if not names:
        return ()
    shapes = {output.name: tuple(output.shape) for output in response.outputs}
    count = len(outputs.get("token_ids", ()))
    found = {shapes[name] for name in names}
    shape = next(iter(found))
    if len(names) < 2 or len(found) > 1 or len(shape) != 4 or shape[:2] != (1, count):
        raise StreamBroken(
            f"a response of {response.model_name}: {' and '.join(names)} "
            f"{'have' if len(names) > 1 else 'has'} shape {' and '.join(str(list(one)) for one in sorted(found))}, "
            f"expected both routed_experts and expert_weights, [1, {count}, layers, experts of a token]"
        )
    pairs = list(zip(outputs["routed_experts"], outputs["expert_weights"], strict=True))
    layers = [tuple(pairs[start : start + shape[3]]) for start in range(0, len(pairs), shape[3])]
    return tuple(tuple(layers[start : start + shape[2]]) for start in range(0, len(layers), shape[2]))


def _read_tops(
    model: str, outputs: dict[str, list[Any]], prefix: str, count: int
) -> tuple[tuple[tuple[int, float], ...], ...]:
    """The likeliest tokens at each of `count` places. Raises StreamBroken."""
    names = f"{prefix}_token_ids", f"{prefix}_log_probs"
    ids, values = outputs.get(names[0], ()), outputs.get(names[1], ())
    if not ids and not values:
        return ()
    if len(ids) != len(values) or not count or len(ids) % count:
        raise StreamBroken(
            f"a response of {model}: {names[0]} holds {len(ids)} values and {names[1]} {len(values)}, expected "
            f"as many for each of {count} tokens"
        )
    pairs, width = list(zip(ids, values, strict=True)), len(ids) // count
    return tuple(tuple(pairs[start : start + width]) for start in range(0, len(pairs), width))


@dataclass(frozen=True, kw_only=True)
class ServerTraits:
    """What differs between releases of Triton."""

    metadata: Metadata  # sent with each stream
    cancels_safely: bool  # whether Triton survives a cancelled call


def server_traits(server_version: str) -> ServerTraits:
    """The traits of a Triton version such as "2.51.0". A text that is not a version counts as an old release."""
    numbers = re.match(r"(\d+)\.(\d+)", server_version)
    version = tuple(map(int, numbers.groups())) if numbers else (0, 0)
    return ServerTraits(
        metadata=ERROR_STATUS_METADATA if version >= ERROR_STATUS_SINCE else (),
        cancels_safely=version >= SAFE_CANCELLATION_SINCE,
    )


class ErrorText(Exception):  # noqa: N818 - what the server sent, not yet one of our errors
    """An error that came as text among the responses. Its status is UNKNOWN unless the text starts with a status."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        text = without_ensemble(text)
        status, _, rest = text.partition(": ")
        self.status, self.details = (status, rest) if status in BY_STATUS else ("UNKNOWN", text)


class StreamReader:
    """Reads the responses of one stream in order, and notices its end.

    The piece with the finish reason, and the text of an error, are kept back until the stream has ended. Otherwise a
    caller that leaves after them would ask the server to end a request that is about to end by itself.
    """

    def __init__(self, doing: str, *, log_probs: bool) -> None:
        self._doing = doing
        self._log_probs = log_probs
        self._num_pieces = 0
        self._kept: tuple[Piece, ...] = ()
        self._error: ErrorText | None = None
        self._final = False

    def read(self, message: pb.ModelStreamInferResponse) -> tuple[Piece, ...]:
        """The pieces to give out after a ModelStreamInferResponse. Raises StreamBroken."""
        if message.error_message:
            self._error = self._error or ErrorText(message.error_message)
            return ()
        self._final = message.infer_response.parameters["triton_final_response"].bool_param
        piece = read_piece(message.infer_response, log_probs=self._log_probs)
        if piece is None:
            return ()
        self._num_pieces += 1
        ready, self._kept = (*self._kept, piece), ()
        if piece.finish_reason:
            ready, self._kept = ready[:-1], (piece,)
        return ready

    def finish(self) -> tuple[Piece, ...]:
        """The last piece. Call it after the stream has ended. Raises ErrorText, and StreamBroken if no final response
        came."""
        if self._error is not None:
            raise self._error
        if not self._final:
            raise StreamBroken(f"{self._doing}: the stream ended after {self._num_pieces} pieces without a final one")
        return self._kept


def doing(model: str, server: str) -> str:
    return f"generating with {model} at {server}"


def read_models(index: pb.RepositoryIndexResponse) -> tuple[ModelState, ...]:
    """The states in a RepositoryIndexResponse, in the order of names."""
    states = (
        ModelState(name=model.name, version=model.version, state=model.state, reason=model.reason)
        for model in index.models
    )
    return tuple(sorted(states, key=lambda state: (state.name, state.version)))
