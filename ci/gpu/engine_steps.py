"""The steps before serving: a model to try, the reference's answers, an engine in the build's stages.

Each is a command of moeship's in a process of its own, as a user would call it; what it says goes to a log, what it
found into the step's dict.
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
_MESSAGE = re.compile(r"[A-Z]\w+: ")  # as export.command writes an error's
PARITY_FAILED = 1  # exit status of a build whose engine differs from the reference
_FACTS = ("libraries", "gpu", "precision", "parallel", "flags", "max_sequence", "max_batch", "max_num_tokens")


class StepFailed(MoeshipError):  # noqa: N818 - it is a state of the run
    """A command of a step ended with an error."""

    exit_status = 1


@dataclass(frozen=True, kw_only=True)
class Build:
    """One engine to build, and the log of it; `options` are further words of build_engine.py."""

    checkpoint: Path
    engine: Path
    precision: str
    log: Path
    options: tuple[str, ...]

    def command(self, stage: str, *words: str) -> list[str]:
        """The build up to a stage; it takes up what earlier stages left."""
        return [
            *(sys.executable, str(BUILD_PROGRAM), "--backend", "tensorrt-llm", "--json"),
            *("--checkpoint", str(self.checkpoint), "--output", str(self.engine), "--precision", self.precision),
            *(*self.options, "--until", stage, *words),
        ]


def run_logged(command: Sequence[str], log: Path, allowed: Sequence[int] = (0,)) -> str:
    """Run a command, its stderr added to a log; returns its stdout. Raises StepFailed with the log's end."""
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
    """The last lines of a log from where a command of moeship's says why it ends; all of them where none does."""
    starts = [index for index, line in enumerate(lines) if _MESSAGE.match(line)]
    return "\n".join(lines[starts[-1] :] if starts else ["its end is", *lines])


def make_checkpoint(command: Sequence[str] | None, folder: Path, log: Path, found: dict[str, Any]) -> None:
    """Have a command make a checkpoint's folder, unless it is there or there is no command."""
    if command is not None and not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        run_logged(command, log)
    found["bytes"] = sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def answer_prompts(checkpoint: Path, prompts: Sequence[str], num_tokens: int, log: Path, found: dict[str, Any]) -> None:
    """The reference's greedy answers."""
    program = str(Path(__file__).with_name("reference_texts.py"))
    command = [sys.executable, program, "--tokens", str(num_tokens), "--", str(checkpoint), *prompts]
    found["answers"] = json.loads(run_logged(command, log))


def write_checkpoint(build: Build, found: dict[str, Any]) -> None:
    """TensorRT-LLM's form of the checkpoint: its bytes, and what decides them."""
    plan = _staged(build, "checkpoint")["plan"]
    names = ("quant_algo", "dtype", "group_size", "parallel", "average_bits_per_weight", "rank_bytes", "notes")
    found.update({name: plan[name] for name in names}, bytes=plan["checkpoint_bytes"])


def build_engine(build: Build, found: dict[str, Any]) -> None:
    """trtllm-build's engine: bytes of the ranks' files, flags, versions."""
    manifest = _staged(build, "engine")["engine"]
    ranks = {name: record["bytes"] for name, record in manifest["files"].items() if name.endswith(".engine")}
    found.update({name: manifest[name] for name in _FACTS}, rank_bytes=ranks, bytes=sum(ranks.values()))


def verify_engine(build: Build, num_tokens: int, found: dict[str, Any]) -> None:
    """The comparison with the reference: its figures, and in `failures` those past the precision's limits."""
    _staged(build, "verify", "--verify-tokens", str(num_tokens), allowed=(0, PARITY_FAILED))
    verification = json.loads((build.engine / MANIFEST_FILE).read_text(encoding="utf-8"))["verification"]
    if verification is None:
        raise StepFailed(f"verifying {build.engine}: the build ended without a comparison; its words: {build.log}")
    found.update(verification)


def _staged(build: Build, stage: str, *words: str, allowed: Sequence[int] = (0,)) -> dict[str, Any]:
    """Run the build up to a stage; returns the JSON that it prints."""
    printed: dict[str, Any] = json.loads(run_logged(build.command(stage, *words), build.log, allowed))
    return printed
