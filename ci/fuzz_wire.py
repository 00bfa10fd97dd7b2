"""Send damaged requests to a live server over gRPC and HTTP: python ci/fuzz_wire.py REPOSITORY --seed 7 --requests 4000

Starts Triton on a model repository and sends to each model that clients ask. A request must be answered or refused
within MAX_SECONDS, by a text that is short, without control characters and without the names of Python's exceptions.
After each hundred a good request must have the answer that it had at first. Exit status 1 where anything failed; the
first request that the server does not survive is the last.

HTTP bodies stay below MOST_HTTP_BYTES: Triton before 25.07 dies of longer ones (CVE-2025-23310, CVE-2025-23311), before
a model sees them.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fuzz_requests import GOOD, TENSORS, damaged_requests, tensors_of  # noqa: E402 - found through the path above
from fuzzing import MAX_MESSAGE_BYTES, MAX_SECONDS  # noqa: E402

from triton_repo.contracts.ensemble import STEP_MODELS  # noqa: E402
from triton_repo.contracts.wire import WIRE_DTYPES  # noqa: E402
from triton_repo.serving.server import Server, ServerOptions, running_server  # noqa: E402

if TYPE_CHECKING:
    from tritonclient.grpc.service_pb2 import ModelInferRequest

BATCH = 100
MOST_HTTP_BYTES = 500_000
# Timeout in seconds: longer than MAX_SECONDS, so that a hung request can be told from a slow one.
PATIENCE_S = 60
_FOREIGN = re.compile(r"\b[A-Z]\w*(Error|Exception|Warning)\b|Traceback|\.py\b")


def message_of(model: str, request: dict[str, Any], rng: random.Random, number: int) -> ModelInferRequest:
    """A ModelInferRequest from a request's fields. In some, a tensor's data type, shape or number of bytes is wrong."""
    from tritonclient.grpc import service_pb2
    from tritonclient.utils import serialize_byte_tensor

    message = service_pb2.ModelInferRequest(model_name=model, id=f"fuzz-{number}")
    message.parameters["triton_enable_empty_final_response"].bool_param = True
    for name, tensor in tensors_of(request).items():
        datatype, shape = WIRE_DTYPES[TENSORS[name].dtype], list(tensor.shape)
        raw = serialize_byte_tensor(tensor).item() if datatype == "BYTES" and tensor.size else tensor.tobytes()
        if datatype == "BYTES" and not tensor.size:
            raw = b""
        if rng.random() < 0.03:
            datatype = rng.choice(sorted(WIRE_DTYPES.values()))
        if rng.random() < 0.03:
            shape = rng.choice(([1], [2, 1], [1, 1, 1], [1, 0], [1, 2**31], [-1, 1], []))
        if rng.random() < 0.03:
            raw = rng.choice((raw[:-1], raw + b"\x00", b"", raw * 2))
        message.inputs.add(name=name, datatype=datatype, shape=shape)
        message.raw_input_contents.append(raw)
    return message


class Sender:
    """Sends requests to one server. No call raises; each returns the answer's text and the error's text."""

    def __init__(self, server: Server) -> None:
        import grpc
        from tritonclient.grpc import service_pb2_grpc

        self._grpc = grpc
        self._http_url = server.http_url
        options = [("grpc.max_send_message_length", -1), ("grpc.max_receive_message_length", -1)]
        self._stub = service_pb2_grpc.GRPCInferenceServiceStub(grpc.insecure_channel(server.grpc_url, options=options))

    def over_grpc(self, message: ModelInferRequest) -> tuple[str, str]:
        """Send a request over ModelStreamInfer and read the stream to its end."""
        answer, refusal = b"", ""
        try:
            for response in self._stub.ModelStreamInfer(iter((message,)), timeout=PATIENCE_S):
                refusal = refusal or response.error_message
                for output, raw in zip(
                    response.infer_response.outputs, response.infer_response.raw_output_contents, strict=True
                ):
                    answer += raw[4:] if output.name == "text_output" else b""
        except self._grpc.RpcError as error:
            refusal = f"{error.code().name}: {error.details()}"
        return answer.decode(), refusal

    def over_http(self, model: str, body: bytes) -> tuple[str, str]:
        """Send a request over HTTP's generate extension."""
        url = f"{self._http_url}/v2/models/{model}/generate"
        try:
            with urllib.request.urlopen(urllib.request.Request(url, data=body), timeout=PATIENCE_S) as response:
                return str(json.load(response).get("text_output", "")), ""
        except urllib.error.HTTPError as error:
            with error:
                return "", error.read().decode(errors="replace")
        except (OSError, ValueError) as error:
            return "", f"UNAVAILABLE: {error}"


def http_body(request: dict[str, Any]) -> bytes:
    """The JSON body of a request for the generate extension. A list with one value is sent as the value."""
    plain = {
        name: values[0] if isinstance(values, list) and len(values) == 1 else values for name, values in request.items()
    }
    return json.dumps(plain, default=lambda value: value.decode(errors="replace")).encode(errors="replace")


def faults_of(sender: Sender, model: str, seed: int, count: int, counts: Counter[str]) -> Iterator[str]:
    """Send damaged requests to a model; yields a message for each response that breaks a rule."""
    rng = random.Random(seed)
    good = message_of(model, GOOD[0], random.Random(0), 0)
    good.inputs[0].shape[:] = [1, 1]
    expected, refusal = sender.over_grpc(good)
    if refusal:
        yield f"{model}: a good request is refused: {refusal}"
        return
    for number, request in enumerate(damaged_requests(seed, count), start=1):
        started = time.perf_counter()
        body = http_body(request)
        if rng.random() < 0.3 and len(body) < MOST_HTTP_BYTES:
            _, refusal = sender.over_http(model, body)
        else:
            _, refusal = sender.over_grpc(message_of(model, request, rng, number))
        seconds = time.perf_counter() - started
        counts["refused" if refusal else "answered"] += 1
        where = f"{model}, request {number} {str(request)[:300]}"
        if seconds > MAX_SECONDS:
            yield f"{where}: {seconds:.1f} s"
        if len(refusal.encode()) > MAX_MESSAGE_BYTES + 100:
            yield f"{where}: a message of {len(refusal.encode())} bytes"
        if _FOREIGN.search(refusal):
            yield f"{where}: {refusal[:300]!r}"
        if not refusal.replace("\n", "").replace("\t", "").isprintable():
            yield f"{where}: control characters in {refusal[:300]!r}"
        if refusal.startswith(("UNAVAILABLE", "INTERNAL", "DEADLINE")):
            yield f"{where}: {refusal[:300]}"
            if sender.over_grpc(good) != (expected, ""):
                yield f"{model}: the server did not survive request {number}"
                return
        if number % BATCH == 0 and sender.over_grpc(good) != (expected, ""):
            yield f"{model}, after request {number}: a good request has another answer: {sender.over_grpc(good)!r:.300}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("repository", type=Path)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--requests",
        type=int,
        default=4000,
        metavar="N",
        help="number of requests over all models (default %(default)s)",
    )
    options = parser.parse_args(argv)
    total = 0
    with running_server(ServerOptions(repository=options.repository)) as server:
        sender = Sender(server)
        models = sorted({model.name for model in server.models if model.ready and model.name not in STEP_MODELS})
        for model in models:
            counts: Counter[str] = Counter()
            for problem in faults_of(sender, model, options.seed, options.requests // len(models), counts):
                print(problem, flush=True)
                total += 1
            print(f"{model}: {dict(counts)}", flush=True)
    print(f"{total} faults")
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())
