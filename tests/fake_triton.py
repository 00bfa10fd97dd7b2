"""A servicer of Triton's inference service that answers as each test tells it, with the tensors of the served model."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent import futures
from contextlib import contextmanager
from dataclasses import dataclass, field

import grpc
from tritonclient.grpc import service_pb2 as pb
from tritonclient.grpc import service_pb2_grpc

from triton_repo.contracts.piece import Piece
from triton_repo.runtime.responses import wire_outputs

# numpy's names of the dtypes of the outputs and the protocol's.
DATATYPES = {"|O": "BYTES", "<i4": "INT32", "<f4": "FP32"}
# What a response handler gets: the request and the call's context; it yields what the server sends.
Answer = Callable[[pb.ModelInferRequest, grpc.ServicerContext], Iterator[pb.ModelStreamInferResponse]]


def text_bytes(text: bytes) -> bytes:
    """A text of a BYTES tensor, written by hand: its length in 4 little-endian bytes, then itself."""
    return len(text).to_bytes(4, "little") + text


def piece(
    text: str,
    token_ids=(),
    *,
    finish_reason: str = "",
    num_output: int = 0,
    final: bool = False,
    log_probs=False,
    **fields,
):
    """One response with the tensors that moeship's model sends, for a prompt of 3 tokens; with `log_probs`, as to a
    request that asks for them, each is as given, or -0.5 for True. `fields` are further ones of the piece."""
    values = (-0.5,) * len(token_ids) if log_probs is True else tuple(log_probs or ())
    made = Piece(
        text=text,
        token_ids=tuple(token_ids),
        log_probs=values,
        cum_log_prob=-0.5 if log_probs else None,
        finish_reason=finish_reason,
        num_input_tokens=3,
        num_output_tokens=num_output,
        **fields,
    )
    response = pb.ModelInferResponse(model_name="phixtral", model_version="1")
    response.parameters["triton_final_response"].bool_param = final
    for name, values in wire_outputs(made).items():
        response.outputs.add(name=name, datatype=DATATYPES[values.dtype.str], shape=values.shape)
        is_text = values.dtype == object
        response.raw_output_contents.append(b"".join(map(text_bytes, values.flat)) if is_text else values.tobytes())
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


def echoed_prompt(request, context):
    """The prompt as the answer."""
    names = [tensor.name for tensor in request.inputs]
    text = request.raw_input_contents[names.index("text_input")][4:].decode()
    asked = {"log_probs": True} if "return_log_probs" in names else {}
    yield piece(text, (5,), finish_reason="stop", num_output=1, **asked)
    yield empty_final()


def at_the_end_of(context: grpc.ServicerContext, callback: Callable[[], object]) -> None:
    """Have a callback called when a call ends, or at once where it has: a client may give up before the answer."""
    if not context.add_callback(callback):
        callback()


def deadlines(server: FakeServer) -> Iterator[float]:
    """Longer and longer deadlines in seconds, until one has passed after the server got the request: on a busy machine
    a short one passes before."""
    for timeout_s in (0.3, 1, 4, 16):
        server.stops.clear()
        yield timeout_s
        if server.started.is_set():
            return


@contextmanager
def fake_server() -> Iterator[FakeServer]:
    """A server of this kind that listens, until the end of the block."""
    servicer = FakeServer()
    grpc_server = grpc.server(futures.ThreadPoolExecutor(max_workers=4))
    service_pb2_grpc.add_GRPCInferenceServiceServicer_to_server(servicer, grpc_server)
    servicer.url = f"127.0.0.1:{grpc_server.add_insecure_port('127.0.0.1:0')}"
    grpc_server.start()
    yield servicer
    servicer.cancelled.set()
    servicer.stopped.set()
    grpc_server.stop(grace=None).wait()


@dataclass
class FakeServer(service_pb2_grpc.GRPCInferenceServiceServicer):
    """Answers with `answer`; keeps what it was sent. `cancelled` is set when a call ends before its answer does."""

    answer: Answer = two_pieces
    version: str = "2.68.0"
    states: tuple[tuple[str, str, str], ...] = (("phixtral", "READY", ""),)
    requests: list[pb.ModelInferRequest] = field(default_factory=list)
    metadata: dict[str, str] = field(default_factory=dict)
    # The ids that requests to stop named, whether the model has such an input, and whether it does anything.
    stops: list[str] = field(default_factory=list)
    takes_stop: bool = True
    more_inputs: tuple[str, ...] = ("return_routed_experts",)
    obeys_stop: bool = True
    stopped: threading.Event = field(default_factory=threading.Event)
    # A stream has begun.
    started: threading.Event = field(default_factory=threading.Event)
    cancelled: threading.Event = field(default_factory=threading.Event)
    silent_until: threading.Event | None = None  # questions about the server are answered from then on
    url: str = ""

    def ModelStreamInfer(self, request_iterator, context):  # noqa: N802 - the service's own name
        self.metadata = dict(context.invocation_metadata())
        for request in request_iterator:
            if "stop" in {tensor.name for tensor in request.inputs}:
                self.stops.append(request.id)
                if self.obeys_stop:
                    self.stopped.set()
                yield empty_final()
                continue
            self.requests.append(request)
            self.started.set()
            yield from self.answer(request, context)

    def ServerMetadata(self, request, context):  # noqa: N802 - the service's own name
        if self.silent_until:
            self.silent_until.wait(60)
        return pb.ServerMetadataResponse(name="triton", version=self.version)

    def ServerReady(self, request, context):  # noqa: N802 - the service's own name
        return pb.ServerReadyResponse(ready=True)

    def ModelReady(self, request, context):  # noqa: N802 - the service's own name
        return pb.ModelReadyResponse(ready=(request.name, "READY", "") in self.states)

    def ModelMetadata(self, request, context):  # noqa: N802 - the service's own name
        response = pb.ModelMetadataResponse(name=request.name)
        for name in ("text_input", "max_tokens", *["stop"] * self.takes_stop, *self.more_inputs):
            response.inputs.add(name=name)
        return response

    def RepositoryIndex(self, request, context):  # noqa: N802 - the service's own name
        response = pb.RepositoryIndexResponse()
        for name, state, reason in self.states:
            response.models.add(name=name, version="1", state=state, reason=reason)
        return response

    def endless(self, request, context):
        """One piece, then nothing more until the call is cancelled."""
        at_the_end_of(context, self.cancelled.set)
        yield piece("def ", (5, 6), num_output=2)
        self.cancelled.wait()

    def stoppable(self, request, context):
        """One piece, then nothing more until a request to stop comes; `cancelled` where the call is cancelled."""
        at_the_end_of(context, lambda: self.stopped.is_set() or self.cancelled.set())
        at_the_end_of(context, self.stopped.set)
        yield piece("def ", (5, 6), num_output=2)
        self.stopped.wait()
        yield piece("", (), finish_reason="cancelled", num_output=2)
        yield empty_final()

    def failing(self, status: grpc.StatusCode, details: str) -> Answer:
        """One piece, then the status."""

        def answer(request, context):
            yield piece("def ", (5, 6), num_output=2)
            context.abort(status, details)

        return answer
