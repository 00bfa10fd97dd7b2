"""Run Triton Inference Server on a model repository until it is interrupted.

Prints the addresses once the models are loaded. If a port is not given, a free one is taken. If a model does not load,
its reason is printed and the other models are served; if no model loads, the exit status is 2. A model that runs on
several GPUs is started by mpirun, with one rank for each GPU.

The server and each of its processes are watched. If one dies or hangs, a line says which, and the server is started
again on the same ports. The exit status is 2 if that does not help, or if an engine's files are damaged.
Ctrl-C and SIGTERM let the requests in progress finish; a second one ends the server at once.

--json prints one line of JSON when the models are loaded. If the server is started again, two more lines follow: one
with the "event" "failed" and the reason, then one with the "event" "ready".

--openai-port also starts `moeship gateway`, which serves OpenAI's HTTP API, as a process of its own. It is started
again if it ends, and drained with the server.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import signal
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

from cli.gateway import read_files
from export.optional import require_packages
from triton_repo.contracts.tls.server import ServerTls
from triton_repo.errors import ServerError, TlsError
from triton_repo.serving.ports import Ports, check_port, resolve_host
from triton_repo.serving.server import DEFAULT_DRAIN_TIMEOUT_S, LOCALHOST, Server, ServerOptions
from triton_repo.supervision.companion import Companion
from triton_repo.supervision.supervisor import RestartPolicy, supervise

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("repository", type=Path, help="model repository, as 'moeship package' makes it")
    parser.add_argument(
        "--host", default=LOCALHOST, help=f"name or address to listen on (default {LOCALHOST}: this machine)"
    )
    for name in ("grpc", "http", "metrics"):
        parser.add_argument(f"--{name}-port", type=int, metavar="PORT", help="(default: a free one)")
    parser.add_argument("--no-http", action="store_true", help="do not listen for HTTP: only for gRPC and metrics")
    tls = parser.add_argument_group("TLS", "Triton encrypts gRPC alone: HTTP and metrics then listen on this machine")
    tls.add_argument("--tls-cert", type=Path, metavar="FILE", help="the server's certificate, then its issuers (PEM)")
    tls.add_argument("--tls-key", type=Path, metavar="FILE", help="the certificate's private key (PEM)")
    tls.add_argument(
        "--tls-client-ca", type=Path, metavar="FILE",
        help="serve only clients with a certificate that an authority of this file signed (mutual TLS)",
    )  # fmt: skip
    parser.add_argument(
        "--accept-known-vulnerabilities", action="store_true",
        help="listen beyond this machine although this tritonserver has known holes (docs/security.md)",
    )  # fmt: skip
    restarts = parser.add_mutually_exclusive_group()
    restarts.add_argument(
        "--max-restarts", type=int, default=RestartPolicy().max_restarts, metavar="N",
        help=f"most restarts of a server that died or hangs (default {RestartPolicy().max_restarts}); "
        f"the count begins again after {RestartPolicy().healthy_s:g} s of health",
    )  # fmt: skip
    restarts.add_argument(
        "--no-restart", action="store_true", help="end with exit status 2 instead, for use under another supervisor"
    )
    parser.add_argument(
        "--drain-timeout", type=float, default=DEFAULT_DRAIN_TIMEOUT_S, metavar="S",
        help="seconds for requests to finish after a request to stop "
        f"(default {DEFAULT_DRAIN_TIMEOUT_S:g})",
    )  # fmt: skip
    parser.add_argument(
        "--ready-timeout", type=float, default=600, metavar="S", help="seconds for the models to load (default 600)"
    )
    parser.add_argument(
        "--world-size", type=int, metavar="N",
        help="ranks of a model that runs on several GPUs, tp times pp (default: what the repository says)",
    )  # fmt: skip
    parser.add_argument(
        "--multi-model", action="store_true",
        help="serve several TensorRT-LLM models: one server that spawns each model's ranks (orchestrator mode)",
    )  # fmt: skip
    parser.add_argument("--log", type=Path, metavar="FILE", help="append the server's log to a file")
    parser.add_argument(
        "--request-log", type=Path, metavar="FILE",
        help="append a line of JSON for each request that has ended to a file; - is stdout",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print addresses and models as one line of JSON")
    gateway = parser.add_argument_group("OpenAI's API", "more settings: start `moeship gateway` by itself")
    gateway.add_argument("--openai-port", type=int, metavar="PORT", help="serve OpenAI's HTTP API on this port")
    gateway.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="a Jinja template to use in place of the models' own"
    )
    gateway.add_argument("--api-keys", type=Path, metavar="FILE", help="keys that its clients must give, one a line")


def read_options(arguments: argparse.Namespace) -> ServerOptions:
    """The options of the server. With -v its log goes to stderr."""
    return ServerOptions(
        repository=arguments.repository,
        host=arguments.host,
        ports=Ports(grpc=arguments.grpc_port, http=arguments.http_port, metrics=arguments.metrics_port),
        http=not arguments.no_http,
        tls=read_tls(arguments),
        ready_timeout_s=arguments.ready_timeout,
        drain_timeout_s=arguments.drain_timeout,
        log=arguments.log,
        request_log=arguments.request_log,
        verbose=arguments.log is None and logger.isEnabledFor(logging.DEBUG),
        world_size=arguments.world_size,
        multi_model=arguments.multi_model,
        accept_known_vulnerabilities=arguments.accept_known_vulnerabilities,
    )


def read_tls(arguments: argparse.Namespace) -> ServerTls | None:
    """The files of TLS; None where gRPC is not encrypted. Raises TlsError."""
    cert, key, client_ca = arguments.tls_cert, arguments.tls_key, arguments.tls_client_ca
    if cert is None and key is None and client_ca is None:
        return None
    absent = [flag for flag, file in (("--tls-cert", cert), ("--tls-key", key)) if file is None]
    if absent:
        raise TlsError(f"serving with TLS: found no {' and no '.join(absent)}; give the certificate and its key")
    return ServerTls(cert=cert, key=key, client_ca=client_ca)


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal asks to stop; returns 0. Raises ServerError if the server fails too often."""
    if arguments.max_restarts < 0:
        raise ServerError(f"serving: --max-restarts is {arguments.max_restarts}, expected 0 or more")
    policy = RestartPolicy(max_restarts=0 if arguments.no_restart else arguments.max_restarts)
    check_gateway(arguments)
    gateway = _Gateway(arguments, policy)
    # A closed terminal is a request to stop too, unless the shell was told to ignore it (nohup).
    stopping = [signal.SIGTERM] + [signal.SIGHUP] * (signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN)
    previous = {number: signal.signal(number, _interrupt) for number in stopping}
    try:
        supervise(read_options(arguments), policy, _Printer(gateway, as_json=arguments.json))
    except KeyboardInterrupt:
        gateway.stop()
        logger.info("stopped")
    finally:
        gateway.stop()
        for number, handler in previous.items():
            signal.signal(number, handler)
    return 0


