"""What an event costs the gateway: processor time for each thousand of a stream's events, without a model.

    python benchmarks/gateway_events.py --output RESULT.json

A stand-in for Triton in a process of its own gives each of `--streams` streams a piece every `--tick` seconds, all of
them at once, as a server does that computes a token for all sequences in a step. The gateway is a process too, so that
its time is its own: that of its interpreter, of gRPC's threads, and of the kernel for it. The client reads and counts.
A turn has `--requests` answers of `--tokens` events on each stream. On a busy machine the time is larger, so compare
two versions in turns. Counts of instructions repeat on a busy machine too; they include what the gateway's start takes:

    --under "valgrind --tool=callgrind --callgrind-out-file=callgrind.out" --rounds 1 --requests 2

Exit status 0 done, 1 a wrong answer, 2 wrong input.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shlex
import statistics
import subprocess
import sys
from collections.abc import AsyncIterator, Coroutine, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from clients.errors import ServerFailed  # noqa: E402 - found through the path above
from decode import machine  # noqa: E402
from export.command import run_command  # noqa: E402
from export.files.output import replace_file  # noqa: E402

MODEL = "phixtral"


async def stand_in(num_tokens: int, tick_s: float) -> None:
    """Serve as Triton does and print the port. Pieces are encoded once, so that they cost this process little."""
    import grpc
    from fake_triton import empty_final, piece
    from tritonclient.grpc import service_pb2 as pb

    texts = [(f" w{number % 10}", "") for number in range(num_tokens - 1)] + [(" end", "length")]
    messages = [
        piece(text, (number,), finish_reason=reason, num_output=number + 1).SerializeToString()
        for number, (text, reason) in enumerate(texts)
    ]
    inputs = [pb.ModelMetadataResponse.TensorMetadata(name=name) for name in ("text_input", "max_tokens", "stop")]
    index = pb.RepositoryIndexResponse(models=[{"name": MODEL, "version": "1", "state": "READY"}])
    answers = {
        "ServerMetadata": pb.ServerMetadataResponse(name="triton", version="2.68.0"),
        "ModelMetadata": pb.ModelMetadataResponse(name=MODEL, inputs=inputs),
        "RepositoryIndex": index,
    }
    ticked = asyncio.Condition()

    async def stream(requests: AsyncIterator[bytes], _context: object) -> AsyncIterator[bytes]:
        async for _ in requests:
            for message in messages:
                async with ticked:
                    await ticked.wait()
                yield message
            yield empty_final().SerializeToString()

    def answering(data: bytes) -> Any:  # noqa: ANN401 - grpc's handler
        async def answer(_request: bytes, _context: object) -> bytes:
            return data

        return grpc.unary_unary_rpc_method_handler(answer)

    methods = {name: answering(message.SerializeToString()) for name, message in answers.items()}
    methods["ModelStreamInfer"] = grpc.stream_stream_rpc_method_handler(stream)
    server = grpc.aio.server()
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("inference.GRPCInferenceService", methods),))
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    print(port, flush=True)
    while True:
        await asyncio.sleep(tick_s)
        async with ticked:
            ticked.notify_all()


@contextmanager
def started(command: Sequence[str]) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A process and the first line that it prints, which says where it listens. Raises ServerFailed."""
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            if not line:
                raise ServerFailed(f"starting {shlex.join(command)}: it ended with status {process.wait()}")
            yield process, line.strip()
        finally:
            process.terminate()
            process.wait()


async def ask(port: int, path: str, num_tokens: int) -> int:
    """The number of events of one streamed answer. Raises ServerFailed."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    body = json.dumps({"model": MODEL, "prompt": "a", "max_tokens": num_tokens, "stream": True, "temperature": 0})
    head = f"POST {path} HTTP/1.1\r\nHost: gateway\r\nContent-Type: application/json\r\nConnection: close\r\n"
    try:
        writer.write(f"{head}Content-Length: {len(body)}\r\n\r\n{body}".encode())
        answer = await reader.read()
    finally:
        writer.close()
        await writer.wait_closed()
    count = answer.count(b"data: {")
    if count != num_tokens or b"data: [DONE]" not in answer:
        raise ServerFailed(f"measuring the gateway: found {count} events, expected {num_tokens}: {answer[-400:]!r}")
    return count


async def together(streams: Sequence[Coroutine[Any, Any, int]]) -> int:
    """The events of all streams; the first error ends the others."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(stream) for stream in streams]
    except ExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return sum(task.result() for task in tasks)


async def measure(options: argparse.Namespace, process: subprocess.Popen[str], port: int) -> list[float]:
    """Milliseconds of processor time for a thousand events, of each turn."""
    import psutil

    gateway, found = psutil.Process(process.pid), []

    async def stream(count: int) -> int:
        return sum([await ask(port, "/v1/completions", options.tokens) for _ in range(count)])

    for count in (1, *[options.requests] * options.rounds):  # the first turn warms up
        begun = sum(gateway.cpu_times()[:2])
        events = await together([stream(count) for _ in range(options.streams)])
        found.append((sum(gateway.cpu_times()[:2]) - begun) * 1e6 / events)
        print(f"{events} events, {found[-1]:.1f} ms a thousand", file=sys.stderr, flush=True)
    return found[1:]


def benchmark(options: argparse.Namespace) -> int:
    """Measure, write the result, print the median."""
    own = [sys.executable, __file__, "--stand-in", "--tokens", str(options.tokens), "--tick", str(options.tick)]
    with started(own) as (_, triton):
        command = [sys.executable, "-m", "cli.main", "gateway", "--json", "--triton", f"127.0.0.1:{triton}", "--port",
                   "0"]  # fmt: skip
        with started([*shlex.split(options.under), *command]) as (process, line):
            port = urlsplit(json.loads(line)["openai"]).port or 0
            found = asyncio.run(measure(options, process, port))
    if options.output:
        kept = {name: value for name, value in vars(options).items() if name not in ("output", "stand_in")}
        result = {
            "date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine.describe(), "options": kept,
            "ms_per_1000_events": found,
        }  # fmt: skip
        replace_file(options.output, json.dumps(result, indent=1) + "\n")
    print(f"{statistics.median(found):.1f} ms of processor time a thousand events (median of {len(found)} turns)")
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="file for the result")
    parser.add_argument("--streams", type=int, default=8, metavar="N", help="at once (default 8)")
    parser.add_argument("--rounds", type=int, default=5, metavar="N", help="turns (default 5)")
    parser.add_argument("--requests", type=int, default=20, metavar="N", help="of a stream in a turn (default 20)")
    parser.add_argument("--tokens", type=int, default=64, metavar="N", help="of an answer (default 64)")
    parser.add_argument("--tick", type=float, default=0.002, metavar="S", help="between tokens (default 0.002)")
    parser.add_argument("--under", default="", metavar="COMMAND", help="what runs the gateway, such as a profiler")
    parser.add_argument("--stand-in", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.stand_in:
        asyncio.run(stand_in(options.tokens, options.tick))
    return run_command(lambda: benchmark(options))


if __name__ == "__main__":
    sys.exit(main())
