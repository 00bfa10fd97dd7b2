"""Requests under way to a live Triton, and models whose answers take a while."""

from __future__ import annotations

import threading
from pathlib import Path

import grpc
from live_triton import LiveTriton, read

from clients.errors import without_ensemble

PATIENCE_S = 30
# Put into the served models: a step of the engine takes 10 ms more, so that 600 tokens are under way for a while.
SLOW = """
import time
from trt_build.ort import session

step = session.Session.step


def slow(self, *given):
    time.sleep(0.01)
    return step(self, *given)


session.Session.step = slow
"""


def slow_down(model: Path) -> None:
    """Have a packaged model, which holds an engine, take its time."""
    path = model / "1" / "model.py"
    path.write_text(path.read_text(encoding="utf-8").replace("\nLAST = ", f"{SLOW}\nLAST = "), encoding="utf-8")


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
