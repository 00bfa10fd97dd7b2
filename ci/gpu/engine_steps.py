"""The steps before serving: make a checkpoint, answer prompts with the reference, build an engine stage by stage.

Each step runs a moeship command in a separate process, as a user would. Its stderr goes to a log, its results into the
step's dict.
"""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from export.errors import MoeshipError
from trt_build.manifest import MANIFEST_FILE

ROOT = Path(__file__).resolve().parents[2]
BUILD_PROGRAM = ROOT / "trt_build" / "build_engine.py"
LOG_TAIL_LINES = 15
_MESSAGE = re.compile(r"[A-Z]\w+: ")  # beginning of an error message from export.command
PARITY_FAILED = 1  # exit status of a build whose engine differs from the reference
_FACTS = ("libraries", "gpu", "precision", "parallel", "flags", "max_sequence", "max_batch", "max_num_tokens")


class StepFailed(MoeshipError):  # noqa: N818 - it is a state of the run
    """A command of a step ended with an error."""

    exit_status = 1


@dataclass(frozen=True, kw_only=True)
class Build:
    """One engine to build, and its log file; `options` are additional flags of build_engine.py."""

    checkpoint: Path
    engine: Path
    precision: str
    log: Path
    options: tuple[str, ...]

    def command(self, stage: str, *words: str) -> list[str]:
        """The command that builds up to a stage, continuing from the output of earlier stages."""
        return [
            *(sys.executable, str(BUILD_PROGRAM), "--backend", "tensorrt-llm", "--json"),
            *("--checkpoint", str(self.checkpoint), "--output", str(self.engine), "--precision", self.precision),
            *(*self.options, "--until", stage, *words),
        ]


def run_logged(command: Sequence[str], log: Path, allowed: Sequence[int] = (0,)) -> str:
    """Run a command and append its stderr to a log; returns its stdout. Raises StepFailed with the end of the log if it
    fails."""
    with log.open("a", encoding="utf-8") as file:
        file.write(f"$ {shlex.join(command)}\n")
        file.flush()
        done = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=file, text=True, check=False
        )
    if done.returncode not in allowed:
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:]
        raise StepFailed(f"status {done.returncode}, log {log}: {_reason(lines)}")
    return done.stdout


def _reason(lines: Sequence[str]) -> str:
    """The lines of a log from the last error message of a moeship command on; all lines if there is none."""
    starts = [index for index, line in enumerate(lines) if _MESSAGE.match(line)]
    return "\n".join(lines[starts[-1] :] if starts else ["its end is", *lines])


def make_checkpoint(command: Sequence[str] | None, folder: Path, log: Path, found: dict[str, Any]) -> None:
    """Run the command that makes a checkpoint's folder, unless the folder exists or there is no command."""
    if command is not None and not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        run_logged(command, log)
    found["bytes"] = sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def answer_prompts(checkpoint: Path, prompts: Sequence[str], num_tokens: int, log: Path, found: dict[str, Any]) -> None:
    """Record the reference's greedy answers to prompts."""
    program = str(Path(__file__).with_name("reference_texts.py"))
    command = [sys.executable, program, "--tokens", str(num_tokens), "--", str(checkpoint), *prompts]
    found["answers"] = json.loads(run_logged(command, log))


def write_checkpoint(build: Build, found: dict[str, Any]) -> None:
    """Write the TensorRT-LLM checkpoint; record its bytes and the settings that decide them."""
    plan = _staged(build, "checkpoint")["plan"]
    names = ("quant_algo", "dtype", "group_size", "parallel", "average_bits_per_weight", "rank_bytes", "notes")
    found.update({name: plan[name] for name in names}, bytes=plan["checkpoint_bytes"])


def build_engine(build: Build, found: dict[str, Any]) -> None:
    """Build the engine with trtllm-build; record the bytes of the ranks' files, flags and versions."""
    manifest = _staged(build, "engine")["engine"]
    ranks = {name: record["bytes"] for name, record in manifest["files"].items() if name.endswith(".engine")}
    found.update({name: manifest[name] for name in _FACTS}, rank_bytes=ranks, bytes=sum(ranks.values()))


def verify_engine(build: Build, num_tokens: int, found: dict[str, Any]) -> None:
    """Compare the engine with the reference; record the figures, and in `failures` those past their limits."""
    _staged(build, "verify", "--verify-tokens", str(num_tokens), allowed=(0, PARITY_FAILED))
    verification = json.loads((build.engine / MANIFEST_FILE).read_text(encoding="utf-8"))["verification"]
    if verification is None:
        raise StepFailed(f"verifying {build.engine}: the build ended without a comparison; its log: {build.log}")
    found.update(verification)


def _staged(build: Build, stage: str, *words: str, allowed: Sequence[int] = (0,)) -> dict[str, Any]:
    """Run the build up to a stage; returns the JSON object that it prints."""
    printed: dict[str, Any] = json.loads(run_logged(build.command(stage, *words), build.log, allowed))
    return printed
