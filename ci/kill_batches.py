"""Kill batch jobs at random moments, run each again, and check that every prompt has one answer, in order.

    python ci/kill_batches.py --work FOLDER [--lines N] [--kills N] [--seed S] [--engine local|ray] [--victim server]

A server of this process answers each prompt with a text that is made of the prompt, after a random time, and refuses a
part of the requests with 429 and 503. A job is killed (SIGKILL, no warning) at moments that are drawn evenly over the
time that an undisturbed job sends, and started again until it ends; each start but the last is killed once. With
`--engine ray` it is a worker process of the local Ray that is killed, in the middle, and the job must end by itself.
With `--victim server` two servers share the lines, and one of them is killed for good at a random moment: the job must
end by itself too, under either engine, and both servers must have answered.

Exit status 0 when every output holds every prompt once, in order, with its own answer, and nothing is left beside it;
1 when one does not.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import multiprocessing
import multiprocessing.connection
import multiprocessing.process
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from export.command import run_command
from export.errors import ConfigError, MoeshipError
from export.files.resume import partial_path

ROOT = Path(__file__).resolve().parent.parent
BATCH = [sys.executable, "-m", "cli.main", "batch"]
MODEL = "standin"
POLL_S = 0.002
LONGEST_S = 600.0  # of one run

logger = logging.getLogger(__name__)


class WrongOutput(MoeshipError):  # noqa: N818 - it is a verdict
    """A job that was killed and run again gave another output than every prompt once, in order."""

    exit_status = 1


@dataclass
class Standin:
    """What the server does, and what it was asked: prompt to how often it was answered."""

    delay_s: float = 0.02
    refused: float = 0.05  # share of the requests that are refused with 429 or 503
    seed: int = 0
    answered: dict[str, int] = field(default_factory=dict)
    begun: threading.Event = field(default_factory=threading.Event)
    url: str = ""

    def __post_init__(self) -> None:
        self._draws, self._lock = random.Random(self.seed), threading.Lock()

    def answer(self, body: dict[str, Any]) -> tuple[int, dict[str, Any], dict[str, str]]:
        """Status, body and headers for a request."""
        with self._lock:
            chance, share = self._draws.random(), self._draws.random()
        self.begun.set()
        time.sleep(self.delay_s * 2 * share)
        if chance < self.refused:
            status = 429 if share < 0.1 else 503
            return status, {"error": {"message": "busy"}}, {"Retry-After": "0"} if status == 429 else {}
        with self._lock:
            self.answered[body["prompt"]] = self.answered.get(body["prompt"], 0) + 1
        choice = {"index": 0, "text": expected_text(body["prompt"]), "finish_reason": "stop", "logprobs": None}
        usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
        return 200, {"object": "text_completion", "model": body["model"], "choices": [choice], "usage": usage}, {}


def expected_text(prompt: str) -> str:
    return f"answer to {prompt[::-1]}"


@contextmanager
def serving(standin: Standin) -> Iterator[Standin]:
    """Serve OpenAI's completions on a free port of this machine."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            self._send(200, {"object": "list", "data": [{"id": MODEL, "object": "model"}]}, {})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self._send(*standin.answer(body))

        def _send(self, status: int, body: dict[str, Any], headers: dict[str, str]) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            for name, value in {**headers, "Content-Type": "application/json"}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        request_queue_size = 256
        daemon_threads = True

        def handle_error(self, *_: object) -> None:  # a client that was killed
            pass

    with Server(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        standin.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield standin
        finally:
            server.shutdown()
            thread.join()


def write_prompts(path: Path, num_lines: int) -> None:
    """A batch in OpenAI's format with that many lines."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(num_lines):
            body = {"model": MODEL, "prompt": f"prompt {number}", "max_tokens": 4}
            line = {"custom_id": f"id-{number}", "method": "POST", "url": "/v1/completions", "body": body}
            file.write(json.dumps(line) + "\n")


@contextmanager
def serving_apart(seed: int) -> Iterator[tuple[str, multiprocessing.process.BaseProcess]]:
    """A server in a process of its own, which can be killed: its address, and the process."""
    context = multiprocessing.get_context("spawn")  # a fork would hold the other server's sockets open
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve_apart, args=(theirs, seed), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours.recv(), process
    finally:
        process.kill()
        process.join()


def _serve_apart(told: multiprocessing.connection.Connection, seed: int) -> None:
    with serving(Standin(seed=seed)) as standin:
        told.send(standin.url)
        threading.Event().wait()


def start(prompts: Path, output: Path, url: str, *more: str) -> subprocess.Popen[bytes]:
    words = [*BATCH, str(prompts), str(output), "--url", url, *more]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(process: subprocess.Popen[bytes], doing: str) -> None:
    """Wait for a job. Raises WrongOutput if it does not end with status 0."""
    try:
        _, errors = process.communicate(timeout=LONGEST_S)
    except subprocess.TimeoutExpired as error:
        process.kill()
        process.communicate()
        raise WrongOutput(f"{doing}: the job did not end within {LONGEST_S:g} s") from error
    if process.returncode:
        raise WrongOutput(f"{doing}: the job ended with status {process.returncode}: {errors.decode()[-1500:]}")


def check(output: Path, num_lines: int) -> None:
    """Raise WrongOutput unless an output has each prompt once, in order, with its own answer, and nothing is left."""
    lines = [json.loads(line) for line in output.read_bytes().splitlines()]
    found = [(line["custom_id"], line["response"]["body"]["choices"][0]["text"]) for line in lines]
    expected = [(f"id-{number}", expected_text(f"prompt {number}")) for number in range(num_lines)]
    if found != expected:
        wrong = next((place for place, pair in enumerate(zip(found, expected, strict=False)) if pair[0] != pair[1]), -1)
        raise WrongOutput(
            f"checking {output}: found {len(found)} lines, expected {num_lines}; line {wrong + 1} differs"
        )
    if partial_path(output).exists():
        raise WrongOutput(f"checking {output}: {partial_path(output)} was left behind")


def kept_by(output: Path) -> int:
    """The whole records that a killed job left."""
    return sum(path.read_bytes().count(b"\n") for path in partial_path(output).glob("answers-*"))


def wait_for_records(process: subprocess.Popen[bytes], output: Path) -> None:
    """Return when a job keeps its first answers, or has ended."""
    while process.poll() is None and not list(partial_path(output).glob("answers-*")):
        time.sleep(POLL_S)


def undisturbed(prompts: Path, output: Path, url: str) -> float:
    """Run a job; returns the seconds from its first file of records to its end."""
    process = start(prompts, output, url)
    wait_for_records(process, output)
    began = time.monotonic()
    finish(process, "running an undisturbed job")
    return time.monotonic() - began


def kill_once(prompts: Path, output: Path, url: str, delay_s: float) -> bool:
    """Start a job and kill it some time after it keeps its first answers; False if it had made its output before."""
    process = start(prompts, output, url)
    wait_for_records(process, output)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(delay_s)
    landed = process.poll() is None
    process.kill()
    process.communicate()
    return landed and not output.exists()


def kill_batches(work: Path, num_lines: int, kills: int, seed: int) -> list[int]:
    """Kill jobs until `kills` of them were killed while they ran; returns the answers that were kept after each kill.
    Some jobs are killed several times before they may end."""
    prompts, draws, kept = work / "prompts.jsonl", random.Random(seed), list[int]()
    write_prompts(prompts, num_lines)
    with serving(Standin(seed=seed)) as standin:
        seconds = undisturbed(prompts, work / "undisturbed.jsonl", standin.url)
        check(work / "undisturbed.jsonl", num_lines)
        output = work / "killed.jsonl"
        while len(kept) < kills:
            standin.answered = {}
            is_again = True
            while is_again and len(kept) < kills:
                delay_s = draws.uniform(0, seconds)
                if not kill_once(prompts, output, standin.url, delay_s):
                    break
                kept.append(kept_by(output))
                logger.info("kill %d after %.2f s: %d of %d answers kept", len(kept), delay_s, kept[-1], num_lines)
                is_again = draws.random() < 0.4
            finish(start(prompts, output, standin.url), f"running {output} again")
            check(output, num_lines)
            asked = sum(standin.answered.values())
            logger.info("run again: every prompt once, in order; %d were answered a second time", asked - num_lines)
            output.unlink()
    return kept


def kill_ray_worker(work: Path, num_lines: int, seed: int) -> str:
    """Kill a worker of a local Ray in the middle of a job; returns what was killed. Raises WrongOutput."""
    import psutil

    prompts, output = work / "prompts.jsonl", work / "ray.jsonl"
    write_prompts(prompts, num_lines)
    with serving(Standin(seed=seed)) as standin:
        process = start(prompts, output, standin.url, "--engine", "ray", "--ray-workers", "2", "--shard-lines", "100",
                        "--concurrency", "4")  # fmt: skip
        try:
            while process.poll() is None and len(standin.answered) < num_lines // 3:
                time.sleep(POLL_S)
            family = psutil.Process(process.pid).children(recursive=True)
            tasks = [one for one in family if " ".join(one.cmdline()).startswith("ray::") and _is_task(one)]
            if not tasks:
                raise WrongOutput(f"killing a worker of Ray: found none among {len(family)} processes of the job")
            victim = tasks[0]
            told = f"{' '.join(victim.cmdline()).strip()} after {len(standin.answered)} of {num_lines} answers"
            victim.send_signal(signal.SIGKILL)
            logger.info("killed %s", told)
            finish(process, "running a job whose Ray worker was killed")
        finally:
            if process.poll() is None:
                process.terminate()
                process.communicate()
        check(output, num_lines)
        logger.info("%d prompts were answered twice", sum(standin.answered.values()) - num_lines)
    return told


def kill_servers(work: Path, num_lines: int, kills: int, seed: int, engine: str) -> list[int]:
    """Kill one of two servers in each of `kills` jobs; returns how many answers were kept at that time. Raises
    WrongOutput, also for a server that died before it had answered or after the job's end."""
    prompts, draws, kept = work / "prompts.jsonl", random.Random(seed), list[int]()
    more = ["--engine", "ray", "--ray-workers", "2", "--shard-lines", "100"] if engine == "ray" else []
    write_prompts(prompts, num_lines)
    with serving(Standin(seed=seed)) as standin:
        for turn in range(kills):
            standin.answered = {}
            at, output = draws.uniform(0.05, 0.9) * num_lines, work / f"served-{turn}.jsonl"
            with serving_apart(seed + turn) as (url, victim):
                process = start(prompts, output, standin.url, url, *more, "--concurrency", "4")
                try:
                    while process.poll() is None and kept_by(output) < at:
                        time.sleep(POLL_S)
                    kept.append(kept_by(output))
                    victim.kill()
                    if process.poll() is not None:
                        finish(process, "running a job of two servers")
                        raise WrongOutput("killing a server: the job had ended before; give it more --lines")
                    finish(process, "running a job of which one server was killed")
                finally:
                    if process.poll() is None:
                        process.terminate()
                        process.communicate()
            check(output, num_lines)
            own = len(standin.answered)
            if own == num_lines:
                raise WrongOutput("killing a server: the other one had answered every line")
            logger.info("server killed at %d of %d answers; the other answered %d", kept[-1], num_lines, own)
            output.unlink()
    return kept


def _is_task(process: Any) -> bool:  # noqa: ANN401 - psutil.Process
    """Whether a process of Ray runs a task of the job, rather than waiting for one."""
    name = " ".join(process.cmdline())
    return "IDLE" not in name and "Map" in name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", required=True, type=Path, metavar="FOLDER", help="a new folder for the jobs")
    parser.add_argument("--lines", type=int, default=1000, metavar="N", help="prompts (default: %(default)s)")
    parser.add_argument("--kills", type=int, default=10, metavar="N", help="kills that land (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engine", choices=["local", "ray"], default="local")
    parser.add_argument("--victim", choices=["server"], help="kill one of two servers instead")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)

    def run() -> int:
        if options.kills < 1:
            raise ConfigError(f"killing batch jobs: --kills is {options.kills}, expected 1 or more")
        options.work.mkdir(parents=True)
        if options.victim == "server":
            kept = sorted(kill_servers(options.work, options.lines, options.kills, options.seed, options.engine))
            print(f"{len(kept)} jobs of {options.lines} prompts, each once and in order, with one of two servers "
                  f"killed after {kept[0]} to {kept[-1]} answers")  # fmt: skip
        elif options.engine == "ray":
            told = kill_ray_worker(options.work, options.lines, options.seed)
            print(f"{options.lines} prompts, each once and in order, with a worker killed: {told}")
        else:
            kept = sorted(kill_batches(options.work, options.lines, options.kills, options.seed))
            print(f"{len(kept)} kills, {options.lines} prompts, each once and in order after every one; "
                  f"answers kept when killed: {kept[0]} to {kept[-1]}, median {kept[len(kept) // 2]}")  # fmt: skip
        shutil.rmtree(options.work)
        return 0

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
