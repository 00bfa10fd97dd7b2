"""Measures what a build costs, and compares it with plain reading of its input and plain writing of its output.

    python benchmarks/conversion.py --checkpoint DIR --work FOLDER [--precision P] [--backend B] [--output FILE]

Plans the build first and holds the plan against what happened: the bytes of every file that is planned, and the peak of
resident memory over all processes of the build. Of TensorRT-LLM it is the checkpoint that is written. The page cache is
emptied of the source before each reading. FOLDER lies on the disk to be measured and is removed. Exit status 0 done, 2
wrong input.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from decode import machine
from export.command import run_command
from export.errors import ConfigError
from export.files.output import replace_file
from trt_build.manifest import BACKENDS

RESULTS = Path(__file__).resolve().parent / "results"
COMMAND = [sys.executable, "-m", "cli.main"]
PIECE_BYTES = 1 << 23
SAMPLE_INTERVAL_S = 0.05

FLOATS = ("fp32", "fp16", "bf16")  # precisions that quantise nothing and take no method


def measure(checkpoint: Path, work: Path, precision: str, backend: str = BACKENDS[0]) -> dict[str, Any]:
    """Measure plan, plain reading, plain writing and build. Raises ConfigError if the plan or the build fails."""
    method = [] if precision in FLOATS else ["--method", "search"]  # GPTQ is no conversion
    what = [str(checkpoint), "--precision", precision, "--backend", backend, "--json", *method]
    planned = subprocess.run([*COMMAND, "plan", *what], capture_output=True, text=True, check=False)
    if planned.returncode:
        raise ConfigError(f"planning {checkpoint}: {planned.stderr.strip()}")
    plan = json.loads(planned.stdout)
    planned_bytes = sum(plan["files"].values())
    shards = sorted(checkpoint.glob("*.safetensors"))
    work.mkdir(parents=True)
    try:
        busy, started = machine.busy_seconds(), time.monotonic()
        read_s = plain_read(shards)
        write_s = plain_write(work / "plain", planned_bytes)
        forget(shards)
        words = ["--checkpoint", str(checkpoint), "--precision", precision, "--output", str(work / "engine")]
        words += method
        made = work / "engine"
        if backend != BACKENDS[0]:
            made = work / "checkpoint"
            words += ["--backend", backend, "--until", "checkpoint", "--trtllm-checkpoint", str(made)]
        build = watch([*COMMAND, "build", *words])
        elapsed = time.monotonic() - started
        own = sum(os.times()[:4])
        files = {path.name: path.stat().st_size for path in made.iterdir() if path.name in plan["files"]}
    finally:
        shutil.rmtree(work)
    return {
        "checkpoint": checkpoint.name,
        "precision": precision,
        "backend": backend,
        "read": {"bytes": sum(path.stat().st_size for path in shards), "seconds": read_s},
        "write": {"bytes": planned_bytes, "seconds": write_s},
        "build": build,
        "build_over_plain": build["seconds"] / (read_s + write_s),
        "engine": {
            "planned_bytes": planned_bytes,
            "bytes": sum(files.values()),
            "as_planned": plan["files"] == files,
        },
        "peak_memory": {
            "planned_bytes": plan["conversion_bytes"],
            "planned_over_measured": plan["conversion_bytes"] / build["peak_bytes"],
        },
        "other_cores": max(0.0, (machine.busy_seconds() - busy - own) / elapsed),
    }


def plain_read(paths: Iterable[Path]) -> float:
    """Seconds that it takes to read files sequentially from the disk."""
    files = list(paths)
    forget(files)
    buffer = bytearray(PIECE_BYTES)
    started = time.monotonic()
    for path in files:
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass
    return time.monotonic() - started


def plain_write(path: Path, num_bytes: int) -> float:
    """Seconds that it takes to write a file and flush it to the disk."""
    buffer = memoryview(os.urandom(PIECE_BYTES))
    started = time.monotonic()
    with path.open("wb", buffering=0) as file:
        while num_bytes:
            num_bytes -= file.write(buffer[:num_bytes])
        os.fsync(file.fileno())
    seconds = time.monotonic() - started
    path.unlink()
    return seconds


def forget(paths: Iterable[Path]) -> None:
    """Drop files from the page cache, so that the next read comes from the disk."""
    for path in paths:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def watch(command: list[str]) -> dict[str, Any]:
    """Run a command; returns its elapsed seconds, its processor seconds, and the peak resident memory of all its
    processes together."""
    before, started, peak = os.times(), time.monotonic(), 0
    with tempfile.TemporaryFile("w+") as errors:
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=errors) as process:
            while process.poll() is None:
                peak = max(peak, resident(process.pid))
                time.sleep(SAMPLE_INTERVAL_S)
        seconds, after = time.monotonic() - started, os.times()
        if process.returncode:
            errors.seek(0)
            raise ConfigError(f"running {' '.join(command)}: {errors.read().strip()}")
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    return {"seconds": seconds, "processor_seconds": cpu, "peak_bytes": peak}


def resident(pid: int) -> int:
    """The peak resident bytes of a process and its children, added up."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has ended
        return 0
    own = next((int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:")), 0)
    return own * 1024 + sum(resident(int(child)) for child in children)


def _row(result: dict[str, Any]) -> str:
    build = result["build"]
    plain = (result["read"], result["write"])
    read, write = (f"{part['bytes'] / 1e9:.2f} GB in {part['seconds']:.1f} s" for part in plain)
    return (
        f"{result['checkpoint']} to {result['precision']}: read {read}, wrote {write}\n"
        f"built in {build['seconds']:.1f} s, {result['build_over_plain']:.1f} times that, with "
        f"{build['processor_seconds']:.0f} s of processor and {build['peak_bytes'] / 1e6:.0f} MB of memory\n"
        f"plan: every file of it {'exact' if result['engine']['as_planned'] else 'NOT exact'}, memory "
        f"{result['peak_memory']['planned_over_measured']:.2f} of what was measured\n"
        f"other programs took {result['other_cores']:.2f} cores meanwhile"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, type=Path, metavar="DIR")
    parser.add_argument("--work", required=True, type=Path, metavar="FOLDER", help="new folder for the engine")
    parser.add_argument("--precision", default="int4", help="(default: %(default)s)")
    parser.add_argument("--backend", default=BACKENDS[0], choices=BACKENDS, help="(default: %(default)s)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON (default: under benchmarks/results)")
    options = parser.parse_args()

    def run() -> int:
        about = machine.describe()
        result = measure(options.checkpoint, options.work, options.precision, options.backend)
        kind = "" if options.backend == BACKENDS[0] else f"{options.backend}-"
        path = options.output or RESULTS / f"conversion-{kind}{options.precision}-{machine.slug(about)}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(path, json.dumps({"machine": about, **result}, indent=2) + "\n")
        print(_row(result))
        return 0

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
