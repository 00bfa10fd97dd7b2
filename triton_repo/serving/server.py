"""Model repository in, running tritonserver out; stopped again, with every process of it, when the block ends.

    with running_server(ServerOptions(repository=Path("repository"))) as server:
        print(server.grpc_url, server.http_url, server.metrics_url, server.models)

The server is told the whole truth in config.pbtxt (no auto-completion), goes on when a model does not load, and
listens on this machine alone unless told otherwise. A model that runs on several GPUs has a server on each, started by
mpirun (mpi.py), of which the first answers. `processes/program.py` says how they end, `supervision/` starts them again.
"""

from __future__ import annotations

import contextlib
import logging
import math
import secrets
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from export.errors import listing
from triton_repo.contracts.model_state import ModelState
from triton_repo.errors import ServerError
from triton_repo.processes.heartbeat import FOLDER_VARIABLE, announce_drain, read_beats
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
from triton_repo.serving.machine_fit import check_machine
from triton_repo.serving.mpi import Launch, plan_launch
from triton_repo.serving.ports import Address, ChosenPorts, Ports, choose_ports, resolve_host
from triton_repo.serving.readiness import NotReady, Waiting, wait_until_ready
from triton_repo.serving.repository_check import check_repository
from triton_repo.serving.vulnerabilities import read_version, refuse_known_holes
from trt_build.machine import Machine, read_machine

logger = logging.getLogger(__name__)

LOCALHOST = "127.0.0.1"
LOG_TAIL_LINES, LOG_TAIL_BYTES = 15, 1 << 16
DEFAULT_DRAIN_TIMEOUT_S = 30.0
# What the engine's last tokens have to pass the step behind it and reach their clients.
SETTLE_S = 0.5

# Triton's HTTP puts parts of a request on its thread's stack before it looks at them: twice the body where that calls
# itself a form, as curl -d and urllib do (libevhtp, evhtp_parse_query_wflags), and 16 bytes a chunk. On the usual 8 MiB
# a body of 4.2 MB ends the server (triton-inference-server/server#5840). A stack takes memory as it is used.
STACK_BYTES = 256 << 20


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """`host`: a name or an address of this machine. `http` False leaves gRPC and the metrics. `log`: a file for the
    server's log; None keeps it until the server ends. `verbose` sends it to stderr instead.

    `world_size`: ranks of a model that runs on several GPUs; None takes what the repository says. `multi_model` serves
    several TensorRT-LLM models, in orchestrator mode. `accept_known_vulnerabilities` lets a tritonserver with known
    holes listen beyond this machine.
    """

    repository: Path
    host: str = LOCALHOST
    ports: Ports = field(default_factory=Ports)
    http: bool = True
    ready_timeout_s: float = 600
    drain_timeout_s: float = DEFAULT_DRAIN_TIMEOUT_S
    log: Path | None = None
    verbose: bool = False
    world_size: int | None = None
    multi_model: bool = False
    accept_known_vulnerabilities: bool = False


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server that answers. Urls are host:port for gRPC and http://host:port[/path] for the others; `http_url` is None
    where HTTP is off. `process` runs `program`, the tritonserver, or watches over it, the mpirun that started
    `world_size` of them. Its processes bear `mark`, and its models beat in the folder `heartbeats`. `endpoint` is where
    this machine asks for its health.
    """

    grpc_url: str
    http_url: str | None
    metrics_url: str
    models: tuple[ModelState, ...]
    process: subprocess.Popen[bytes]
    program: str
    world_size: int
    log: Path | None
    mark: str
    heartbeats: Path
    endpoint: HealthEndpoint

    def log_tail(self) -> str:
        """The last lines of the server's log, indented; empty where it goes to stderr."""
        return _tail(self.log)

    def kill(self) -> None:
        """End every process of the server at once."""
        kill_left(self.process.pid, self.mark)
        self.process.wait()

    def drain(self, timeout_s: float) -> bool:
        """Have the models refuse what waits and what comes, and wait until nothing is computed any more; whether that
        was so within the time."""
        announce_drain(self.heartbeats)
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
    """Start a server and wait until its models are loaded; stop it when the block ends.

    Raises RepositoryError for a repository that cannot be served, MissingPackageError without a tritonserver, and
    ServerError for a port in use, what this machine cannot run, a server that ends or takes too long, one with known
    holes that others could reach, and when no model at all is ready.
    """
    with prepared(options) as preparation, preparation.started() as server:
        yield server


