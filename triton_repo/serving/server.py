"""Model repository in, running tritonserver out. The server and all of its processes end with the block.

    with running_server(ServerOptions(repository=Path("repository"))) as server:
        print(server.grpc_url, server.http_url, server.metrics_url, server.models)

config.pbtxt is complete, so Triton's auto-completion is off. A model that does not load does not end the server. The
server listens only on this machine unless a host is given. A model on several GPUs has one server for each, started by
mpirun (`mpi.py`); the first of them answers clients. `processes/program.py` ends them, and `supervision/` starts them
again after a fault.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from export.errors import listing
from export.files.own_files import open_log
from triton_repo.contracts.model_state import ModelState
from triton_repo.contracts.server_variables import REQUEST_LOG_VARIABLE, RESTARTS_VARIABLE
from triton_repo.contracts.tls.client import ClientTls
from triton_repo.contracts.tls.server import CheckedTls, ServerTls, check_server_tls
from triton_repo.errors import ServerError, TlsError
from triton_repo.processes.heartbeat import FOLDER_VARIABLE, announce_drain, announce_end, read_beats
from triton_repo.processes.program import (
    DRAIN_TIMEOUT_S,
    POLL_INTERVAL_S,
    Program,
    kill_left,
    running_program,
    start_time,
)
from triton_repo.processes.workspace import is_plain, private_workspace
from triton_repo.serving.command import endpoint_arguments, server_arguments
from triton_repo.serving.deployment import Deployment, read_deployment
from triton_repo.serving.health import HealthEndpoint
from triton_repo.serving.installation import Installation, find_installation, packages_folder
from triton_repo.serving.machine_fit import check_kernels, check_machine
from triton_repo.serving.mpi import Launch, plan_launch
from triton_repo.serving.ports import Address, ChosenPorts, Ports, choose_ports, resolve_host, unencrypted_address
from triton_repo.serving.readiness import NotReady, Waiting, wait_until_ready
from triton_repo.serving.repository_check import check_repository
from triton_repo.serving.vulnerabilities import read_version, refuse_known_holes
from trt_build.machine.readings import Machine, read_machine

logger = logging.getLogger(__name__)

LOCALHOST = "127.0.0.1"
LOG_TAIL_LINES, LOG_TAIL_BYTES = 15, 1 << 16
DEFAULT_DRAIN_TIMEOUT_S = 30.0
# Time for the engine's last tokens to pass postprocessing and to reach the clients.
SETTLE_S = 0.5
# For requests that outlast a drain to end: a heartbeat, a step, and a heartbeat. Afterwards they are cut off.
END_TIMEOUT_S = 5.0

# Triton's HTTP library copies parts of a request to its thread's stack before it checks them: twice the body if the
# body is declared as a form, as curl -d and urllib do (libevhtp, evhtp_parse_query_wflags), and 16 bytes for each
# chunk. With the usual stack of 8 MiB a body of 4.2 MB ends the server (triton-inference-server/server#5840). Only the
# used part of a stack takes memory.
STACK_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """What a caller chooses."""

    repository: Path
    host: str = LOCALHOST  # a name or an address of this machine
    ports: Ports = field(default_factory=Ports)
    http: bool = True  # False: only gRPC and metrics
    tls: ServerTls | None = None  # encrypt gRPC; HTTP and metrics then listen on the loopback address
    ready_timeout_s: float = 600
    drain_timeout_s: float = DEFAULT_DRAIN_TIMEOUT_S
    log: Path | None = None  # file for the server's log; None: a temporary file, removed when the server ends
    verbose: bool = False  # send the server's log to stderr instead
    request_log: Path | None = None  # file that gets a line for each request; Path("-") is stdout
    world_size: int | None = None  # ranks of a model on several GPUs; None takes the number in the repository
    multi_model: bool = False  # orchestrator mode, for several TensorRT-LLM models
    accept_known_vulnerabilities: bool = False  # let a tritonserver with known holes listen beyond this machine


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server that answers."""

    grpc_url: str  # host:port
    http_url: str | None  # http://host:port; None if HTTP is off
    metrics_url: str  # http://host:port/metrics
    models: tuple[ModelState, ...]
    process: subprocess.Popen[bytes]  # the tritonserver, or the launcher of mpirun
    program: str  # name of the program that was started: tritonserver or mpirun
    world_size: int  # number of tritonservers
    log: Path | None  # None if the log goes to stderr
    mark: str  # in the environment of its processes, and at the start of the names of its shared memory
    heartbeats: Path  # folder of its models' heartbeats
    endpoint: HealthEndpoint  # where this machine asks for its health
    tls: str | None = None  # "server": gRPC is encrypted; "mutual": and clients need a certificate
    own_tls: ClientTls | None = None  # how clients of this machine, such as a gateway, ask it then

    def log_tail(self) -> str:
        """The last lines of the server's log, indented; empty if the log goes to stderr."""
        return _tail(self.log)

    def kill(self) -> None:
        """Kill every process of the server."""
        kill_left(self.process.pid, self.mark)
        self.process.wait()

    def drain(self, timeout_s: float) -> bool:
        """Have the models refuse waiting and further requests, and wait until they compute nothing. Returns whether
        that was so within `timeout_s`. If not, the models end what they compute: its clients get what there is."""
        announce_drain(self.heartbeats)
        if self._is_idle_within(timeout_s):
            return True
        announce_end(self.heartbeats)
        self._is_idle_within(END_TIMEOUT_S)
        return False

    def _is_idle_within(self, timeout_s: float) -> bool:
        """Wait until the models of a draining server compute nothing. Returns whether that was so in time."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            beats = [beat for beat in read_beats(self.heartbeats) if start_time(beat.pid) is not None]
            if self.process.poll() is not None:
                return True
            if all(beat.draining and not beat.running for beat in beats):
                time.sleep(SETTLE_S)
                return True
            time.sleep(POLL_INTERVAL_S)
        return False


@contextlib.contextmanager
def running_server(options: ServerOptions) -> Iterator[Server]:
    """Start a server and wait until its models are loaded. End it when the block ends.

    Raises RepositoryError for a repository that cannot be served, and MissingPackageError if there is no tritonserver.
    Raises TlsError for certificates that no client would take, and MissingPackageError without `cryptography` then.
    Raises EngineError if an engine needs moeship's CPU kernels and they cannot be used.
    Raises ServerError for a port in use, a model that this machine cannot run, a server that ends or takes too long, a
    server with known holes that other machines could reach, and if no model is ready.
    """
    with prepared(options) as preparation, preparation.started() as server:
        yield server


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """Everything that is decided before a server starts and stays the same when it is started again, such as its
    ports."""

    options: ServerOptions
    deployment: Deployment
    launch: Launch
    address: Address
    ports: ChosenPorts
    installation: Installation
    num_gpus: int
    workspace: Path
    mark: str
    tls: CheckedTls | None

    @contextlib.contextmanager
    def started(self, restarts: int = 0) -> Iterator[Server]:
        """Start the server and wait until its models are loaded. End it when the block ends. Raises ServerError.
        `restarts` is how often it was started before."""
        options, ports = self.options, self.ports
        tls = self._tls_again() if restarts else self.tls
        heartbeats = Path(tempfile.mkdtemp(prefix="heartbeats-", dir=self.workspace))
        log = None if options.verbose else options.log or self.workspace / "tritonserver.log"
        unencrypted = unencrypted_address(self.address, has_tls=tls is not None)
        endpoint = HealthEndpoint(
            grpc=f"{self.address.to_ask.in_url}:{ports.grpc}",
            http=f"http://{unencrypted.to_ask.in_url}:{ports.http}" if ports.http and not tls else None,
            tls=tls.own.load() if tls else None,
            tls_ends=tls.ends if tls else None,
        )
        with contextlib.ExitStack() as stack:
            request_log = stack.enter_context(self._request_log())
            program = self._program(heartbeats, restarts, request_log, tls)
            process = stack.enter_context(running_program(program, log, self.mark))
            name = Path(program.arguments[0]).name
            waiting = Waiting(
                process=process,
                program=name,
                listening=[
                    ((self.address if interface == "grpc" else unencrypted).to_ask.text, port)
                    for interface, port in vars(ports).items()
                    if port is not None
                ],
                endpoint=endpoint,
                steps=self.deployment.steps,
                timeout_s=options.ready_timeout_s,
                mark=self.mark,
            )
            try:
                models = wait_until_ready(waiting)
            except NotReady as error:
                raise ServerError(f"serving {options.repository}: {error}{_tail(log)}") from error
            self._check(models, log)
            yield Server(
                grpc_url=f"{self.address.in_url}:{ports.grpc}",
                http_url=f"http://{unencrypted.in_url}:{ports.http}" if ports.http else None,
                metrics_url=f"http://{unencrypted.in_url}:{ports.metrics}/metrics",
                models=models,
                process=process,
                program=name,
                world_size=self.launch.world_size,
                log=log,
                mark=self.mark,
                heartbeats=heartbeats,
                endpoint=endpoint,
                tls=None if tls is None else "mutual" if tls.trusted else "server",
                own_tls=None if tls is None else tls.own,
            )

    def _tls_again(self) -> CheckedTls | None:
        """The certificates as they lie there when the server is started again: they may have been renewed. Raises
        ServerError."""
        if self.options.tls is None:
            return None
        try:
            return check_server_tls(self.options.tls, self.options.host, self.workspace)
        except TlsError as error:
            raise ServerError(f"serving {self.options.repository}: {error}") from error

    @contextlib.contextmanager
    def _request_log(self) -> Iterator[int | None]:
        """The open file that gets a line for each request, if one is asked for."""
        path = self.options.request_log
        if path is None:
            yield None
        elif str(path) == "-":
            descriptor = os.dup(sys.stdout.fileno())
            try:
                yield descriptor
            finally:
                os.close(descriptor)
        else:
            with open_log(path, "opening the request log", ServerError) as descriptor:
                yield descriptor

    def _program(self, heartbeats: Path, restarts: int, request_log: int | None, tls: CheckedTls | None) -> Program:
        # `Server.drain` cannot see the requests of models without heartbeats. For those, the server itself waits.
        exit_timeout_s = DRAIN_TIMEOUT_S if self.deployment.beats else math.ceil(self.options.drain_timeout_s)
        ranks = [
            [
                *server_arguments(
                    self.installation,
                    self._plain_repository(),
                    memory_prefix=f"{self.mark}{rank}_",
                    exit_timeout_s=exit_timeout_s,
                ),
                *(() if rank else endpoint_arguments(self.address, self.ports, tls)),
            ]
            for rank in range(self.launch.world_size)
        ]
        # mpirun passes no open file on. It runs engines of TensorRT-LLM, whose requests are not logged.
        inherited = () if request_log is None or self.launch.mpirun is not None else (request_log,)
        named = {REQUEST_LOG_VARIABLE: str(request_log)} if inherited else {}
        return Program(
            arguments=self.launch.command(ranks, num_gpus=self.num_gpus),
            environment={
                **self.installation.environment(),
                **self.launch.environment(),
                FOLDER_VARIABLE: str(heartbeats),
                RESTARTS_VARIABLE: str(restarts),
                **named,
            },
            folder=packages_folder(),
            is_launcher=self.launch.mpirun is not None,
            end_timeout_s=exit_timeout_s,
            stack_bytes=STACK_BYTES,
            inherited=inherited,
        )

    def _plain_repository(self) -> Path:
        """The repository's path, or that of a link to it if Triton's Python backend cannot use the path."""
        repository = self.options.repository.resolve()
        if is_plain(repository):
            return repository
        link = self.workspace / "repository"
        if not link.is_symlink():
            link.symlink_to(repository)
        return link

    def _check(self, models: tuple[ModelState, ...], log: Path | None) -> None:
        """Raise ServerError if no model is ready other than steps of an ensemble. Warn of each model that is not
        ready."""
        away = [model for model in models if not model.ready]
        failed = [f"{model.name} is {model.state}" + (f": {model.words}" if model.reason else "") for model in away]
        if not any(model.ready for model in models if model.name not in self.deployment.steps):
            known = away and all(model.own_words for model in away)
            tail = "" if known else _tail(log)  # a log says no more than our own words
            raise ServerError(f"serving {self.options.repository}: no model is ready:{listing(failed)}{tail}")
        for problem in failed:
            logger.warning("%s", problem)


@contextlib.contextmanager
def prepared(options: ServerOptions) -> Iterator[Preparation]:
    """Check everything that can be checked before a server starts, and make its workspace. Raises as running_server."""
    _check_times(options)
    check_repository(options.repository)
    deployment = read_deployment(options.repository)
    check_kernels(deployment)
    for model, failure in deployment.failed.items():
        logger.warning("the engine of %s failed its last verification: %s", model, failure)
    launch = plan_launch(options.repository, deployment, world_size=options.world_size, multi_model=options.multi_model)
    address = resolve_host(options.host)
    ports = choose_ports(address, options.ports, http=options.http, has_tls=options.tls is not None)
    mark = f"moeship_{secrets.token_hex(8)}_"
    with private_workspace(mark) as workspace:
        tls = check_server_tls(options.tls, options.host, workspace) if options.tls else None
        installation = find_installation(workspace)
        # If no model needs a GPU, nvidia-smi is not run.
        machine = read_machine() if deployment.gpu_models else Machine(gpus=None)
        check_machine(deployment, machine, installation.backends, launch.world_size)
        if not address.is_loopback:
            version = read_version(installation, workspace, mark)
            refuse_known_holes(version, address, accepted=options.accept_known_vulnerabilities)
            if tls is not None:
                own = unencrypted_address(address, has_tls=True).text
                logger.info("HTTP and metrics listen on %s only: Triton encrypts gRPC alone", own)
        yield Preparation(
            options=options,
            deployment=deployment,
            launch=launch,
            address=address,
            ports=ports,
            installation=installation,
            num_gpus=len(machine.gpus or ()),
            workspace=workspace,
            mark=mark,
            tls=tls,
        )


def _check_times(options: ServerOptions) -> None:
    if not 0 < options.ready_timeout_s < math.inf:
        raise ServerError(
            f"serving {options.repository}: the ready timeout is {options.ready_timeout_s} s, expected a finite number "
            "above 0"
        )
    if not 0 <= options.drain_timeout_s < math.inf:
        raise ServerError(
            f"serving {options.repository}: the drain timeout is {options.drain_timeout_s} s, expected a finite number "
            "of 0 or more"
        )


def _tail(log: Path | None) -> str:
    """The last lines of a log, which may be large or absent."""
    try:
        if log is None or not log.is_file():
            return ""
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - LOG_TAIL_BYTES))
            text = file.read(LOG_TAIL_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return ""
    lines = text.splitlines()[-LOG_TAIL_LINES:]
    return "\n  the end of its log:" + "".join(f"\n    {line}" for line in lines) if lines else ""
