"""Computes the logits of a text in a separate process that loads one library: `python -m decode.logits ORDER FILE`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from decode.contenders import Llama, Task, load
from decode.worker import task_as_json, task_from_json

_BENCHMARKS = Path(__file__).resolve().parent.parent


def logits_of(task: Task, tokens: Sequence[int]) -> dict[str, npt.NDArray[np.float32]]:
    """The logits [S, V] of `tokens` decoded one by one, and the logits [1, V] of the last token if they are run as one
    prompt."""
    order = {"task": task_as_json(task), "tokens": list(tokens)}
    with tempfile.TemporaryDirectory() as folder:
        answer = Path(folder) / "logits.npz"
        command = [sys.executable, "-m", "decode.logits", json.dumps(order), str(answer)]
        # Without this variable ggml starts a debugger when it aborts.
        environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
        done = subprocess.run(command, cwd=_BENCHMARKS, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise AssertionError(f"{task.contender} {dict(task.settings)} gave no logits: {done.stderr.strip()[-600:]}")
        return dict(np.load(answer))


def main() -> None:
    order: dict[str, Any] = json.loads(sys.argv[1])
    contender = load(task_from_json(order["task"]))
    assert isinstance(contender, Llama)
    singly = [contender.logits([token]).copy() for token in order["tokens"]]
    contender.forget()
    np.savez(sys.argv[2], **{"decoded": np.stack(singly), "as a prompt": contender.logits(order["tokens"])[None]})


if __name__ == "__main__":
    main()
