"""What drafts gain: one engine with and without them, a few tokens by turns.

    python benchmarks/drafts.py --engine ENGINE --output RESULT.json
    python benchmarks/drafts.py --engine ENGINE --own --output RESULT.json

Both sides share a loaded session and answer the same request, eight tokens by turns, because the memory bandwidth of a
shared machine can change by half within seconds. Prompts are not timed: only what follows the first token is.

Weights drawn at random write no text that anybody would ask for, so the answers are given: every choice is computed as
for any greedy answer, and the next token of a real text is taken in its place. With `--own` a trained engine writes the
answers itself, and the two sides must write the same tokens. Scenarios:

- edit: a source file as the prompt, and the same file after a commit of this repository as the answer;
- prose: a text that goes on.

Needs the extra `bench` and, for edits, the history of this repository. Exit status 0 done, 2 wrong input.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from decode import machine
from export.command import run_command
from export.errors import ConfigError
from export.files.output import replace_file
from export.tokenizer.loading import Tokenizer, load_tokenizer
from triton_repo.runtime.batching.engine import SequenceEngine
from triton_repo.runtime.batching.memory.slots import Slots
from triton_repo.runtime.batching.outlet import Outlet
from triton_repo.runtime.batching.scheduler import Limits
from triton_repo.runtime.batching.sequence import Request
from triton_repo.runtime.options import SamplingOptions, SamplingPlan
from triton_repo.runtime.sampling import Choice, Sampler
from trt_build.ort.engine import open_engine
from trt_build.ort.session import Session

ROOT = Path(__file__).resolve().parent.parent
EDITS = (
    ("d8454a7", "export/reference/windows.py"),
    ("4161582", "triton_repo/runtime/batching/sequence.py"),
)
PROSE = ROOT / "export" / "calibration" / "texts" / "prose-english.txt"
TURN = 8  # tokens
Tokens = tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Task:
    """A prompt and the answer that is taken. An empty answer is the engine's own."""

    name: str
    prompt: Tokens
    answer: Tokens


class _Follower(Sampler):
    """Chooses greedily, and gives the next token of a text in place of what it chose."""

    def __init__(self, task: Task, num_tokens: int) -> None:
        super().__init__(SamplingPlan(options=SamplingOptions(), prompt_ids=task.prompt, end_ids=()), num_tokens)
        self._rest = iter(task.answer)

    def choose(self, logits: npt.NDArray[np.float32]) -> Choice:
        choice = super().choose(logits)
        return dataclasses.replace(choice, token_id=next(self._rest, choice.token_id))


class _Writer:
    """Collects tokens (`triton_repo.runtime.batching.sequence.Writer`)."""

    wants_prompt = wants_routing = False

    def __init__(self, task: Task, num_tokens: int, most_tokens: int) -> None:
        self.sampler = _Follower(task, num_tokens)
        self.tokens: list[int] = []
        self._most_tokens = most_tokens

    def write(self, choice: Choice) -> tuple[None, str]:
        self.tokens.append(choice.token_id)
        return None, "length" if len(self.tokens) == self._most_tokens else ""

    def cancel(self) -> None:
        """Nobody waits for a last response."""

    def take_prompt(self, log_probs: Sequence[float]) -> None:
        """The prompt's log-probabilities are not asked for."""


class _Side:
    """An engine with or without drafts, which answers one request at a time."""

    def __init__(self, session: Session, *, drafts: bool) -> None:
        self._cache = session.new_cache(1)
        slots = Slots(self._cache, self._cache.bytes_of(self._cache.positions))
        self._num_tokens = session.engine.manifest.tokenizer_size
        self.engine = SequenceEngine(
            session, self._cache, slots, num_tokens=self._num_tokens, limits=Limits(slots=1), drafts=drafts
        )
        self.seconds = 0.0
        self.writer: _Writer | None = None

    def begin(self, task: Task, most_tokens: int) -> None:
        """Compute the prompt and the first token."""
        self.seconds, self.writer = 0.0, _Writer(task, self._num_tokens, most_tokens)
        outlet: Outlet[None] = Outlet(lambda *_: None, _raise, lambda: False)
        request: Request[None] = Request(
            names=frozenset(), prompt_ids=task.prompt, most_tokens=most_tokens, writers=[self.writer], outlet=outlet
        )
        self.engine.submit(request)
        while not self.writer.tokens:
            self.engine.step()

    def turn(self) -> bool:
        """Compute steps of at least TURN tokens. Returns whether the answer goes on."""
        assert self.writer is not None
        begun, until = time.perf_counter(), len(self.writer.tokens) + TURN
        while self.engine.has_work() and len(self.writer.tokens) < until:
            self.engine.step()
        self.seconds += time.perf_counter() - begun
        return self.engine.has_work()


def _raise(error: Exception) -> None:
    raise error


