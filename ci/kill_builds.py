"""Kill builds at random moments, run each again, and compare every file with those of an undisturbed build.

    python ci/kill_builds.py --checkpoint DIR --work FOLDER [--precision P] [--kills N] [--seed S]

Moments are drawn evenly over the time that an undisturbed build takes from its first file to its last. After each kill
(SIGKILL, no warning) nothing may be openable as an engine; the same command then resumes. Exit status 0 when every
resumed engine is byte-identical to the undisturbed one, 1 when one is not.
"""

from __future__ import annotations

import argparse
import logging
import random
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from export.command import run_command
from export.errors import MoeshipError
from export.files.resume import partial_path
from trt_build.errors import EngineError
from trt_build.ort.engine import open_engine

POLL_INTERVAL_S = 0.001
BUILD = [sys.executable, str(Path(__file__).resolve().parent.parent / "trt_build" / "build_engine.py")]

logger = logging.getLogger(__name__)


class DifferentEngine(MoeshipError):  # noqa: N818 - it is a verdict
    """A build that was killed and resumed gave another engine than an undisturbed build."""

    exit_status = 1


@dataclass(frozen=True, kw_only=True)
class Kill:
    """One kill: seconds after the first file appeared, parts finished by then, whether the build was still running."""

    delay_s: float
    parts: int
    landed: bool


def start(checkpoint: Path, output: Path, precision: str) -> subprocess.Popen[bytes]:
    """Start a build in a separate process; returns when its journal appears."""
    words = ["--checkpoint", str(checkpoint), "--output", str(output), "--precision", precision]
    words += [] if precision in ("fp32", "fp16") else ["--method", "search"]
    process = subprocess.Popen([*BUILD, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal = partial_path(output) / "journal"
    while process.poll() is None and not journal.exists():
        time.sleep(POLL_INTERVAL_S)
    return process


def undisturbed(checkpoint: Path, output: Path, precision: str) -> float:
    """Build; returns the seconds from the first file to the last. Raises DifferentEngine when the build fails."""
    process = start(checkpoint, output, precision)
    started = time.monotonic()
    if process.wait():
        raise DifferentEngine(f"building {output}: the build ended with status {process.returncode}")
    return time.monotonic() - started


def kill(checkpoint: Path, output: Path, precision: str, delay_s: float) -> Kill:
    """Start a build and kill it after `delay_s` seconds. Raises DifferentEngine if an incomplete engine opens as a
    complete one."""
    process = start(checkpoint, output, precision)
    time.sleep(delay_s)
    landed = process.poll() is None
    process.kill()
    process.wait()
    landed = landed and not output.exists()
    journal = partial_path(output) / "journal"
    parts = max(0, journal.read_bytes().count(b"\n") - 1) if journal.exists() else 0
    if landed:
        try:
            open_engine(output)
        except EngineError:
            pass
        else:
            raise DifferentEngine(f"killing the build of {output}: what it left can be opened as an engine")
    return Kill(delay_s=delay_s, parts=parts, landed=landed)


def compare(found: Path, expected: Path) -> None:
    """Compare two folders byte for byte. Raises DifferentEngine that names the files that differ or are in one folder
    only."""
    paths = [(folder, path) for folder in (found, expected) for path in folder.rglob("*") if not path.is_dir()]
    names = {path.relative_to(folder).as_posix() for folder, path in paths}
    different = [name for name in sorted(names) if not _same(found / name, expected / name)]
    if different:
        raise DifferentEngine(f"comparing {found} with {expected}: {', '.join(different)} differ")


def _same(left: Path, right: Path) -> bool:
    if not (left.is_file() and right.is_file()) or left.stat().st_size != right.stat().st_size:
        return False
    with left.open("rb") as one, right.open("rb") as other:
        while True:
            block = one.read(1 << 20)
            if block != other.read(1 << 20):
                return False
            if not block:
                return True


def kill_builds(checkpoint: Path, work: Path, precision: str, kills: int, seed: int) -> list[Kill]:
    """Kill and resume builds until `kills` builds were killed while they ran. Everything in `work` except the expected
    engine is removed."""
    expected = work / "expected"
    seconds = undisturbed(checkpoint, expected, precision)
    moments, done = random.Random(seed), list[Kill]()
    while len(done) < kills:
        output = work / "killed"
        one = kill(checkpoint, output, precision, moments.uniform(0, seconds))
        if one.landed:
            undisturbed(checkpoint, output, precision)
            compare(output, expected)
            if partial_path(output).exists():
                raise DifferentEngine(f"resuming {output}: {partial_path(output)} was left behind")
            done.append(one)
            logger.info("kill %d after %.2f s with %d parts: byte-identical", len(done), one.delay_s, one.parts)
        shutil.rmtree(output, ignore_errors=True)
        shutil.rmtree(partial_path(output), ignore_errors=True)
    return done


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="DIR")
    parser.add_argument("--work", required=True, type=Path, metavar="FOLDER", help="a new folder for the engines")
    parser.add_argument("--precision", default="int4", help="(default: %(default)s)")
    parser.add_argument("--kills", type=int, default=25, help="builds to kill (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)

    def run() -> int:
        options.work.mkdir(parents=True)
        kills = kill_builds(options.checkpoint, options.work, options.precision, options.kills, options.seed)
        shutil.rmtree(options.work)
        parts = sorted(one.parts for one in kills)
        print(
            f"{len(kills)} of {len(kills)} killed builds resumed byte-identical; "
            f"parts finished when killed: {parts[0]} to {parts[-1]}, median {parts[len(parts) // 2]}"
        )
        return 0

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
