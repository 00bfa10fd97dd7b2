"""Held-out perplexity of each expert alone and of the merged mixture, per slice, measured through moeship's engines.

    python evaluate.py [--tokens N] [--json]

Builds an fp32 engine of each expert and fp32, int8 and int4 engines of the mixture in a temporary folder, scores the
same held-out tokens with each, and prints a table.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path

import corpus

from export.merge.config import read_merge_config
from export.merge.merge import merge
from export.tokenizer.loading import load_tokenizer
from trt_build.comparison.parity import split_windows
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.engine import Engine
from trt_build.ort.verify import perplexity

HERE = Path(__file__).resolve().parent
WINDOW_TOKENS = 256


def build_engines(folder: Path) -> dict[str, Engine]:
    """Engines of the four experts and of the mixture, by the name of their row."""
    engines = {}
    for name in corpus.SLICES:
        expert = BuildOptions(checkpoint=str(HERE / "experts" / name), output=folder / name, precision="fp32")
        engines[f"expert {name}"] = build_engine(expert)
    merge(read_merge_config(HERE / "merge.yml"), folder / "mixture")
    for precision in ("fp32", "int8", "int4"):
        options = BuildOptions(checkpoint=str(folder / "mixture"), output=folder / precision, precision=precision)
        engines[f"mixture {precision}"] = build_engine(options)
    return engines


def measure(folder: Path, num_tokens: int) -> dict[str, dict[str, float]]:
    """Row -> slice -> perplexity over windows of WINDOW_TOKENS, up to `num_tokens` a slice."""
    engines = build_engines(folder)
    tokenizer = load_tokenizer(HERE / "experts" / "code")
    table: dict[str, dict[str, float]] = {name: {} for name in engines}
    for slice_name, text in corpus.held_out_texts().items():
        windows = list(split_windows(tokenizer.encode(text), WINDOW_TOKENS, num_tokens))
        for name, engine in engines.items():
            table[name][slice_name] = perplexity(engine, windows)
        print(f"{slice_name}: {sum(map(len, windows))} tokens", file=sys.stderr)
    return table


def markdown(table: dict[str, dict[str, float]]) -> str:
    """The table as Markdown, the best expert of each slice in bold."""
    slices = list(next(iter(table.values())))
    best = {s: min((row[s] for name, row in table.items() if name.startswith("expert"))) for s in slices}
    lines = [f"| held-out perplexity | {' | '.join(slices)} |", f"|---|{'---:|' * len(slices)}"]
    for name, row in table.items():
        cells = [f"**{row[s]:.2f}**" if row[s] == best[s] else f"{row[s]:.2f}" for s in slices]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=16384, help="held-out tokens a slice (default: %(default)s)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = measure(Path(folder), options.tokens)
    print(json.dumps(table, indent=2) if options.json else markdown(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
