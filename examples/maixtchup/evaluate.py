"""Held-out perplexity of each expert alone and of the merged mixture, on each slice of text.

    python evaluate.py [--tokens N] [--json]

The experts and the mixture are computed by moeship's float32 reference, and the mixture also by its int4 engine, on the
same held-out tokens. Prints a table.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from export.checkpoint.folder import open_checkpoint
from export.families import read_model
from export.merge.config import read_merge_config
from export.merge.merge import merge
from export.reference.model import Reference
from export.tokenizer.loading import load_tokenizer
from trt_build.comparison.parity import split_windows
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.verify import perplexity

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "tiny-phixtral"))
import corpus  # noqa: E402

WINDOW_TOKENS = 256
EXPERTS = tuple(Path(expert.model.location).name for expert in read_merge_config(HERE / "merge.yml").experts)
Windows = Sequence[Sequence[int]]


def held_out_windows(num_tokens: int) -> dict[str, list[Sequence[int]]]:
    """Slice -> windows of token ids of text that no expert was trained on, up to `num_tokens` a slice."""
    tokenizer = load_tokenizer(HERE / "experts" / "code")
    return {
        name: list(split_windows(tokenizer.encode(text[: 8 * num_tokens]), WINDOW_TOKENS, num_tokens))
        for name, text in corpus.held_out_texts().items()
        if name in EXPERTS
    }


def reference_perplexity(folder: Path, windows: Windows) -> float:
    """exp of the mean negative log-likelihood of each token after those before it in its window."""
    loss, count = 0.0, 0
    reference = Reference(read_model(open_checkpoint(folder)))
    for window, (logits, _) in zip(windows, reference.run(windows), strict=True):
        values = logits[:-1].astype(np.float64)
        highest = values.max(axis=-1, keepdims=True)
        normal = highest[:, 0] + np.log(np.exp(values - highest).sum(axis=-1))
        loss += float((normal - values[np.arange(len(values)), window[1:]]).sum())
        count += len(values)
    return math.exp(loss / count)


def measure(folder: Path, windows: dict[str, list[Sequence[int]]]) -> dict[str, dict[str, float]]:
    """Row -> slice -> perplexity. `folder` is for the mixture and its engine."""
    merge(read_merge_config(HERE / "merge.yml"), folder / "mixture")
    models = {f"expert {name}": HERE / "experts" / name for name in EXPERTS} | {"mixture": folder / "mixture"}
    table = {
        row: {name: reference_perplexity(model, some) for name, some in windows.items()}
        for row, model in models.items()
    }
    options = BuildOptions(checkpoint=str(folder / "mixture"), output=folder / "engine", precision="int4")
    engine = build_engine(options)
    table["mixture, int4 engine"] = {name: perplexity(engine, some) for name, some in windows.items()}
    for row in table.values():
        row["mean"] = math.exp(sum(map(math.log, row.values())) / len(row))
    return table


def markdown(table: dict[str, dict[str, float]]) -> str:
    """The table as Markdown, the best expert of each column in bold."""
    columns = list(next(iter(table.values())))
    best = {c: min(row[c] for name, row in table.items() if name.startswith("expert")) for c in columns}
    lines = [f"| held-out perplexity | {' | '.join(columns)} |", f"|---|{'---:|' * len(columns)}"]
    for name, row in table.items():
        cells = [f"**{row[c]:.2f}**" if row[c] == best[c] else f"{row[c]:.2f}" for c in columns]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=8192, help="held-out tokens a slice (default: %(default)s)")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        table = measure(Path(folder), held_out_windows(options.tokens))
    print(json.dumps(table, indent=2) if options.json else markdown(table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
