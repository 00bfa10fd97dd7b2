"""A program: a checkpoint and prompts in, the reference's greedy answers out, as JSON on stdout.

    python ci/gpu/reference_texts.py CHECKPOINT --tokens N PROMPT...

The reference is transformers in float32. An answer has its token ids, an end token included, its text, and for each
token the margin by which it was chosen: its logit less the next one's. A process of its own, so that the checkpoint's
memory is given back.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch

# tests/torch_reference makes transformers' model of a checkpoint.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from torch_reference import load_reference

from export.command import run_command
from trt_build.source import open_source


def greedy(
    reference: torch.nn.Module, prompt_ids: list[int], num_tokens: int, end_ids: Collection[int], num_ids: int
) -> tuple[list[int], list[float]]:
    """Generate greedily; returns the token ids after a prompt and their margins. Ids from `num_ids` on stand for no
    text and are not chosen."""
    ids, margins, cache, step = list[int](), list[float](), None, list(prompt_ids)
    while len(ids) < num_tokens and not (ids and ids[-1] in end_ids):
        with torch.no_grad():
            output = reference(torch.tensor([step]), cache=cache, use_cache=True, logits_to_keep=1)
        cache = output.cache
        best = torch.topk(output.logits[0, -1, :num_ids], 2)
        ids.append(int(best.indices[0]))
        margins.append(float(best.values[0] - best.values[1]))
        step = ids[-1:]
    return ids, margins


def answers(checkpoint: str, prompts: list[str], num_tokens: int) -> list[dict[str, Any]]:
    """The reference's greedy answers to prompts. Raises the errors of opening a checkpoint."""
    source = open_source(checkpoint, None, None)
    reference, found = load_reference(source.model), []
    for prompt in prompts:
        prompt_ids = source.tokenizer.encode_prompt(prompt)
        ids, margins = greedy(reference, prompt_ids, num_tokens, source.end_ids, source.tokenizer.size)
        before = source.tokenizer.decode(prompt_ids)
        text = source.tokenizer.decode([*prompt_ids, *ids])[len(before) :]
        reason = "stop" if ids[-1] in source.end_ids else "length"
        found.append(
            {"prompt": prompt, "text": text, "finish_reason": reason, "token_ids": ids, "margins": margins}
        )  # fmt: skip
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT")
    parser.add_argument("prompts", nargs="+", metavar="PROMPT")
    parser.add_argument(
        "--tokens", type=int, default=48, metavar="N", help="tokens of each answer (default: %(default)s)"
    )
    options = parser.parse_args()

    def run() -> int:
        found = answers(options.checkpoint, options.prompts, options.tokens)
        json.dump(found, sys.stdout)
        return 0

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
