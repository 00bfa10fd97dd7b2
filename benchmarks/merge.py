"""Measure a merge of four Mistral-7B-shaped experts: memory, and time over plain reading and writing of as many bytes.

    python benchmarks/merge.py --work DIR [--layers N] [--rounds N] [--dtype float16]

Writes four synthetic checkpoints (synthetic_checkpoint.py) into DIR, merges them, and copies as many bytes by a plain
loop, in turns, so that both meet the same machine. Everything in DIR is removed at the end. Prints one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
MEASURED = """
import json, resource, sys, time
from pathlib import Path
from export.merge.config import read_merge_config
from export.merge.merge import merge
started = time.monotonic()
result = merge(read_merge_config(Path(sys.argv[1])), Path(sys.argv[2]))
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
print(json.dumps({"seconds": time.monotonic() - started, "peak": peak, "bytes": result.num_bytes}))
"""
CHUNK = 1 << 20


def plain(sources: list[Path], target: Path, num_bytes: int) -> float:
    """Seconds to read `num_bytes` of the files, one after the other, and to write them to one file on the disk."""
    started, left = time.monotonic(), num_bytes
    with target.open("wb", buffering=0) as out:
        for source in sources:
            with source.open("rb", buffering=0) as file:
                while left and (data := file.read(min(CHUNK, left))):
                    out.write(data)
                    left -= len(data)
        os.fsync(out.fileno())
    seconds = time.monotonic() - started
    target.unlink()
    return seconds


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", required=True, type=Path, metavar="DIR", help="folder to make, and to remove")
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", default="bfloat16", help="of the merged tensors; the experts are of bfloat16")
    options = parser.parse_args()
    options.work.mkdir()
    try:
        print(json.dumps(measure(options), indent=2))
    finally:
        shutil.rmtree(options.work)
    return 0


def measure(options: argparse.Namespace) -> dict[str, Any]:
    script = str(ROOT / "benchmarks" / "synthetic_checkpoint.py")
    names = [f"e{index}" for index in range(4)]
    for index, name in enumerate(names):
        words = ["--like", "mistral-7b", "--layers", str(options.layers), "--seed", str(index)]
        subprocess.run([sys.executable, script, *words, "--output", str(options.work / name)], check=True, cwd=ROOT)
    config = options.work / "merge.yml"
    entries = "".join(f"  - {{source_model: ./{name}, positive_prompts: [prompt {name}]}}\n" for name in names)
    config.write_text(f"base_model: ./e0\ngate_mode: cheap_embed\ndtype: {options.dtype}\nexperts:\n{entries}")
    sources = [path for name in names for path in sorted((options.work / name).glob("*.safetensors"))]
    rounds: list[dict[str, Any]] = []
    for _ in range(options.rounds):
        output = options.work / "out"
        done = subprocess.run(
            [sys.executable, "-c", MEASURED, str(config), str(output)],
            check=True, cwd=ROOT, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        shutil.rmtree(output)
        merged = json.loads(done.stdout)
        copied = plain(sources, options.work / "copy", merged["bytes"])
        rounds.append(merged | {"plain_seconds": copied, "ratio": merged["seconds"] / copied})
    return {"layers": options.layers, "dtype": options.dtype, "rounds": rounds}


if __name__ == "__main__":
    sys.exit(main())