@dataclass(frozen=True, kw_only=True)
class Preparation:
    """All that is decided before a server starts, and stays when it is started again: its ports among it."""

    options: ServerOptions
    deployment: Deployment
    launch: Launch
    address: Address
    ports: ChosenPorts
    installation: Installation
    num_gpus: int
    workspace: Path
    mark: str

    @contextlib.contextmanager
    def started(self) -> Iterator[Server]:
        """Start the server, wait until its models are loaded, and end it when the block ends. Raises ServerError."""
        options, ports = self.options, self.ports
        heartbeats = Path(tempfile.mkdtemp(prefix="heartbeats-", dir=self.workspace))
        program = self._program(heartbeats)
        log = None if options.verbose else options.log or self.workspace / "tritonserver.log"
        own, asked = self.address.in_url, self.address.to_ask.in_url
        endpoint = HealthEndpoint(
            grpc=f"{asked}:{ports.grpc}", http=f"http://{asked}:{ports.http}" if ports.http else None
        )
        with running_program(program, log, self.mark) as process:
            name = Path(program.arguments[0]).name
            waiting = Waiting(
                process=process,
                program=name,
                address=self.address,
                ports=ports,
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
                grpc_url=f"{own}:{ports.grpc}",
                http_url=f"http://{own}:{ports.http}" if ports.http else None,
                metrics_url=f"http://{own}:{ports.metrics}/metrics",
                models=models,
                process=process,
                program=name,
                world_size=self.launch.world_size,
                log=log,
                mark=self.mark,
                heartbeats=heartbeats,
                endpoint=endpoint,
            )

    def _program(self, heartbeats: Path) -> Program:
        # Requests of models that do not beat are waited for by the server itself.
        exit_timeout_s = DRAIN_TIMEOUT_S if self.deployment.beats else math.ceil(self.options.drain_timeout_s)
        ranks = [
            [
                *server_arguments(
                    self.installation,
                    self._plain_repository(),
                    memory_prefix=f"{self.mark}{rank}_",
                    exit_timeout_s=exit_timeout_s,
                ),
                *(() if rank else endpoint_arguments(self.address, self.ports)),
            ]
            for rank in range(self.launch.world_size)
        ]
        return Program(
            arguments=self.launch.command(ranks, num_gpus=self.num_gpus),
            environment={
                **self.installation.environment(),
                **self.launch.environment(),
                FOLDER_VARIABLE: str(heartbeats),
            },
            folder=packages_folder(),
            is_launcher=self.launch.mpirun is not None,
            end_timeout_s=exit_timeout_s,
            stack_bytes=STACK_BYTES,
        )

    def _plain_repository(self) -> Path:
        """The repository's path, or a link to it where Triton's Python backend could not take its path."""
        repository = self.options.repository.resolve()
        if is_plain(repository):
            return repository
        link = self.workspace / "repository"
        if not link.is_symlink():
            link.symlink_to(repository)
        return link

    def _check(self, models: tuple[ModelState, ...], log: Path | None) -> None:
        """Raise ServerError unless a model is ready that is more than a step of another; name those that are not."""
        failed = [
            f"{model.name} is {model.state}" + (f": {model.reason}" if model.reason else "")
            for model in models
            if not model.ready
        ]
        if not any(model.ready for model in models if model.name not in self.deployment.steps):
            raise ServerError(f"serving {self.options.repository}: no model is ready:{listing(failed)}{_tail(log)}")
        for problem in failed:
            logger.warning("%s", problem)


@contextlib.contextmanager
def prepared(options: ServerOptions) -> Iterator[Preparation]:
    """Check everything that can be checked before a server starts, and make its folder. Raises as running_server."""
    _check_times(options)
    check_repository(options.repository)
    deployment = read_deployment(options.repository)
    launch = plan_launch(options.repository, deployment, world_size=options.world_size, multi_model=options.multi_model)
    address = resolve_host(options.host)
    ports = choose_ports(address, options.ports, http=options.http)
    mark = f"moeship_{secrets.token_hex(8)}_"
    with private_workspace(mark) as workspace:
        installation = find_installation(workspace)
        # Where no model needs a GPU, none is asked for.
        machine = read_machine() if deployment.gpu_models else Machine(gpus=None)
        check_machine(deployment, machine, installation.backends, launch.world_size)
        if not address.is_loopback:
            version = read_version(installation, workspace, mark)
            refuse_known_holes(version, address, accepted=options.accept_known_vulnerabilities)
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
    """Of a log that may have grown for months, or have gone."""
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
