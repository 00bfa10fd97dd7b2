"""Runs a batch on a Ray cluster: Ray Data hands shards of the input to tasks, which read, ask and write.

A task reads its lines from the input, sends them, and appends the answers to a file of its own in the job's folder.
Every machine must see both under the same path. Nothing but counts goes through Ray. A task that dies with its process
or machine is started again by Ray, finds the records of the attempt before it, and asks for the rest alone.
Two attempts that run at the same time, which Ray may cause where it takes a machine for dead, may both answer a line;
the output gets the first good one (`store.py`).
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clients._tritonclient import require_grpc
from clients.batch import local
from clients.batch.job import Job, Shard, shard_lines_of
from clients.batch.local import Sending
from clients.batch.store import Store, read_records
from clients.errors import BatchStopped, ClusterUnavailable
from export.errors import MoeshipError
from export.optional import optional_package

logger = logging.getLogger(__name__)

MOST_DEATHS = 8  # of one task's process or machine, after which the batch stops
CONNECT_S = 5.0
_OBJECT_STORE_BYTES = 100 << 20  # of a Ray of our own: only counts go through it
_EXTRA = "ray"
_NEXT = (
    "start a cluster (ray start --head), give its address with --ray-address, or leave it out to run on this machine"
)
_NEXT_OWN = "run the same command when this machine has processors and memory free, or leave --engine ray out"


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Which Ray runs a batch: that at `address` (HOST:PORT, ray://HOST:PORT, or auto), or one of our own on this
    machine for None; and how many tasks run at a time."""

    address: str | None
    workers: int


@dataclass(frozen=True, kw_only=True)
class _Task:
    """Answers shards in a process of Ray."""

    job: Job
    folder: Path
    sending: Sending
    retries_failed: bool

    def __call__(self, row: Mapping[str, Any]) -> dict[str, Any]:
        """Answer one shard. An error for the user is returned as a text, as Ray would wrap it."""
        shard = Shard(**{name: int(row[name]) for name in ("index", "number", "offset", "num_lines")})
        done = set(_bits(bytes(row["done"]), shard))
        counts = {True: 0, False: 0}

        def count(is_good: bool) -> None:
            counts[is_good] += 1

        try:
            if not (self.folder / "job.json").exists():
                raise BatchStopped(
                    f"answering lines from {shard.number} on at {socket.gethostname()}: there is no {self.folder}, "
                    "expected the folder of the batch; put the output, and the input, on a file system that all "
                    "machines of the cluster share"
                )
            for path in sorted(self.folder.glob(f"answers-{shard.index:012}-*.jsonl")):
                done |= {record.index for record in read_records(path) if record.is_good or not self.retries_failed}
            lines = shard_lines_of(self.job, shard)
            local.answer(self.job, self.folder, lines, done.__contains__, self.sending, count, first=shard.index)
        except (MoeshipError, OSError) as error:
            return {"good": counts[True], "failed": counts[False], "error": f"{type(error).__name__}: {error}"}
        return {"good": counts[True], "failed": counts[False], "error": ""}


