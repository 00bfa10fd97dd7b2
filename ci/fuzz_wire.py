"""Send damaged requests to a live server over gRPC and HTTP: python ci/fuzz_wire.py REPOSITORY --seed 7 --requests 4000

Starts Triton on a model repository and sends to each model that clients ask. A request must be answered or refused
within MAX_SECONDS, by a text that is short, without control characters and without the names of Python's exceptions.
After each hundred a good request must have the answer that it had at first. With --clients several are sent at a time,
and good requests beside them all the while, whose answers must stay the same. Exit status 1 where anything failed; the
first request that the server does not survive is the last.

HTTP bodies stay below MOST_HTTP_BYTES: Triton before 25.07 dies of longer ones (CVE-2025-23310, CVE-2025-23311), before
a model sees them.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import random
import re
import sys
import threading
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
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
BESIDE = 2  # good requests at a time beside several clients
FAILURES = ("UNAVAILABLE", "INTERNAL", "DEADLINE")
MOST_HTTP_BYTES = 500_000
# Timeout in seconds: longer than MAX_SECONDS, so that a hung request can be told from a slow one.
PATIENCE_S = 60
_FOREIGN = re.compile(r"\b[A-Z]\w*(Error|Exception|Warning)\b|Traceback|\.py\b")


def message_of(model: str, request: dict[str, Any], rng: random.Random | None, number: int) -> ModelInferRequest:
    """A ModelInferRequest from a request's fields. In some, a tensor's data type, shape or number of bytes is wrong;
    `rng` None makes none wrong."""
    from tritonclient.grpc import service_pb2
    from tritonclient.utils import serialize_byte_tensor

    message = service_pb2.ModelInferRequest(model_name=model, id=f"fuzz-{number}")
    message.parameters["triton_enable_empty_final_response"].bool_param = True
    for name, tensor in tensors_of(request).items():
        datatype, shape = WIRE_DTYPES[TENSORS[name].dtype], list(tensor.shape)
        raw = serialize_byte_tensor(tensor).item() if datatype == "BYTES" and tensor.size else tensor.tobytes()
        if datatype == "BYTES" and not tensor.size:
            raw = b""
        if rng is not None:
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


class GoodRequests:
    """Requests that have one right answer, and what each of them gets alone."""

    def __init__(self, sender: Sender, model: str) -> None:
        self._sender = sender
        seeds = ({} if "random_seed" in request else {"seed": [7]} for request in GOOD)
        self._messages = [
            message_of(model, {**request, **seed}, None, 0) for request, seed in zip(GOOD, seeds, strict=True)
        ]
        self._right = [sender.over_grpc(message) for message in self._messages]
        self.refusal = next((refusal for _, refusal in self._right if refusal), "")
        self._over = threading.Event()

    def differs(self, number: int = 0) -> str:
        """What a good request gets that is not its answer; empty where it gets that."""
        number %= len(self._messages)
        found = self._sender.over_grpc(self._messages[number])
        return "" if found == self._right[number] else f"{found!r:.300}, expected {self._right[number]!r:.300}"

    @contextlib.contextmanager
    def beside(self, wanted: bool, counts: Counter[str]) -> Iterator[list[str]]:
        """Send them one after the other while the block runs, if `wanted`; gives the list of other answers."""
        faults: list[str] = []

        def send() -> None:
            for number in itertools.count():
                if self._over.is_set():
                    return
                counts["good beside them"] += 1
                if fault := self.differs(number):
                    faults.append(fault)

        threads = [threading.Thread(target=send) for _ in range(BESIDE if wanted else 0)]
        for thread in threads:
            thread.start()
        try:
            yield faults
        finally:
            self._over.set()
            for thread in threads:
                thread.join()


def problems_of(refusal: str, seconds: float, most_seconds: float) -> Iterator[str]:
    """The rules that a response breaks."""
    if seconds > most_seconds:
        yield f"{seconds:.1f} s"
    if len(refusal.encode()) > MAX_MESSAGE_BYTES + 100:
        yield f"a message of {len(refusal.encode())} bytes"
    if _FOREIGN.search(refusal):
        yield f"{refusal[:300]!r}"
    if not refusal.replace("\n", "").replace("\t", "").isprintable():
        yield f"control characters in {refusal[:300]!r}"
    if refusal.startswith(FAILURES):
        yield refusal[:300]


def faults_of(
    sender: Sender, model: str, seed: int, count: int, counts: Counter[str], clients: int = 1
) -> Iterator[str]:
    """Send damaged requests to a model, `clients` at a time; yields a message for each response that breaks a rule.
    Beside several clients good requests are sent all the while."""
    rng, good = random.Random(seed), GoodRequests(sender, model)
    if good.refusal:
        yield f"{model}: a good request is refused: {good.refusal}"
        return

    def send(call: Callable[[], tuple[str, str]]) -> tuple[str, float]:
        started = time.perf_counter()
        return call()[1], time.perf_counter() - started

    requests = enumerate(damaged_requests(seed, count), start=1)
    with ThreadPoolExecutor(clients) as pool, good.beside(clients > 1, counts) as others:
        while group := list(itertools.islice(requests, clients)):
            calls = [_call(sender, model, request, rng, number) for number, request in group]
            has_failed = False
            for (number, request), (refusal, seconds) in zip(group, pool.map(send, calls), strict=True):
                counts["refused" if refusal else "answered"] += 1
                has_failed = has_failed or refusal.startswith(FAILURES)
                for problem in problems_of(refusal, seconds, MAX_SECONDS * clients):
                    yield f"{model}, request {number} {str(request)[:300]}: {problem}"
            last = group[-1][0]
            if (has_failed or last % BATCH < clients) and (fault := good.differs()):
                yield f"{model}, after request {last}: a good request has another answer: {fault}"
                if has_failed:
                    yield f"{model}: the server did not survive request {last}"
                    return
    for fault in others:
        yield f"{model}: beside damaged requests a good one has another answer: {fault}"


def _call(
    sender: Sender, model: str, request: dict[str, Any], rng: random.Random, number: int
) -> Callable[[], tuple[str, str]]:
    """What sends a request, over HTTP or gRPC."""
    body = http_body(request)
    if rng.random() < 0.3 and len(body) < MOST_HTTP_BYTES:
        return partial(sender.over_http, model, body)
    return partial(sender.over_grpc, message_of(model, request, rng, number))


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
    parser.add_argument(
        "--clients",
        type=int,
        default=1,
        metavar="N",
        help="send N damaged requests at a time, and good ones beside them; for an engine of fp32, whose texts do not "
        "depend on what else is computed (default %(default)s)",
    )
    options = parser.parse_args(argv)
    total = 0
    with running_server(ServerOptions(repository=options.repository)) as server:
        sender = Sender(server)
        models = sorted({model.name for model in server.models if model.ready and model.name not in STEP_MODELS})
        for model in models:
            counts: Counter[str] = Counter()
            number = options.requests // len(models)
            for problem in faults_of(sender, model, options.seed, number, counts, options.clients):
                print(problem, flush=True)
                total += 1
            print(f"{model}: {dict(counts)}", flush=True)
    print(f"{total} faults")
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())
