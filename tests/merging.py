"""A merge of small experts, for the tests of merging."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from checkpoints import write_phi_checkpoint

from export.merge.config import read_merge_config
from export.merge.merge import MergeResult, merge

SPELLINGS = ("transformers", "phi-msft")
LETTERS = "abcdefgh"  # a token each, for every tokenizer of the tests


def write_yaml(folder: Path, num_experts: int = 2, **keys: Any) -> Path:
    """A YAML over ./e0 .. whose prompts end differently, so that no two gate rows are equal, in whatever mode; `keys`
    replace or add top-level ones."""
    values = {
        "base_model": "./e0",
        "gate_mode": "cheap_embed",
        "experts": [
            {"source_model": f"./e{i}", "positive_prompts": [f"alpha {LETTERS[i]}", "beta" * i]}
            for i in range(num_experts)
        ],
    }
    path = folder / "merge.yml"
    path.write_text(yaml.safe_dump({**values, **keys}))
    return path


def run(path: Path, **options: Any) -> MergeResult:
    """Merge what the YAML at `path` says into the folder `out` beside it."""
    return merge(read_merge_config(path), path.parent / "out", **options)


def leftovers(folder: Path) -> list[str]:
    """Names of what a merge into `out` left in `folder`, whole or partial."""
    return [path.name for path in folder.iterdir() if "out" in path.name]


def write_five_experts(folder: Path) -> Path:
    """Five experts, spellings alternating; returns the YAML that merges them from ./e0."""
    for index in range(5):
        write_phi_checkpoint(folder / f"e{index}", seed=index, spelling=SPELLINGS[index % 2])
    return write_yaml(folder, 5)
