"""The servers that are compared. Each stays loaded and is stopped (SIGSTOP) while another is measured."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

from clients.bench.records import Target
from clients.bench.targets.openai import opened
from clients.bench.targets.triton import TritonTarget
from clients.generation import AsyncClient
from decode.machine import busy_seconds
from decode.orders import Worker, worker_process
from export.errors import ConfigError
from servers.scenarios import SCENARIOS, Order
from triton_repo.contracts.model_parameters import ModelParameters
from triton_repo.packaging.package import PackageOptions, package_engine
from triton_repo.serving.server import ServerOptions, running_server

READY_S = 600.0
MODEL = "served"
# llama.cpp re-uses the cache of an equal prompt; a chunk states the number of tokens so far.
LLAMA_EXTRA = {"cache_prompt": False, "timings_per_token": True}
VLLM_EXTRA = {"return_token_ids": True}
_KIB = 1024


class Contender:
    """A loaded server. `measure` runs a scenario; the server runs only meanwhile."""

    def __init__(
        self, name: str, pid: int, measure: Callable[[Order], dict[str, Any]], notes: Mapping[str, Any]
    ) -> None:
        self.name, self.notes = name, notes
        self._pid, self._measure = pid, measure
        self._signal(signal.SIGSTOP)

    def measure(self, order: Order) -> dict[str, Any]:
        """Run a scenario. The result has the memory of the server's processes after it, and how many cores other
        programs kept busy meanwhile: servers whose threads wait for one another lose much more than that share."""
        self._signal(signal.SIGCONT)
        try:
            begun, busy, own = time.monotonic(), busy_seconds(), self._own_seconds()
            found = self._measure(order)
            others = (busy_seconds() - busy) - (self._own_seconds() - own)
            return {
                **found,
                "memory": self.memory(),
                "others_cores": max(0.0, others / (time.monotonic() - begun)),
            }
        finally:
            self._signal(signal.SIGSTOP)

    def _own_seconds(self) -> float:
        """Processor seconds of the server's processes and of this one."""
        ticks = 0
        for pid in {*family(self._pid), os.getpid()}:
            try:
                words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            except OSError:  # it has ended
                continue
            ticks += int(words[11]) + int(words[12])  # utime and stime, proc(5)
        return ticks / os.sysconf("SC_CLK_TCK")

    def memory(self) -> dict[str, int]:
        """Bytes of the server's processes: resident, and the part of it that no file backs."""
        found = {"VmRSS": 0, "RssAnon": 0}
        for pid in family(self._pid):
            try:
                text = Path(f"/proc/{pid}/status").read_text()
            except OSError:  # it has ended
                continue
            for name in found:
                line = re.search(rf"^{name}:\s+(\d+) kB$", text, re.M)
                found[name] += int(line[1]) * _KIB if line else 0
        return {"resident_bytes": found["VmRSS"], "anonymous_bytes": found["RssAnon"]}

    def release(self) -> None:
        """Let the server run again, so that it can end."""
        self._signal(signal.SIGCONT)

    def _signal(self, number: signal.Signals) -> None:
        for pid in family(self._pid):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue


def family(pid: int) -> list[int]:
    """A process and all of its descendants."""
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        try:
            text = status.read_text()
        except OSError:
            continue
        parent = int(text.rpartition(")")[2].split()[1])
        children.setdefault(parent, []).append(int(status.parent.name))
    found = [pid]
    for member in found:
        found += children.get(member, [])
    return found


def over(target: Callable[[], AbstractAsyncContextManager[Target]]) -> Callable[[Order], dict[str, Any]]:
    """A function that runs scenarios on what `target` opens."""

    async def run(order: Order) -> dict[str, Any]:
        async with target() as found:
            return await SCENARIOS[order["scenario"]](found, order)

    return lambda order: asyncio.run(run(order))


