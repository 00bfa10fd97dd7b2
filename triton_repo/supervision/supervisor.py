"""Keeps a server running: starts it, watches it, and starts it again on the same ports where it died or hangs.

    supervise(options, RestartPolicy(), reporter)      # returns when it is interrupted

Before a server is started again the repository is looked at: a file that is missing, or not what was packaged, would
end the next server as well, so that it is named and nothing is started.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Set
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from export.checkpoint_files import TOKENIZER_FILE
from export.errors import MoeshipError, listing
from export.tokenizer import load_tokenizer
from triton_repo.contracts.model_parameters import TextParameters
from triton_repo.contracts.seal import is_sealed
from triton_repo.errors import RepositoryError, ServerError
from triton_repo.packaging.engine_facts import read_engine_facts
from triton_repo.serving.repository_check import check_repository
from triton_repo.serving.server import Server, ServerOptions, prepared
from triton_repo.supervision.watch import Limits, Watch
from trt_build.manifest import MANIFEST_FILE

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RestartPolicy:
    """A server is started again up to `max_restarts` times, after 1, 2, 4 ... seconds, `longest_pause_s` at most. The
    count begins anew where a server was healthy for `healthy_s` seconds.
    """

    max_restarts: int = 5
    first_pause_s: float = 1.0
    longest_pause_s: float = 30.0
    healthy_s: float = 300.0
    limits: Limits = field(default_factory=Limits)

    def pause_s(self, restart: int) -> float:
        """The pause before a restart; the first is number 1."""
        doublings = min(restart - 1, 30)
        return min(self.first_pause_s * 2.0**doublings, self.longest_pause_s)


class Reporter(Protocol):
    """Who is told what happens."""

    def ready(self, server: Server, restarts: int) -> None:
        """The server answers, after so many restarts."""

    def failed(self, fault: str, restart: int, pause_s: float) -> None:
        """The server has failed and was ended; it is started again after a pause."""

    def draining(self, timeout_s: float) -> None:
        """No more requests are taken; those that are computed have so long to finish."""


def supervise(options: ServerOptions, policy: RestartPolicy, reporter: Reporter) -> None:
    """Serve until interrupted. A first KeyboardInterrupt drains the server, a second ends it at once; both are passed
    on.

    Raises what running_server raises where the server does not start, ServerError where it failed more often than the
    policy allows, and RepositoryError where an engine's files are damaged.
    """
    with prepared(options) as preparation:
        restarts, unserved = 0, frozenset[str]()
        while True:
            tail = ""
            try:
                with preparation.started() as server:
                    began = time.monotonic()
                    # First, so that what dies as soon as others know of the server is seen.
                    watch = Watch(server, policy.limits)
                    if not restarts:
                        unserved = frozenset(model.name for model in server.models if not model.ready)
                    reporter.ready(server, restarts)
                    fault = _wait(watch, server, reporter, options.drain_timeout_s)
                    tail = server.log_tail()
                    server.kill()
                if time.monotonic() - began >= policy.healthy_s:
                    restarts = 0
            except ServerError as error:
                if not restarts:
                    raise
                fault, _, tail = str(error).removeprefix(f"serving {options.repository}: ").partition("\n")
                tail = f"\n{tail}" if tail else ""
            _refuse_damaged(options.repository, fault, unserved)
            if restarts >= policy.max_restarts:
                raise ServerError(f"serving {options.repository}: {fault}{_given_up(policy.max_restarts)}{tail}")
            restarts += 1
            reporter.failed(fault, restarts, policy.pause_s(restarts))
            time.sleep(policy.pause_s(restarts))


def _wait(watch: Watch, server: Server, reporter: Reporter, drain_timeout_s: float) -> str:
    """What failed. When interrupted, drain the server first."""
    try:
        return watch.wait()
    except KeyboardInterrupt:
        reporter.draining(drain_timeout_s)
        try:
            if not server.drain(drain_timeout_s):
                logger.warning("requests were still being answered after %g s; they are cut off", drain_timeout_s)
        except KeyboardInterrupt:
            server.kill()
        raise


def _given_up(restarts: int) -> str:
    return f"; it was started again {restarts} times, and is not any more" if restarts else ""


def _refuse_damaged(repository: Path, fault: str, unserved: Set[str]) -> None:
    """Raise RepositoryError naming the files of the repository that are not what was packaged: what is missing, what
    tokenizers cannot be read, and what engines hold. Digests are computed only where a file's size, time or inode
    changed. Models that were not served are passed over: the others were served without them."""
    engines = [folder for folder in _folders_of(repository, f"*/{MANIFEST_FILE}") if _model_of(folder) not in unserved]
    damaged = [problem for engine in engines if (problem := _damage(engine))]
    tokenizers = _folders_of(repository, f"{TextParameters.tokenizer}/{TOKENIZER_FILE}")
    checks: list[Callable[[], object]] = [
        partial(load_tokenizer, folder) for folder in tokenizers if _model_of(folder) not in unserved
    ]
    checks.append(partial(check_repository, repository))
    missing = [problem for check in checks if (problem := _problem(check))]
    if damaged or missing:
        what = "an engine's files are damaged" if damaged else "files that it needs are missing or damaged"
        raise RepositoryError(
            f"serving {repository}: {fault}, and it is not started again: {what}; package the engine again:"
            f"{listing([*damaged, *missing])}"
        )


def _folders_of(repository: Path, pattern: str) -> list[Path]:
    """The folders of the files that match a pattern below the models' versions."""
    return [path.parent for path in sorted(repository.glob(f"[!.]*/[0-9]*/{pattern}"))]


def _model_of(folder: Path) -> str:
    """The model whose version's folder holds this one."""
    return folder.parents[1].name


def _damage(engine: Path) -> str | None:
    return None if is_sealed(engine) else _problem(partial(read_engine_facts, engine))


def _problem(check: Callable[[], object]) -> str | None:
    """The message of the error that `check` raises; None where it raises none."""
    try:
        check()
    except MoeshipError as error:
        return str(error)
    return None
