"""Requests under way to a live Triton, and models whose answers take a while."""

from __future__ import annotations

import re
import threading
import urllib.request
from pathlib import Path

import grpc
from live_triton import LiveTriton, read

from clients.errors import without_ensemble

PATIENCE_S = 30
LONG_TOKENS = 450
# Put into the served models. Steps get so slow near the end of an answer of 600 tokens that none ends by itself while a
# test does something to it, and metrics are published ten times as often as they are.
SLOW = """
import time
from pathlib import Path
from triton_repo.runtime.reporting import metrics
from trt_build.ort import session

metrics.PUBLISH_INTERVAL_S = 0.1
step = session.Session.step


def slow(self, cache, rows, *more):
    is_long = any(cache.lengths[row.slot] > {long_tokens} for row in rows)
    time.sleep(0.5 if is_long or Path({held!r}).is_dir() else 0.01)
    return step(self, cache, rows, *more)


session.Session.step = slow
"""

_SAMPLE = re.compile(r"^(\w+)\{(.*)\} (\S+)$", re.M)
_LABEL = re.compile(r'(\w+)="([^"]*)"')


def slow_down(model: Path, held: Path = Path("/nowhere")) -> None:
    """Have a packaged model, which holds an engine, take its time: a step takes 10 ms more, and half a second where a
    sequence has more than LONG_TOKENS tokens, or while the folder `held` is there."""
    path, slow = model / "1" / "model.py", SLOW.format(long_tokens=LONG_TOKENS, held=str(held))
    path.write_text(path.read_text(encoding="utf-8").replace("\nLAST = ", f"{slow}\nLAST = "), encoding="utf-8")


def metrics_of(url: str, model: str) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Triton's page of metrics: name and labels beside the model -> value, of one model."""
    with urllib.request.urlopen(url, timeout=PATIENCE_S) as response:
        text = response.read().decode()
    found = {}
    for name, labels, value in _SAMPLE.findall(text):
        of = dict(_LABEL.findall(labels))
        if of.pop("model", None) == model:
            found[name, tuple(sorted(of.items()))] = float(value)
    return found


class Asked:
    """A request under way, whose responses are read in a thread."""

    def __init__(self, live: LiveTriton, model: str, request_id: str = "", **tensors) -> None:
        self.begun = threading.Event()
        self.responses, self.refusal = [], ""
        self.call, self._half_close = live.call(model, request_id, **tensors)
        self._thread = threading.Thread(target=self._read)
        self._thread.start()

    def _read(self) -> None:
        try:
            for message in self.call:
                self.begun.set()
                if message.error_message:
                    self.refusal = without_ensemble(message.error_message)
                    self._half_close.set()
                    continue
                self.responses.append(read(message.infer_response))
                if self.responses[-1].final:
                    self._half_close.set()
        except grpc.RpcError as error:
            self.refusal = error.code().name

    def end(self) -> dict:
        """What the answer came to, once it has ended."""
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        if self.refusal:
            return {"refusal": self.refusal}
        filled = [response for response in self.responses if response.outputs]
        tokens = [token for response in filled for token in response.outputs["token_ids"]]
        last = filled[-1].outputs
        assert last["num_output_tokens"] == [len(tokens)]
        assert [response.final for response in self.responses] == [False] * (len(self.responses) - 1) + [True]
        return {
            "reason": last["finish_reason"][0].decode(),
            "num_input": last["num_input_tokens"][0],
            "num_output": len(tokens),
            "num_responses": len(filled),
            "text": "".join(response.text for response in filled),
        }

    def wait(self, timeout_s: float) -> None:
        """Return when the answer has ended, or after so many seconds."""
        self._thread.join(timeout_s)

    def is_over(self) -> bool:
        return not self._thread.is_alive()
