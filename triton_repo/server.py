"""Model repository in, running tritonserver out; stopped again, with every process of it, when the block ends.

    with running_server(ServerOptions(repository=Path("repository"))) as server:
        print(server.grpc_url, server.http_url, server.metrics_url, server.models)

The server is told the whole truth in config.pbtxt (no auto-completion), goes on when a model does not load, and
listens on this machine alone unless told otherwise. A model that runs on several GPUs has a server on each, started by
mpirun (mpi.py), of which the first answers. `processes.py` says how they end.
"""

from __future__ import annotations

import contextlib
import logging
import math
import secrets
import subprocess
import tempfile
import time
from collections.abc import Iterator, Set
from dataclasses import dataclass, field, replace
from pathlib import Path

from export.errors import listing
from triton_repo.deployment import read_deployment
from triton_repo.errors import ServerError
from triton_repo.health import ModelState, is_listening, model_states
from triton_repo.installation import Installation, find_installation, packages_folder
from triton_repo.machine import check_machine
from triton_repo.mpi import plan_launch
from triton_repo.ports import ChosenPorts, Ports, choose_ports
from triton_repo.processes import DRAIN_TIMEOUT_S, POLL_INTERVAL_S, Program, running_program
from triton_repo.repository import check_repository
from trt_build.machine import Machine, read_machine

logger = logging.getLogger(__name__)

LOCALHOST = "127.0.0.1"
LOG_TAIL_LINES = 15


@dataclass(frozen=True, kw_only=True)
class ServerOptions:
    """`log`: a file for the server's log; None keeps it until the server ends. `verbose` sends it to stderr instead.

    `world_size`: ranks of a model that runs on several GPUs; None takes what the repository says. `multi_model` serves
    several TensorRT-LLM models, in orchestrator mode.
    """

    repository: Path
    host: str = LOCALHOST
    ports: Ports = field(default_factory=Ports)
    ready_timeout_s: float = 600
    log: Path | None = None
    verbose: bool = False
    world_size: int | None = None
    multi_model: bool = False


@dataclass(frozen=True, kw_only=True)
class Server:
    """A server that answers. Urls are host:port for gRPC and http://host:port[/path] for the others. `process` runs
    `program`, the tritonserver, or watches over it, the mpirun that started `world_size` of them.
    """

    grpc_url: str
    http_url: str
    metrics_url: str
    models: tuple[ModelState, ...]
    process: subprocess.Popen[bytes]
    program: str
    world_size: int
    log: Path | None

    def log_tail(self) -> str:
        """The last lines of the server's log, indented; empty where it goes to stderr."""
        return _tail(self.log)


@contextlib.contextmanager
def running_server(options: ServerOptions) -> Iterator[Server]:
    """Start a server and wait until its models are loaded; stop it when the block ends.

    Raises RepositoryError for a repository that cannot be served, MissingPackageError without a tritonserver, and
    ServerError for a port in use, what this machine cannot run, a server that ends or takes too long, and when no
    model at all is ready.
    """
    if not 0 < options.ready_timeout_s < math.inf:
        raise ServerError(
            f"serving {options.repository}: the ready timeout is {options.ready_timeout_s} s, expected a finite number "
            "above 0"
        )
    check_repository(options.repository)
    deployment = read_deployment(options.repository)
    launch = plan_launch(options.repository, deployment, world_size=options.world_size, multi_model=options.multi_model)
    ports = choose_ports(options.host, options.ports)
    with tempfile.TemporaryDirectory(prefix="moeship-serve-") as workspace_name:
        workspace = Path(workspace_name)
        installation = find_installation(workspace)
        # Where no model needs a GPU, none is asked for.
        machine = read_machine() if deployment.gpu_models else Machine(gpus=None)
        check_machine(deployment, machine, installation.backends, launch.world_size)
        log = None if options.verbose else options.log or workspace / "tritonserver.log"
        mark = f"moeship_{secrets.token_hex(8)}_"
        ranks = [
            [*_arguments(installation, options, f"{mark}{rank}_"), *(() if rank else _endpoints(options.host, ports))]
            for rank in range(launch.world_size)
        ]
        program = Program(
            arguments=launch.command(ranks, num_gpus=len(machine.gpus or ())),
            environment={**installation.environment(), **launch.environment()},
            folder=packages_folder(),
            is_launcher=launch.mpirun is not None,
        )
        with running_program(program, log, mark) as process:
            server = Server(
                grpc_url=f"{options.host}:{ports.grpc}",
                http_url=f"http://{options.host}:{ports.http}",
                metrics_url=f"http://{options.host}:{ports.metrics}/metrics",
                models=(),
                process=process,
                program=Path(program.arguments[0]).name,
                world_size=launch.world_size,
                log=log,
            )
            yield _when_ready(server, options, ports, deployment.steps)


def _arguments(installation: Installation, options: ServerOptions, memory_prefix: str) -> list[str]:
    """The program and what every rank is told."""
    backends = [f"--backend-directory={installation.backends}"] if installation.backends else []
    return [
        str(installation.program),
        f"--model-repository={options.repository.resolve()}",
        *backends,
        "--disable-auto-complete-config",
        f"--exit-timeout-secs={DRAIN_TIMEOUT_S}",
        f"--backend-config=python,shm-region-prefix-name={memory_prefix}",
    ]


def _endpoints(host: str, ports: ChosenPorts) -> list[str]:
    """What the rank is told that answers: a model that does not load leaves the others."""
    return [
        "--exit-on-error=false",
        f"--grpc-address={host}",
        f"--grpc-port={ports.grpc}",
        f"--http-address={host}",
        f"--http-port={ports.http}",
        "--allow-metrics=true",
        f"--metrics-address={host}",
        f"--metrics-port={ports.metrics}",
    ]


def _when_ready(server: Server, options: ServerOptions, ports: ChosenPorts, steps: Set[str]) -> Server:
    """Wait until every model was loaded or refused. Raises ServerError unless one is ready that is more than a step of
    another."""
    # A server that listens on every address is asked through this machine's own.
    host = LOCALHOST if options.host == "0.0.0.0" else options.host
    deadline = time.monotonic() + options.ready_timeout_s
    while not all(is_listening(host, port) for port in vars(ports).values()):
        if server.process.poll() is not None:
            raise ServerError(
                f"serving {options.repository}: {server.program} ended with status {server.process.returncode} before "
                f"it was ready{server.log_tail()}"
            )
        if time.monotonic() > deadline:
            raise ServerError(
                f"serving {options.repository}: {server.program} was still loading models after "
                f"{options.ready_timeout_s:g} s; allow more time, or look at its log{server.log_tail()}"
            )
        time.sleep(POLL_INTERVAL_S)
    models = model_states(f"http://{host}:{ports.http}")
    failed = [
        f"{model.name} is {model.state}" + (f": {model.reason}" if model.reason else "")
        for model in models
        if not model.ready
    ]
    if not any(model.ready for model in models if model.name not in steps):
        raise ServerError(f"serving {options.repository}: no model is ready:{listing(failed)}{server.log_tail()}")
    for problem in failed:
        logger.warning("%s", problem)
    return replace(server, models=models)


def _tail(log: Path | None) -> str:
    if log is None or not log.is_file():
        return ""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:]
    return "\n  the end of its log:" + "".join(f"\n    {line}" for line in lines)