def measure(session: Session, tasks: Sequence[Task], most_tokens: int, rounds: int) -> Iterator[dict[str, Any]]:
    """Each task in each round: tokens a second of both sides, their ratio, and the drafts. Sides are made anew for
    each task, so that its first round begins with nothing learnt."""
    for task in tasks:
        plain, drafted = (_Side(session, drafts=drafts) for drafts in (False, True))
        for number in range(rounds):
            before = dataclasses.replace(drafted.engine.stats)
            count = min(most_tokens, len(task.answer) or most_tokens, session.max_sequence - len(task.prompt))
            for side in (plain, drafted):
                side.begin(task, count)
            goes_on = True
            while goes_on:
                goes_on = plain.turn() | drafted.turn()
            assert plain.writer is not None
            assert drafted.writer is not None
            after = drafted.engine.stats
            yield {
                "task": task.name,
                "round": number,
                "prompt_tokens": len(task.prompt),
                "output_tokens": count,
                "plain_tokens_per_s": (count - 1) / plain.seconds,
                "drafted_tokens_per_s": (count - 1) / drafted.seconds,
                "ratio": plain.seconds / drafted.seconds,
                "drafted": after.drafted_tokens - before.drafted_tokens,
                "accepted": after.accepted_tokens - before.accepted_tokens,
                "same_tokens": plain.writer.tokens == drafted.writer.tokens,
            }


def read_tasks(tokenizer: Tokenizer, options: argparse.Namespace) -> list[Task]:
    """The tasks that are asked for."""
    tasks = []
    if "edit" in options.scenarios:
        for revision, path in EDITS:
            before, after = (tokenizer.encode(_at(name, path)) for name in (f"{revision}^", revision))
            heading = tokenizer.encode(f"# {path} as it was:\n\n")
            again = tokenizer.encode(f"\n\n# {path} with the change:\n\n")
            room = options.prompt_tokens - len(heading) - len(again)
            prompt = (*heading, *before[:room], *again)
            tasks.append(Task(name=f"edit {Path(path).name}", prompt=prompt, answer=() if options.own else after))
    if "prose" in options.scenarios:
        text = tokenizer.encode(PROSE.read_text("utf-8"))
        half = min(options.prompt_tokens, len(text) // 2)
        tasks.append(Task(name="prose", prompt=text[:half], answer=() if options.own else text[half:]))
    return tasks


def _at(revision: str, path: str) -> str:
    """A file of this repository at a revision."""
    try:
        command = ["git", "-C", str(ROOT), "show", f"{revision}:{path}"]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise ConfigError(
            f"reading {path} at {revision} by git: {error}; expected the history of this repository: run the benchmark "
            "in a clone of it, or with --scenarios prose"
        ) from error


def table(results: Sequence[dict[str, Any]]) -> str:
    """The rounds, and the median ratio of each task."""
    lines = [f"{'task':<20} round  plain/s  drafts/s  ratio  accepted of drafted"]
    for each in results:
        lines.append(
            f"{each['task']:<20} {each['round']:>5}  {each['plain_tokens_per_s']:>7.1f}  "
            f"{each['drafted_tokens_per_s']:>8.1f}  {each['ratio']:>5.2f}  {each['accepted']} of {each['drafted']}"
            + ("" if each["same_tokens"] else "  OTHER TOKENS")
        )
    for name in dict.fromkeys(each["task"] for each in results):
        ratio = statistics.median(each["ratio"] for each in results if each["task"] == name)
        lines.append(f"{name}: {ratio:.2f}")
    return "\n".join(lines)


def benchmark(options: argparse.Namespace) -> int:
    """Measure, write the result, print the table."""
    if unknown := {*options.scenarios} - {"edit", "prose"}:
        raise ConfigError(f"measuring drafts: found the scenarios {', '.join(sorted(unknown))}, expected edit or prose")
    engine = open_engine(options.engine, check_digests=False)
    session = Session(engine, options.threads)
    tasks = read_tasks(load_tokenizer(options.engine), options)
    about = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.describe(),
        "model": dataclasses.asdict(engine.manifest.architecture),
        "answers": "the engine's own" if options.own else "given",
    }
    results = []
    for result in measure(session, tasks, options.tokens, options.rounds):
        results.append(result)
        print(table([result]).splitlines()[1], file=sys.stderr, flush=True)
        if options.output:
            replace_file(options.output, json.dumps({**about, "rounds": results}, indent=1) + "\n")
    print(table(results))
    return 0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", type=Path, required=True, help="an engine of ONNX Runtime for the CPU")
    parser.add_argument("--output", type=Path, help="file for the result")
    parser.add_argument("--own", action="store_true", help="the engine writes the answers itself")
    parser.add_argument(
        "--scenarios", type=lambda text: text.split(","), default=["edit", "prose"], metavar="NAME,NAME"
    )
    parser.add_argument("--prompt-tokens", type=int, default=400, metavar="N", help="of a prompt at most")
    parser.add_argument("--tokens", type=int, default=160, metavar="N", help="of an answer at most (default 160)")
    parser.add_argument("--rounds", type=int, default=1, metavar="N", help="of each task (default 1)")
    parser.add_argument("--threads", type=int, help="of the engine (default: one for each core)")
    options = parser.parse_args(argv)
    return run_command(lambda: benchmark(options))


if __name__ == "__main__":
    sys.exit(main())
