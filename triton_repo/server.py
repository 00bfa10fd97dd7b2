"""Model repository in, running tritonserver out; stopped again, with every process of it, when the block ends.

    with running_server(ServerOptions(repository=Path("repository"))) as server:
        print(server.grpc_url, server.http_url, server.metrics_url, server.models)

The server is told the whole truth in config.pbtxt (no auto-completion), goes on when a model does not load, and
listens on this machine alone unless told otherwise. Where the parent process is killed outright, the kernel ends the
server (Linux); it is bound to the thread that started it, so start it from one that lives as long as it should.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from export.errors import listing
from triton_repo.errors import ServerError
from triton_repo.health import ModelState, is_listening, model_states
from triton_repo.installation import Installation, find_installation, packages_folder
from triton_repo.ports import ChosenPorts, Ports, choose_ports
from triton_repo.repository import check_repository

logger = logging.getLogger(__name__)

LOCALHOST = "127.0.0.1"
DRAIN_TIMEOUT_S = 5  # what requests in flight have to finish in when the server is asked to stop
KILL_GRACE_S = 10  # on top of it, before the process group is killed
POLL_INTERVAL_S = 0.1
LOG_TAIL_LINES = 15
_SHARED_MEMORY = Path("/dev/shm")
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """`log`: a file for the server's log; None keeps it until the server ends. `verbose` sends it to stderr instead."""

    repository: Path
    host: str = LOCALHOST
    ports: Ports = field(default_factory=Ports)
    ready_timeout_s: float = 600
    log: Path | None = None
    verbose: bool = False


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server that answers. Urls are host:port for gRPC and http://host:port[/path] for the others."""

    grpc_url: str
    http_url: str
    metrics_url: str
    models: tuple[ModelState, ...]
    process: subprocess.Popen[bytes]
    log: Path | None

    def log_tail(self) -> str:
        """The last lines of the server's log, indented; empty where it goes to stderr."""
        return _tail(self.log)


@contextlib.contextmanager
def running_server(options: ServerOptions) -> Iterator[Server]:
    """Start a server and wait until its models are loaded; stop it when the block ends.

    Raises RepositoryError for a repository that cannot be served, MissingPackageError without a tritonserver, and
    ServerError for a port in use, a server that ends or takes too long, and when no model at all is ready.
    """
    if not 0 < options.ready_timeout_s < math.inf:
        raise ServerError(
            f"serving {options.repository}: the ready timeout is {options.ready_timeout_s} s, expected a finite number "
            "above 0"
        )
    check_repository(options.repository)
    ports = choose_ports(options.host, options.ports)
    with tempfile.TemporaryDirectory(prefix="moeship-serve-") as workspace_name:
        workspace = Path(workspace_name)
        installation = find_installation(workspace)
        log = None if options.verbose else options.log or workspace / "tritonserver.log"
        memory_prefix = f"moeship_{secrets.token_hex(8)}_"
        arguments = _arguments(installation, options, ports, memory_prefix)
        with _process(arguments, installation.environment(), log, memory_prefix) as process:
            yield _wait_until_ready(process, options, ports, log)


def _arguments(installation: Installation, options: ServerOptions, ports: ChosenPorts, memory_prefix: str) -> list[str]:
    backends = [f"--backend-directory={installation.backends}"] if installation.backends else []
    return [
        str(installation.program),
        f"--model-repository={options.repository.resolve()}",
        *backends,
        "--disable-auto-complete-config",
        "--exit-on-error=false",
        f"--exit-timeout-secs={DRAIN_TIMEOUT_S}",
        f"--grpc-address={options.host}",
        f"--grpc-port={ports.grpc}",
        f"--http-address={options.host}",
        f"--http-port={ports.http}",
        "--allow-metrics=true",
        f"--metrics-address={options.host}",
        f"--metrics-port={ports.metrics}",
        f"--backend-config=python,shm-region-prefix-name={memory_prefix}",
    ]


