"""Heartbeats: a model writes a small file every half second, which says what it computes; `serve` reads the files.

In a model's process:

    heartbeat = Heartbeat.start(args["model_name"], args["model_instance_name"])
    heartbeat.on_drain(stop_taking_requests)
    heartbeat.on_end(end_requests)
    heartbeat.report(running=2, waiting=5)      # whenever these numbers change
    heartbeat.step()                            # after each step of the engine

`moeship serve` names a folder in the variable MOESHIP_HEARTBEATS of its server's environment, and reads the files with
`read_beats`. If the variable is absent, as in a tritonserver that moeship did not start, nothing is written. A file
named `draining` in the folder tells the models that the server is about to end, and one named `ending` that it waits no
longer for what they compute.

The heartbeat's thread needs the interpreter's lock for microseconds. The engine releases the lock while it computes, so
a busy model still beats and a hung one does not. Times are those of CLOCK_MONOTONIC, which all processes of a machine
share (clock_gettime(2)).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

FOLDER_VARIABLE = "MOESHIP_HEARTBEATS"
BEAT_INTERVAL_S = 0.5
_DRAINING_FILE, _ENDING_FILE = "draining", "ending"


@dataclass(frozen=True, kw_only=True)
class Beat:
    """The last heartbeat of one instance of a model."""

    pid: int
    model: str
    instance: str
    running: int  # requests that are computed
    waiting: int  # requests that wait
    steps: int  # of the engine, since the model's start
    beat_at: float  # when the file was written; seconds of CLOCK_MONOTONIC
    step_at: float  # when `steps` was last seen to grow or there was no request; seconds of CLOCK_MONOTONIC
    draining: bool  # whether the instance knows that the server is about to end

    @property
    def age_s(self) -> float:
        """Seconds since the beat."""
        return time.monotonic() - self.beat_at

    @property
    def stuck_s(self) -> float:
        """Seconds for which the engine had requests and ended no step, at the beat. 0 for a model that counts none."""
        return self.beat_at - self.step_at if self.steps else 0.0


class Heartbeat:
    """Writes the heartbeats of one instance of a model. Make it with `start`. Any thread may call the methods."""

    def __init__(self, model_name: str, instance_name: str, folder: Path | None) -> None:
        """Without a `folder` the object does nothing."""
        self._model, self._instance, self._folder = model_name, instance_name, folder
        self._running = self._waiting = self._steps = 0
        self._seen_steps, self._step_at = 0, time.monotonic()
        # What to call for each file that `serve` may make; None once it was made.
        self._callbacks: dict[str, list[Callable[[], object]] | None] = {_DRAINING_FILE: [], _ENDING_FILE: []}
        self._lock = threading.Lock()  # guards _callbacks, so that each callback is called exactly once
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        digest = hashlib.sha256(f"{model_name}/{instance_name}".encode()).hexdigest()[:16]
        self._file_name = f"{os.getpid()}-{digest}.json"

    @classmethod
    def start(cls, model_name: str, instance_name: str) -> Heartbeat:
        """Begin to beat in a daemon thread. Returns an object that does nothing if the environment names no folder or
        the folder cannot be written to."""
        named = os.environ.get(FOLDER_VARIABLE)
        heartbeat = cls(model_name, instance_name, Path(named) if named else None)
        if heartbeat._folder is not None and not heartbeat._beat():
            heartbeat._folder = None
        if heartbeat._folder is not None:
            heartbeat._thread = threading.Thread(target=heartbeat._run, name="heartbeat", daemon=True)
            heartbeat._thread.start()
        return heartbeat

    def report(self, *, running: int, waiting: int) -> None:
        """Set how many requests are computed and how many wait, for the next beat."""
        self._running, self._waiting = running, waiting

    def step(self) -> None:
        """Count a step of the engine. Costs one addition; if two threads count at the same time, one step may be
        lost."""
        self._steps += 1

    def on_drain(self, callback: Callable[[], object]) -> None:
        """Have `callback` called once, when the server is about to end. If that is known already, call it here.

        The heartbeat's thread calls it and does not beat meanwhile, so it must be quick. An exception that it raises is
        printed to stderr, which is the server's log.
        """
        self._on(_DRAINING_FILE, callback)

    def on_end(self, callback: Callable[[], object]) -> None:
        """The same, when requests that are still computed are to end."""
        self._on(_ENDING_FILE, callback)

    def _on(self, file: str, callback: Callable[[], object]) -> None:
        with self._lock:
            callbacks = self._callbacks[file]
            if callbacks is not None:
                callbacks.append(callback)
                return
        callback()

    def stop(self) -> None:
        """End the thread and remove the file, so that nobody watches this instance any more."""
        self._stopped.set()
        if self._thread is not None and self._thread is not threading.current_thread():
            self._thread.join()
        if self._folder is not None:
            with contextlib.suppress(OSError):
                (self._folder / self._file_name).unlink(missing_ok=True)

    def _run(self) -> None:
        while not self._stopped.wait(BEAT_INTERVAL_S):
            self._call_if_asked(_DRAINING_FILE)
            self._call_if_asked(_ENDING_FILE)
            self._beat()

    def _call_if_asked(self, file: str) -> None:
        assert self._folder is not None
        if self._callbacks[file] is None or not (self._folder / file).exists():
            return
        with self._lock:
            callbacks, self._callbacks[file] = self._callbacks[file], None
        for callback in callbacks or ():
            try:
                callback()
            except Exception:  # a callback's failure must not end the beats
                traceback.print_exc()

    def _beat(self) -> bool:
        """Write the file. Returns whether that was possible."""
        assert self._folder is not None
        now, steps = time.monotonic(), self._steps
        if steps != self._seen_steps or not (self._running or self._waiting):
            self._seen_steps, self._step_at = steps, now
        beat = Beat(
            pid=os.getpid(),
            model=self._model,
            instance=self._instance,
            running=self._running,
            waiting=self._waiting,
            steps=steps,
            beat_at=now,
            step_at=self._step_at,
            draining=self._callbacks[_DRAINING_FILE] is None,
        )
        partial = self._folder / f"{self._file_name}.partial"
        try:
            partial.write_text(json.dumps(asdict(beat)), encoding="utf-8")
            partial.replace(self._folder / self._file_name)
        except OSError:  # `serve` has ended and removed the folder
            return False
        return True


def read_beats(folder: Path) -> tuple[Beat, ...]:
    """The last beat of every instance, in the order of pids. A file that is not a beat is skipped."""
    beats = []
    for path in folder.glob("*.json"):
        with contextlib.suppress(OSError, ValueError, TypeError):
            beats.append(Beat(**json.loads(path.read_text(encoding="utf-8"))))
    return tuple(sorted(beats, key=lambda beat: (beat.pid, beat.instance)))


def announce_drain(folder: Path) -> None:
    """Tell the models that write to the folder that the server is about to end. Raises OSError."""
    (folder / _DRAINING_FILE).touch()


def announce_end(folder: Path) -> None:
    """Tell the models that the server waits no longer for what they compute. Raises OSError."""
    (folder / _ENDING_FILE).touch()
