"""A servicer of Triton's inference service that answers as each test tells it; its responses are made by hand."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

# What a response handler gets: the request and the call's context; it yields what the server sends.
Answer = Callable[[pb.ModelInferRequest, grpc.ServicerContext], Iterator[pb.ModelStreamInferResponse]]


def text_bytes(text: str) -> bytes:
    """A BYTES tensor of one text, written by hand: length in 4 little-endian bytes, then UTF-8."""
    return len(text.encode()).to_bytes(4, "little") + text.encode()


def piece(text: str, token_ids=(), *, finish_reason: str = "", num_output: int = 0, final: bool = False):
    """One response as moeship's model sends it, with a prompt of 3 tokens and log-probabilities of -0.5 a token."""
    response = pb.ModelInferResponse(model_name="phixtral", model_version="1")
    response.parameters["triton_final_response"].bool_param = final
    ids = b"".join(int(token).to_bytes(4, "little") for token in token_ids)
    half = bytes.fromhex("000000bf")  # -0.5 as float32
    for name, datatype, shape, raw in (
        ("text_output", "BYTES", [1, 1], text_bytes(text)),
        ("cum_log_probs", "FP32", [1, 1], half),
        ("output_log_probs", "FP32", [1, len(token_ids)], half * len(token_ids)),
        ("sequence_index", "INT32", [1, 1], bytes(4)),
        ("batch_index", "INT32", [1, 1], bytes(4)),
        ("finish_reason", "BYTES", [1, 1], text_bytes(finish_reason)),
        ("token_ids", "INT32", [1, len(token_ids)], ids),
        ("num_input_tokens", "INT32", [1, 1], (3).to_bytes(4, "little")),
        ("num_output_tokens", "INT32", [1, 1], num_output.to_bytes(4, "little")),
    ):
        response.outputs.add(name=name, datatype=datatype, shape=shape)
        response.raw_output_contents.append(raw)
    return pb.ModelStreamInferResponse(infer_response=response)


def empty_final():
    """The response that Triton sends at the end, with no outputs."""
    message = pb.ModelStreamInferResponse(infer_response=pb.ModelInferResponse(model_name="phixtral"))
    message.infer_response.parameters["triton_final_response"].bool_param = True
    return message


def two_pieces(request, context):
    yield piece("def ", (5, 6), num_output=2)
    yield piece("main", (7,), finish_reason="length", num_output=3)
    yield empty_final()


@dataclass
class FakeServer(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers with `answer`; keeps what it was sent. `cancelled` is set when a call ends before its answer does."""

    answer: Answer = two_pieces
    version: str = "2.68.0"
    states: tuple[tuple[str, str, str], ...] = (("phixtral", "READY", ""),)
    requests: list[pb.ModelInferRequest] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    # A stream has begun.
    started: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    def ModelStreamInfer(self, request_iterator, context):  # noqa: N802 - the service's own name
        self.metadata = dict(context.invocation_metadata())
        for request in request_iterator:
            self.requests.append(request)
            self.started.set()
            yield from self.answer(request, context)

    def ServerMetadata(self, request, context):  # noqa: N802 - the service's own name
        return pb.ServerMetadataResponse(name="triton", version=self.version)

    def ServerReady(self, request, context):  # noqa: N802 - the service's own name
        return pb.ServerReadyResponse(ready=True)

    def ModelReady(self, request, context):  # noqa: N802 - the service's own name
        return pb.ModelReadyResponse(ready=(request.name, "READY", "") in self.states)

    def RepositoryIndex(self, request, context):  # noqa: N802 - the service's own name
        response = pb.RepositoryIndexResponse()
        for name, state, reason in self.states:
            response.models.add(name=name, version="1", state=state, reason=reason)
        return response

    def endless(self, request, context):
        """One piece, then nothing more until the call is cancelled."""
        context.add_callback(self.cancelled.set)
        yield piece("def ", (5, 6), num_output=2)
        self.cancelled.wait()

    def failing(self, status: grpc.StatusCode, details: str) -> Answer:
        """One piece, then the status."""

        def answer(request, context):
            yield piece("def ", (5, 6), num_output=2)
            context.abort(status, details)

        return answer
