"""Keeps a server running: starts it, watches it, and starts it again on the same ports if it dies or hangs.

    supervise(options, RestartPolicy(), reporter)      # returns when it is interrupted

Before a server is started again the repository is checked. A file that is missing or damaged would end the next server
too, so an error names the file and no server is started.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Set
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Protocol

from export.checkpoint.file_table import TOKENIZER_FILE
from export.errors import MoeshipError, listing
from export.exporter import DATA_FILE
from export.tokenizer.loading import load_tokenizer
from triton_repo.contracts.model_parameters import TextParameters
from triton_repo.contracts.seal import is_sealed
from triton_repo.errors import RepositoryError, ServerError
from triton_repo.packaging.engine_facts import read_engine_facts
from triton_repo.serving.repository_check import check_repository
from triton_repo.serving.server import Server, ServerOptions, prepared
from triton_repo.supervision.watch import Limits, Watch
from trt_build.manifest import MANIFEST_FILE
from trt_build.ort.mapped_file import MappedFile

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class RestartPolicy:
    """How often and after what pauses a server is started again. Each pause is twice the one before."""

    max_restarts: int = 5
    first_pause_s: float = 1.0
    longest_pause_s: float = 30.0
    healthy_s: float = 300.0  # after so many healthy seconds the count of restarts begins again at 0
    limits: Limits = field(default_factory=Limits)

    def pause_s(self, restart: int) -> float:
        """The pause before a restart. The first restart is number 1."""
        doublings = min(restart - 1, 30)
        return min(self.first_pause_s * 2.0**doublings, self.longest_pause_s)


class Reporter(Protocol):
    """Is told what happens to the server."""

    def ready(self, server: Server, restarts: int) -> None:
        """The server answers. `restarts` is how often it was started again before."""

    def failed(self, fault: str, restart: int, pause_s: float) -> None:
        """The server failed and was ended. It will be started again after a pause."""

    def draining(self, timeout_s: float) -> None:
        """The server refuses further requests. Those that are computed have `timeout_s` to finish."""


def supervise(options: ServerOptions, policy: RestartPolicy, reporter: Reporter) -> None:
    """Serve until interrupted. A first KeyboardInterrupt drains the server and a second ends it at once; both are
    raised again.

    Raises what running_server raises if the server does not start, ServerError if it failed more often than the policy
    allows, and RepositoryError if files of the repository are damaged.
    """
    with prepared(options) as preparation:
        restarts = all_restarts = 0
        unserved = frozenset[str]()
        while True:
            tail = ""
            try:
                with preparation.started(all_restarts) as server:
                    began = time.monotonic()
                    # Before anyone is told of the server, so that a process that dies right afterwards is noticed.
                    watch = Watch(server, policy.limits, _mapped_weights(options.repository))
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
            all_restarts += 1
            reporter.failed(fault, restarts, policy.pause_s(restarts))
            time.sleep(policy.pause_s(restarts))


def _wait(watch: Watch, server: Server, reporter: Reporter, drain_timeout_s: float) -> str:
    """Wait for a fault and return it. On an interrupt, drain the server and raise the interrupt again."""
    try:
        return watch.wait()
    except KeyboardInterrupt:
        reporter.draining(drain_timeout_s)
        try:
            if not server.drain(drain_timeout_s):
                logger.warning("requests were still being answered after %g s; they are ended", drain_timeout_s)
        except KeyboardInterrupt:
            server.kill()
        raise


def _given_up(restarts: int) -> str:
    return f"; it was started again {restarts} times and will not be started again" if restarts else ""


def _refuse_damaged(repository: Path, fault: str, unserved: Set[str]) -> None:
    """Raise RepositoryError that names the files of the repository that are missing or not as they were packaged. An
    engine's files are hashed only if size, time or inode of one changed. Models in `unserved` are skipped, since the
    other models were served without them."""
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
            f"serving {repository}: {fault}; it is not started again, because {what}; package the engine again:"
            f"{listing([*damaged, *missing])}"
        )


def _mapped_weights(repository: Path) -> list[MappedFile]:
    """The weights that the models compute with as they lie on the disk: those of engines for the CPU. An engine that
    cannot be opened is not served."""
    found = []
    for folder in _folders_of(repository, f"*/{DATA_FILE}"):
        with suppress(MoeshipError, OSError):
            if read_engine_facts(folder, check_digests=False).provider == "cpu":
                found.append(MappedFile(folder / DATA_FILE))
    return found


def _folders_of(repository: Path, pattern: str) -> list[Path]:
    """The folders of the files that match a pattern within the version folders of the models."""
    return [path.parent for path in sorted(repository.glob(f"[!.]*/[0-9]*/{pattern}"))]


def _model_of(folder: Path) -> str:
    """The model whose version folder holds this folder."""
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
