"""Converts jobs in worker processes. In threads, numpy's short operations would wait for the interpreter's lock.

A worker is a Python process that imports the converter's modules and not the main program. Over a pipe it receives a
`Converter` and then jobs, and sends back numbers of bytes read, records and errors. It ends when the pipe is closed, so
it ends with its parent even if the parent is killed.
"""

from __future__ import annotations

import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any, NoReturn

from export.conversion.converter import Converter, J, Job
from export.conversion.parts import PartRecord
from export.errors import MoeshipError, OutputError

POLL_INTERVAL_S = 0.2
# The worker gets the parent's sys.path, so that it imports the same modules and none from the working folder.
_PROGRAM = "import sys; sys.path[:] = {path!r}; from export.conversion.workers import serve; serve({descriptor})"


@dataclass
class _Worker:
    process: subprocess.Popen[bytes]
    connection: Connection
    job: Job | None = None


def convert_in_workers(
    converter: Converter[J], jobs: Sequence[J], num_workers: int, count: Callable[[int], None]
) -> Iterator[PartRecord | None]:
    """Yield the record of each job when it is done, and None a few times a second in between. `count` is called with
    the number of bytes of each read.

    Raises what a job raised, and OutputError if a worker died.
    """
    waiting = list(reversed(jobs))
    workers: list[_Worker] = []
    try:
        for _ in range(num_workers):
            workers.append(_start(converter))
        while waiting or any(worker.job for worker in workers):
            for worker in workers:
                if worker.job is None and waiting:
                    worker.job = waiting.pop()
                    worker.connection.send(worker.job)
            ready = wait([worker.connection for worker in workers], POLL_INTERVAL_S)
            for worker in workers:
                if worker.connection in ready:
                    record = _receive(worker, count)
                    if record is not None:
                        yield record
            yield None
    finally:
        for worker in workers:
            worker.connection.close()
            worker.process.kill()
            worker.process.wait()


def worker_memory(converter: Converter[J]) -> int:
    """Peak resident bytes of a worker that has loaded all libraries and not converted anything yet."""
    worker = _start(converter)
    try:
        kind, found = worker.connection.recv()
        if kind != "ready":
            raise AssertionError(f"a worker began with {kind}, expected ready")
        return int(found)
    finally:
        worker.connection.close()
        worker.process.wait()


def peak_memory() -> int:
    """The most bytes that were resident in this process. Source: proc(5), /proc/pid/status, VmHWM."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def _start(converter: Converter[J]) -> _Worker:
    ours, theirs = Pipe()
    program = _PROGRAM.format(path=[str(Path(entry).resolve()) for entry in sys.path], descriptor=theirs.fileno())
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
        pass_fds=[theirs.fileno()], env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    theirs.close()
    worker = _Worker(process=process, connection=ours)
    checkpoint = converter.weights.checkpoint
    in_files = None if checkpoint.in_files is None else dict(checkpoint.in_files)  # mapping proxies cannot be pickled
    plain = replace(checkpoint, config={}, tensors=dict(checkpoint.tensors), in_files=in_files)
    ours.send(replace(converter, weights=replace(converter.weights, checkpoint=plain)))
    return worker


def _receive(worker: _Worker, count: Callable[[int], None]) -> PartRecord | None:
    """Receive one message from a worker; returns the record if a job is done. Raises the error that it reports."""
    try:
        kind, *what = worker.connection.recv()
    except (EOFError, OSError) as error:
        status = worker.process.wait()
        raise OutputError(
            f"converting {worker.job.source if worker.job else 'weights'}: the process that did it ended with status "
            f"{status}{', killed, perhaps because memory ran out' if status == -signal.SIGKILL else ''}"
        ) from error
    if kind == "read":
        count(what[0])
    elif kind == "done":
        worker.job = None
        record: PartRecord = what[0]
        return record
    elif kind != "ready":
        _raise(kind, what)
    return None


def _raise(kind: str, what: list[Any]) -> NoReturn:
    if kind == "refused":
        error: MoeshipError = what[0].__new__(what[0])
        error.args = (what[1],)
        raise error
    if kind == "system":
        raise OSError(*what)
    raise AssertionError(f"a worker failed:\n{what[0]}")


def serve(descriptor: int) -> None:
    """Run a worker: receive jobs and send records over the pipe until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    connection = Connection(descriptor)
    messages: queue.SimpleQueue[Any] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(connection, messages), daemon=True).start()
    converter = messages.get()
    _send(connection, "ready", peak_memory())
    while True:
        job = messages.get()
        try:
            record = converter.convert(job, lambda num_bytes: _send(connection, "read", num_bytes))
        except MoeshipError as error:
            _send(connection, "refused", type(error), str(error))
        except Exception as error:
            if isinstance(error, OSError) and error.errno is not None:
                _send(connection, "system", error.errno, error.strerror, error.filename)
            else:
                _send(connection, "broken", traceback.format_exc())
        else:
            _send(connection, "done", record)


def _listen(connection: Connection, messages: queue.SimpleQueue[Any]) -> None:
    """Pass messages on to the worker's main thread. When the parent has gone, end the process at once, even within a
    job."""
    try:
        while True:
            messages.put(connection.recv())
    except (EOFError, OSError):
        os._exit(0)


def _send(connection: Connection, *message: object) -> None:
    try:
        connection.send(message)
    except OSError:
        os._exit(0)
