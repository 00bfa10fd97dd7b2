"""Give damaged inputs to every reader: python ci/fuzz.py --seed 7 --inputs 20000

Readers, inputs and bounds are those of tests/fuzz_readers.py and tests/fuzzing.py. A reader works in a process of its
own, which is killed where one input takes longer than HANG_SECONDS; the input is then kept beside the faults found.
Exit status 1 where there were any: their inputs lie in --keep.
"""

from __future__ import annotations

import argparse
import json
import re
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from fuzz_readers import READERS  # noqa: E402 - found through the path above
from fuzzing import Reader, fault, inputs_of  # noqa: E402

HANG_SECONDS = 30
MOST_FAULTS = 20


def work(reader: Reader, seed: int, inputs: int, begin: int) -> None:
    """Run inputs `begin` to `inputs` through a reader; prints a line of JSON before each input and for each fault."""
    with tempfile.TemporaryDirectory(prefix="moeship-fuzz-") as folder:
        reader.setup(Path(folder))
        for index, data in enumerate(inputs_of(reader, seed, inputs)):
            if index >= begin:
                print(json.dumps({"input": index}), flush=True)
                problem = fault(reader, data, Path(folder))
                if problem:
                    print(json.dumps({"input": index, "fault": problem}), flush=True)


def run(reader: Reader, seed: int, inputs: int) -> Iterator[tuple[int, str]]:
    """The index and the fault of every input on which the reader failed."""
    begin = 0
    while begin < inputs:
        words = [reader.name, "--seed", str(seed), "--inputs", str(inputs), "--begin", str(begin)]
        command = [sys.executable, __file__, "--worker", *words]
        # Unbuffered, because select does not see a line that is in a buffer already.
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0) as process:
            assert process.stdout is not None
            last, hung = begin, True
            try:
                while select.select([process.stdout], [], [], HANG_SECONDS)[0]:
                    line = process.stdout.readline()
                    if not line:
                        hung = False
                        break
                    told = json.loads(line)
                    last = told["input"]
                    if "fault" in told:
                        yield last, told["fault"]
                if hung:
                    yield last, f"no answer within {HANG_SECONDS} s"
            finally:
                if hung:
                    process.kill()
        if not hung and process.returncode:
            yield last, f"its process died with status {process.returncode}"
        elif not hung:
            return
        begin = last + 1


def keep(reader: Reader, seed: int, inputs: int, index: int, folder: Path) -> Path:
    """Write one input into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{re.sub(r'[^a-z]+', '-', reader.name.lower())}-{seed}-{index}"
    path.write_bytes(next(data for number, data in enumerate(inputs_of(reader, seed, inputs)) if number == index))
    return path


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument(
        "--inputs",
        type=int,
        default=20_000,
        metavar="N",
        help="number of inputs over all readers (default %(default)s)",
    )
    parser.add_argument("--reader", action="append", metavar="NAME", help=", ".join(each.name for each in READERS))
    parser.add_argument("--keep", type=Path, default=Path("fuzz-faults"), metavar="FOLDER")
    parser.add_argument("--worker", metavar="NAME", help=argparse.SUPPRESS)
    parser.add_argument("--begin", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.worker:
        [reader] = [each for each in READERS if each.name == options.worker]
        work(reader, options.seed, options.inputs, options.begin)
        return 0
    chosen = [each for each in READERS if not options.reader or each.name in options.reader]
    share = max(1, options.inputs // len(chosen))
    total = 0
    for reader in chosen:
        started, count = time.perf_counter(), 0
        for index, problem in run(reader, options.seed, share):
            count += 1
            if count > MOST_FAULTS:
                print(f"{reader.name}: more than {MOST_FAULTS} faults; the rest of its inputs is left out")
                break
            print(
                f"{reader.name}, input {index}: {problem}\n  {keep(reader, options.seed, share, index, options.keep)}"
            )
        print(f"{reader.name}: {share} inputs, {count} faults, {time.perf_counter() - started:.0f} s", flush=True)
        total += count
    return 1 if total else 0


if __name__ == "__main__":
    sys.exit(main())