@contextlib.contextmanager
def _process(
    arguments: list[str], environment: dict[str, str], log: Path | None, memory_prefix: str
) -> Iterator[subprocess.Popen[bytes]]:
    """A server process in a process group of its own; no process and no shared memory of it are left afterwards."""
    logger.debug("starting %s", " ".join(arguments))
    with contextlib.ExitStack() as files:
        try:
            output = sys.stderr.fileno() if log is None else files.enter_context(log.open("ab")).fileno()
        except OSError as error:
            raise ServerError(f"opening the server's log {log}: {error.strerror}; name another file") from error
        try:
            process = subprocess.Popen(
                arguments,
                env=environment,
                cwd=packages_folder(),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=_follow_parent(),
            )
        except OSError as error:
            raise ServerError(f"starting {arguments[0]}: {error.strerror} ({error.filename})") from error
    try:
        yield process
    finally:
        try:
            _stop(process)
        finally:
            for region in _SHARED_MEMORY.glob(f"{memory_prefix}*"):
                region.unlink(missing_ok=True)


def _follow_parent() -> Callable[[], None] | None:
    """What the child runs before it becomes the server: ask the kernel for SIGTERM when its parent ends."""
    if sys.platform != "linux":
        return None
    prctl, parent = ctypes.CDLL(None).prctl, os.getpid()

    def follow() -> None:
        prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it ended before the kernel was asked
            os._exit(1)

    return follow


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ask for an orderly end, then kill what is left of the process group. A second interrupt kills at once."""
    with contextlib.suppress(KeyboardInterrupt):
        process.terminate()
        try:
            process.wait(DRAIN_TIMEOUT_S + KILL_GRACE_S)
        except subprocess.TimeoutExpired:
            logger.warning(
                "the server had not ended %d s after it was asked to; killed", DRAIN_TIMEOUT_S + KILL_GRACE_S
            )
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + KILL_GRACE_S
    while _is_alive(process.pid):
        if time.monotonic() > deadline:
            logger.warning("processes of the server's group %d are still ending", process.pid)
            return
        time.sleep(POLL_INTERVAL_S)


def _is_alive(group: int) -> bool:
    """Whether a process of the group still runs. One that ended but was not yet reaped by its parent does not."""
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):  # it ended meanwhile
            # proc(5): the fields after the name in parentheses are state, parent, process group.
            state, _, found, *_ = path.read_text().rpartition(")")[2].split()
            if int(found) == group and state not in "ZX":
                return True
    return False


def _wait_until_ready(
    process: subprocess.Popen[bytes], options: ServerOptions, ports: ChosenPorts, log: Path | None
) -> Server:
    """Wait until every model was loaded or refused. Raises ServerError unless at least one is ready."""
    # A server that listens on every address is asked through this machine's own.
    host = LOCALHOST if options.host == "0.0.0.0" else options.host
    deadline = time.monotonic() + options.ready_timeout_s
    while not all(is_listening(host, port) for port in vars(ports).values()):
        if process.poll() is not None:
            raise ServerError(
                f"serving {options.repository}: tritonserver ended with status {process.returncode} before it was "
                f"ready{_tail(log)}"
            )
        if time.monotonic() > deadline:
            raise ServerError(
                f"serving {options.repository}: tritonserver was still loading models after "
                f"{options.ready_timeout_s:g} s; allow more time, or look at its log{_tail(log)}"
            )
        time.sleep(POLL_INTERVAL_S)
    models = model_states(f"http://{host}:{ports.http}")
    failed = [f"{model.name} is {model.state}: {model.reason}" for model in models if not model.ready]
    if len(failed) == len(models):
        raise ServerError(f"serving {options.repository}: no model is ready:{listing(failed)}{_tail(log)}")
    for problem in failed:
        logger.warning("%s", problem)
    return Server(
        grpc_url=f"{options.host}:{ports.grpc}",
        http_url=f"http://{options.host}:{ports.http}",
        metrics_url=f"http://{options.host}:{ports.metrics}/metrics",
        models=models,
        process=process,
        log=log,
    )


def _tail(log: Path | None) -> str:
    if log is None or not log.is_file():
        return ""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:]
    return "\n  the end of its log:" + "".join(f"\n    {line}" for line in lines)