@contextmanager
def ours(engine: Path, parameters: ModelParameters) -> Iterator[Contender]:
    """Our engine behind Triton, as one model over gRPC."""
    with tempfile.TemporaryDirectory(prefix="moeship-serving-", dir=engine.parent) as folder:
        repository = Path(folder) / "repository"
        package_engine(PackageOptions(engine=engine, name=MODEL, output=repository, onnxruntime=parameters))
        with running_server(ServerOptions(repository=repository, http=False)) as server:

            @asynccontextmanager
            async def target() -> AsyncIterator[Target]:
                async with AsyncClient(server.grpc_url) as client:
                    yield TritonTarget(client, MODEL)

            yield from _held(
                Contender(
                    "ours",
                    server.process.pid,
                    over(target),
                    {"program": "tritonserver", **dataclasses.asdict(parameters)},
                )
            )


@contextmanager
def in_process(engine: Path, parameters: ModelParameters) -> Iterator[Contender]:
    """Our engine in a process without a server."""
    arguments = [str(engine.resolve()), json.dumps(dataclasses.asdict(parameters))]
    with worker_process("servers.in_process", arguments, parameters.threads or 1) as process:
        worker = Worker("in-process", process)
        yield from _held(Contender("in-process", process.pid, worker.ask, {}))


@contextmanager
def llama(name: str, program: Path, model: Path, threads: int, slots: int, context: int) -> Iterator[Contender]:
    """llama.cpp's server, with as many slots as there are streams at most."""
    port = free_port()
    flags = [
        "--model", model, "--host", "127.0.0.1", "--port", port, "--parallel", slots, "--ctx-size", context,
        "--kv-unified", "--threads", threads, "--threads-batch", threads, "--flash-attn", "off", "--cache-ram", 0,
        "--no-ui", "--fit", "off",
    ]  # fmt: skip
    with _program(name, [str(program), *map(str, flags)], f"http://127.0.0.1:{port}/health") as process:
        yield from _held(_openai(name, f"http://127.0.0.1:{port}", process.pid, LLAMA_EXTRA, {"flags": flags[4:]}))


@contextmanager
def vllm(program: Path, model: Path, threads: int, slots: int, context: int) -> Iterator[Contender]:
    """vLLM's CPU build. `program` is the `vllm` of its environment, `model` a checkpoint that it can load."""
    port = free_port()
    flags = [
        "--host", "127.0.0.1", "--port", port, "--max-num-seqs", slots, "--max-model-len", context,
        "--no-enable-prefix-caching",
    ]  # fmt: skip
    settings = {"VLLM_CPU_OMP_THREADS_BIND": f"0-{threads - 1}", "VLLM_CPU_KVCACHE_SPACE": "2"}
    command = [str(program), "serve", str(model), *map(str, flags)]
    with _program("vllm", command, f"http://127.0.0.1:{port}/health", settings) as process:
        notes = {"flags": flags[4:], "environment": settings}
        yield from _held(_openai("vllm", f"http://127.0.0.1:{port}", process.pid, VLLM_EXTRA, notes))


def _openai(name: str, url: str, pid: int, extra: Mapping[str, Any], notes: Mapping[str, Any]) -> Contender:
    return Contender(name, pid, over(lambda: opened(url, None, extra=extra)), notes)


def _held(contender: Contender) -> Iterator[Contender]:
    try:
        yield contender
    finally:
        contender.release()


@contextmanager
def _program(
    name: str, command: Sequence[str], health: str, settings: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    """Start a server and wait until it is healthy; end it with the block. Raises ConfigError if it ends before."""
    with (
        tempfile.TemporaryFile() as log,
        subprocess.Popen(command, stdout=log, stderr=log, env={**os.environ, **(settings or {})}) as process,
    ):
        try:
            deadline = time.monotonic() + READY_S
            while not _is_healthy(health):
                if process.poll() is not None or time.monotonic() > deadline:
                    log.seek(0)
                    tail = log.read().decode(errors="replace")[-1500:]
                    raise ConfigError(f"starting {name}: it ended or was not ready in {READY_S:g} s: {tail}")
                time.sleep(0.2)
            yield process
        finally:
            process.terminate()


def _is_healthy(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def free_port() -> int:
    """A port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
