"""Run Triton Inference Server on a model repository until it is interrupted.

Prints the addresses once the models are loaded. Ports that are not given are chosen free. A model that does not load
is reported with its reason and the others are served; when none loads, the exit status is 2. A model that runs on
several GPUs is started through mpirun, one rank a GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import signal
from pathlib import Path
from types import FrameType

from triton_repo.errors import ServerError
from triton_repo.ports import Ports
from triton_repo.server import LOCALHOST, Server, ServerOptions, running_server

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("repository", type=Path, help="model repository, as 'moeship package' makes it")
    parser.add_argument("--host", default=LOCALHOST, help=f"address to listen on (default {LOCALHOST}: this machine)")
    for name in ("grpc", "http", "metrics"):
        parser.add_argument(f"--{name}-port", type=int, metavar="PORT", help="(default: a free one)")
    parser.add_argument(
        "--ready-timeout", type=float, default=600, metavar="S", help="seconds the models have to load (default 600)"
    )
    parser.add_argument(
        "--world-size", type=int, metavar="N",
        help="ranks of a model that runs on several GPUs, tp times pp (default: what the repository says)",
    )  # fmt: skip
    parser.add_argument(
        "--multi-model", action="store_true",
        help="serve several TensorRT-LLM models: one server that spawns each model's ranks (orchestrator mode)",
    )  # fmt: skip
    parser.add_argument("--log", type=Path, metavar="FILE", help="add the server's log to a file")
    parser.add_argument("--json", action="store_true", help="addresses and models as one line of JSON")


def read_options(arguments: argparse.Namespace) -> ServerOptions:
    """With -v the server's log goes to stderr."""
    return ServerOptions(
        repository=arguments.repository,
        host=arguments.host,
        ports=Ports(grpc=arguments.grpc_port, http=arguments.http_port, metrics=arguments.metrics_port),
        ready_timeout_s=arguments.ready_timeout,
        log=arguments.log,
        verbose=arguments.log is None and logger.isEnabledFor(logging.DEBUG),
        world_size=arguments.world_size,
        multi_model=arguments.multi_model,
    )


def run(arguments: argparse.Namespace) -> int:
    """Returns 0 when it was asked to stop. Raises ServerError when the server ends by itself."""
    # A closed terminal is a request to stop too, unless the shell was told to ignore it (nohup).
    stopping = [signal.SIGTERM] + [signal.SIGHUP] * (signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN)
    previous = {number: signal.signal(number, _interrupt) for number in stopping}
    try:
        with running_server(read_options(arguments)) as server:
            print(_description(server, as_json=arguments.json), flush=True)
            status = server.process.wait()
            raise ServerError(
                f"serving {arguments.repository}: {server.program} ended with status {status}{server.log_tail()}"
            )
    except KeyboardInterrupt:
        logger.info("stopped")
        return 0
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _description(server: Server, *, as_json: bool) -> str:
    addresses = {"grpc": server.grpc_url, "http": server.http_url, "metrics": server.metrics_url}
    if as_json:
        models = [dataclasses.asdict(model) for model in server.models]
        return json.dumps({**addresses, "pid": server.process.pid, "world_size": server.world_size, "models": models})
    rows = [f"{name:<8} {address}" for name, address in addresses.items()]
    rows += [f"ranks    {server.world_size}"] if server.world_size > 1 else []
    rows += [f"{model.name}: {model.state}{f', {model.reason}' if model.reason else ''}" for model in server.models]
    return "\n".join(rows)