def check_gateway(arguments: argparse.Namespace) -> None:
    """Raise ServerError for a port of the gateway that cannot be used, before a server is started, and for settings of
    a gateway that is not asked for; ConfigError for files of it that cannot be used, and MissingPackageError."""
    if arguments.openai_port is not None:
        modules = ("fastapi", "uvicorn", "httptools", "jinja2")
        require_packages(modules, ", ".join(modules), "the gateway", "gateway")
        check_port("openai", resolve_host(arguments.host), arguments.openai_port)
        read_files(arguments)
    elif arguments.chat_template is not None or arguments.api_keys is not None:
        raise ServerError("serving: found settings of the gateway without --openai-port; give a port for it")


class _Gateway:
    """The gateway beside the server, if one is asked for: a process of its own."""

    def __init__(self, arguments: argparse.Namespace, policy: RestartPolicy) -> None:
        self._arguments, self._policy = arguments, policy
        self._companion: Companion | None = None
        self._trusted = b""  # the server's certificate
        self.facts: dict[str, Any] = {}  # what it said when it was ready

    def start(self, server: Server) -> None:
        """Start it, unless it runs. It is started anew when the server's certificate, which it trusts, was renewed.
        Raises ServerError."""
        trusted = server.own_tls.ca.read_bytes() if server.own_tls and server.own_tls.ca else b""
        if self._companion is not None and trusted != self._trusted:
            self.stop()
            self._companion = None
        self._trusted = trusted
        if self._arguments.openai_port is not None and self._companion is None:
            self._companion = Companion(
                "the gateway",
                self._command(server),
                replace(self._policy, max_restarts=max(1, self._policy.max_restarts)),
                {"PYTHONPATH": str(Path(__file__).parents[1])},
            )
            self.facts = self._companion.start()

    def drain(self) -> None:
        if self._companion is not None:
            self._companion.drain()

    def stop(self) -> None:
        if self._companion is not None:
            self._companion.stop()

    def _command(self, server: Server) -> list[str]:
        arguments = self._arguments
        files = [
            ("--chat-template", arguments.chat_template),
            ("--api-keys", arguments.api_keys),
            ("--tls-cert", arguments.tls_cert),
            ("--tls-key", arguments.tls_key),
        ]
        own = server.own_tls
        if own is not None:
            files += [("--triton-tls-ca", own.ca), ("--triton-tls-cert", own.cert), ("--triton-tls-key", own.key)]
        return [
            # -P keeps the current folder from being searched for modules.
            *(sys.executable, "-P", "-m", "cli.main", "gateway", "--json"),
            *("--triton", server.endpoint.grpc),
            *("--host", arguments.host, "--port", str(arguments.openai_port)),
            *("--repository", str(arguments.repository.resolve())),
            *("--drain-timeout", str(max(1.0, arguments.drain_timeout))),
            *(("--triton-tls-server-name", own.server_name) if own and own.server_name else ()),
            *(word for flag, path in files if path is not None for word in (flag, str(path.resolve()))),
        ]


