"""Talks to a live Triton with nothing of moeship but the server's addresses: plain protobuf messages over gRPC."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from types import TracebackType

import grpc
import numpy as np
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import triton_to_np_dtype

from triton_repo.serving.server import Server

# Tensor names by datatype on the wire and field of InferTensorContents; texts are the rest.
_NUMBERS = {
    ("INT32", "int_contents"): (
        "max_tokens", "top_k", "min_length", "min_tokens", "end_id", "pad_id", "beam_width", "num_return_sequences",
    ),
    ("FP32", "fp32_contents"): (
        "temperature", "top_p", "repetition_penalty", "presence_penalty", "frequency_penalty", "length_penalty",
    ),
    ("BOOL", "bool_contents"): (
        "stream", "stop", "return_log_probs", "exclude_input_in_output", "return_num_input_tokens",
    ),
    ("UINT64", "uint64_contents"): ("random_seed", "seed"),
}  # fmt: skip
_KINDS = {name: kind for kind, names in _NUMBERS.items() for name in names}
DEADLINE_S = 120


class Refused(Exception):  # noqa: N818 - what the server said
    """The error text of a refused request. No gRPC status is asked for: Triton 2.51 crashes of that (server#8708)."""


@dataclass(frozen=True)
class Response:
    """One response: its outputs as flat lists, their shapes, and whether it was marked as the last."""

    outputs: dict[str, list]
    shapes: dict[str, list[int]]
    final: bool

    @property
    def text(self) -> str:
        return self.outputs["text_output"][0].decode()


class LiveTriton:
    """A channel to one server."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.channel = grpc.insecure_channel(server.grpc_url)
        self.stub = service_pb2_grpc.GRPCInferenceServiceStub(self.channel)

    def __enter__(self) -> LiveTriton:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.channel.close()

    def call(self, model: str, request_id: str = "", **tensors):
        """Start a request; returns the gRPC call, which yields ModelStreamInferResponse and can be cancelled."""
        request = service_pb2.ModelInferRequest(model_name=model, id=request_id)
        # The end of a stream is then always seen, if need be as a response of nothing.
        request.parameters["triton_enable_empty_final_response"].bool_param = True
        for name, value in tensors.items():
            _add_input(request, name, value)
        ended = threading.Event()

        def requests():
            yield request
            ended.wait(DEADLINE_S)

        call = self.stub.ModelStreamInfer(requests(), timeout=DEADLINE_S)
        call.add_callback(ended.set)
        return call, ended

    def ask(self, model: str, request_id: str = "", **tensors) -> list[Response]:
        """All responses to one request. Raises Refused."""
        call, ended = self.call(model, request_id, **tensors)
        responses, refusal = [], ""
        for message in call:
            if message.error_message:
                refusal = message.error_message
                ended.set()
                continue
            responses.append(read(message.infer_response))
            if responses[-1].final:
                ended.set()
        if refusal:
            raise Refused(refusal)
        return responses

    def text(self, model: str, request_id: str = "", **tensors) -> str:
        return "".join(response.text for response in self.ask(model, request_id, **tensors) if response.outputs)


def read(message) -> Response:
    outputs, shapes = {}, {}
    for output, raw in zip(message.outputs, message.raw_output_contents, strict=True):
        shapes[output.name] = list(output.shape)
        if output.datatype == "BYTES":
            outputs[output.name] = _texts(raw)
        else:
            outputs[output.name] = np.frombuffer(raw, dtype=triton_to_np_dtype(output.datatype)).tolist()
    return Response(outputs, shapes, message.parameters["triton_final_response"].bool_param)


def _texts(raw: bytes) -> list[bytes]:
    texts, place = [], 0
    while place < len(raw):
        size = int.from_bytes(raw[place : place + 4], "little")
        texts.append(raw[place + 4 : place + 4 + size])
        place += 4 + size
    return texts


def _add_input(request, name: str, value) -> None:
    values = list(value) if isinstance(value, (list, tuple)) else [value]
    datatype, field = _KINDS.get(name, ("BYTES", "bytes_contents"))
    if datatype == "BYTES":
        values = [text.encode() if isinstance(text, str) else text for text in values]
    tensor = request.inputs.add(name=name, datatype=datatype, shape=[1, len(values)])
    getattr(tensor.contents, field).extend(values)