def _bits(data: bytes, shard: Shard) -> Iterator[int]:
    return (shard.index + place for place in range(shard.num_lines) if data[place // 8] >> (place % 8) & 1)


def run_on_ray(
    store: Store, shards: tuple[Shard, ...], sending: Sending, cluster: Cluster, tell: Callable[[bool], None]
) -> None:
    """`local.run_local` on a Ray cluster; `tell` is called when a shard is done. Raises ClusterUnavailable,
    BatchStopped and MissingPackageError."""
    rows = _rows(store, shards)
    if not rows:
        return
    with _connected(cluster):
        import ray.data
        import ray.exceptions

        context = ray.data.DataContext.get_current()
        context.enable_progress_bars = context.print_on_execution_start = False
        if not logger.isEnabledFor(logging.DEBUG):
            logging.getLogger("ray.data").setLevel(logging.ERROR)  # it tells of each execution
        task = _Task(job=store.job, folder=store.folder, sending=sending, retries_failed=store.retries_failed)
        made = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
            task,
            num_cpus=1,
            compute=ray.data.TaskPoolStrategy(size=cluster.workers),
            ray_remote_args_fn=lambda: {"max_retries": MOST_DEATHS},
        )
        try:
            for row in made.iter_rows():
                for is_good, name in ((True, "good"), (False, "failed")):
                    for _ in range(int(row[name])):
                        tell(is_good)
                if row["error"]:
                    raise BatchStopped(f"answering a part of the batch on Ray: {row['error']}")
        except (ray.exceptions.RayError, *_errors_of_ray_data()) as error:
            raise BatchStopped(f"running the batch on Ray: {_lines_of(error)[-1][:600]}") from error


def _lines_of(error: Exception) -> list[str]:
    """The lines of an error's text; of one without a text, its type's name."""
    return str(error).strip().splitlines() or [type(error).__name__]


def _errors_of_ray_data() -> tuple[type[Exception], ...]:
    """Ray Data's errors that are none of Ray's; older releases have fewer."""
    from ray.data import exceptions

    names = ("SystemException", "ExecutionTimeoutError")
    return tuple(getattr(exceptions, name) for name in names if hasattr(exceptions, name))


def _rows(store: Store, shards: tuple[Shard, ...]) -> list[dict[str, Any]]:
    """The shards that have lines without an answer, and a bit for each line that has one."""
    rows = []
    index = store.index()
    try:
        for shard in shards:
            bits = bytearray(-(-shard.num_lines // 8))
            left = 0
            for place in range(shard.num_lines):
                if index.is_done(shard.index + place):
                    bits[place // 8] |= 1 << (place % 8)
                else:
                    left += 1
            if left:
                rows.append({**vars(shard), "done": bytes(bits)})
    finally:
        index.close()
    return rows


@contextmanager
def _connected(cluster: Cluster) -> Iterator[None]:
    """Connect this process to the cluster. Raises ClusterUnavailable and MissingPackageError."""
    doing = "connecting to Ray" + (f" at {cluster.address}" if cluster.address else "")
    if cluster.address and cluster.address != "auto":
        _require_listener(cluster.address, doing)
    # A Ray that this process starts would otherwise report its use to Ray's makers.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    with optional_package("ray", "a batch with --engine ray", _EXTRA):
        import ray
        import ray.data
    own = {
        "num_cpus": cluster.workers,
        "include_dashboard": False,
        "object_store_memory": _OBJECT_STORE_BYTES,
        "_node_ip_address": "127.0.0.1",  # nobody else is meant to reach it
    }
    try:
        ray.init(
            address=cluster.address or "local", log_to_driver=False, logging_level="warning",
            **({} if cluster.address else own),
        )  # fmt: skip
    except Exception as error:  # of no class of its own where a process of Ray did not start in time
        ray.shutdown()  # of the processes that did
        raise ClusterUnavailable(
            f"{doing}: {_lines_of(error)[0][:400]}; {_NEXT if cluster.address else _NEXT_OWN}"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


def _require_listener(address: str, doing: str) -> None:
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if not host or not port.isascii() or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ClusterUnavailable(f"{doing}: expected HOST:PORT, ray://HOST:PORT, or auto")
    advice = "start a cluster (ray start --head), give its address, or leave --ray-address out to run on this machine"
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_S).close()
    except OSError as error:
        raise ClusterUnavailable(f"{doing}: nothing answers there ({error}); {advice}") from error
    # Ray itself would try for minutes. Its servers speak gRPC, without TLS unless this variable says so.
    if os.environ.get("RAY_USE_TLS", "0") == "0":
        library = require_grpc()
        with library.insecure_channel(f"{host}:{port}") as channel:
            try:
                library.channel_ready_future(channel).result(timeout=CONNECT_S)
            except library.FutureTimeoutError as error:
                raise ClusterUnavailable(f"{doing}: what answers there is no Ray (no gRPC); {advice}") from error