class _Printer:
    """Prints on stdout when the server is ready, and one line on stderr when it failed. Starts the gateway."""

    def __init__(self, gateway: _Gateway, *, as_json: bool) -> None:
        self._gateway, self._as_json = gateway, as_json

    def ready(self, server: Server, restarts: int) -> None:
        self._gateway.start(server)
        facts = {**_facts(server), **self._gateway.facts}
        if not self._as_json:
            self._print(f"answering again, restart {restarts}" if restarts else _rows(server, self._gateway.facts))
        elif restarts:
            self._print(json.dumps({"event": "ready", "restarts": restarts, **facts}))
        else:
            self._print(json.dumps(facts))

    def failed(self, fault: str, restart: int, pause_s: float) -> None:
        if self._as_json:
            self._print(json.dumps({"event": "failed", "reason": fault, "restart": restart, "pause_s": pause_s}))
        logger.warning("%s; the server is ended, and started again in %g s (restart %d)", fault, pause_s, restart)

    def draining(self, timeout_s: float) -> None:
        logger.info("stopping: no more requests are accepted; those in progress have %g s to finish", timeout_s)
        self._gateway.drain()

    def _print(self, text: str) -> None:
        """Print to stdout; do nothing if its reader has closed it."""
        try:
            print(text, flush=True)
        except BrokenPipeError:
            devnull = os.open(os.devnull, os.O_WRONLY)
            os.dup2(devnull, sys.stdout.fileno())
            os.close(devnull)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _facts(server: Server) -> dict[str, Any]:
    """The JSON values that a program needs to use a server; "http" is null if HTTP is off."""
    return {
        **_addresses(server),
        "tls": server.tls,
        "pid": server.process.pid,
        "world_size": server.world_size,
        "models": [dataclasses.asdict(model) | {"reason": model.words} for model in server.models],
    }


def _rows(server: Server, gateway: Mapping[str, Any]) -> str:
    """The server's addresses, number of ranks and states of models, as text for the terminal."""
    addresses = {**_addresses(server), **gateway}
    rows = [f"{name:<8} {address or 'off'}" for name, address in addresses.items()]
    rows += [f"tls      {_TLS[server.tls]}"] if server.tls else []
    rows += [f"ranks    {server.world_size}"] if server.world_size > 1 else []
    rows += [f"{model.name}: {model.state}{f', {model.words}' if model.reason else ''}" for model in server.models]
    return "\n".join(rows)


_TLS = {
    "server": "of gRPC: clients need --tls or --tls-ca",
    "mutual": "of gRPC, mutual: clients need --tls-ca, --tls-cert and --tls-key",
}


def _addresses(server: Server) -> dict[str, str | None]:
    return {"grpc": server.grpc_url, "http": server.http_url, "metrics": server.metrics_url}
