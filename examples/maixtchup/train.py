"""Train three small Mistral-architecture experts from one common base, each on another kind of text.

The base is trained on all four slices of examples/tiny-phixtral/corpus.py. Each expert continues from it on one slice,
and only its MLPs are trained: attention, embedding and norms stay the base's, and so a merge loses nothing of them.

    python train.py --output experts                 # everything; what exists is kept
    python train.py --output experts --stage warm    # some of the stages: warm, base, code, prose, tests

Writes experts/<slice>/ (transformers' MistralForCausalLM, bfloat16), the tokenizer into experts/code alone, since a
merge takes the base's, and training_log.jsonl beside the folder. experts/warm and experts/base are the base, float32.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
import torch
from tokenizers import Tokenizer
from transformers import MistralConfig, MistralForCausalLM

EXAMPLES = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(EXAMPLES / "tiny-phixtral"))
import corpus  # noqa: E402

SEED = 20261128
TOKENIZER = EXAMPLES / "tiny-mixtral" / "checkpoint"
CONTEXT, BATCH = 192, 16
MOST_CHARACTERS = 4_000_000  # of a slice
MIX = {"code": 0.3, "prose": 0.3, "tests": 0.2, "headers": 0.2}
CONFIG = MistralConfig(
    vocab_size=1024,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=512,
    sliding_window=None,
    rms_norm_eps=1e-5,
    tie_word_embeddings=True,
    bos_token_id=1,
    eos_token_id=2,
)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """What is trained: from which earlier stage, on which text, and how the learning rate goes from `first` to
    `last`. An expert's text has `own` of its slice and the base's mix for the rest."""

    start: str | None
    steps: int
    first: float
    last: float
    own: float | None = None


STAGES = {
    "warm": Stage(start=None, steps=1200, first=3e-3, last=2e-3),
    "base": Stage(start="warm", steps=800, first=2e-3, last=2e-4),
    "code": Stage(start="base", steps=350, first=1.5e-3, last=1e-4, own=0.9),
    "prose": Stage(start="base", steps=350, first=1.5e-3, last=1e-4, own=0.9),
    "tests": Stage(start="base", steps=350, first=1.5e-3, last=1e-4, own=0.9),
}


def training_tokens() -> dict[str, np.ndarray]:
    """Slice -> token ids of the documents that are not held out."""
    tokenizer = Tokenizer.from_file(str(TOKENIZER / "tokenizer.json"))
    texts: dict[str, list[str]] = {name: [] for name in corpus.SLICES}
    for document in corpus.documents():
        if not document.held_out:
            texts[document.slice].append(document.text)
    found = {}
    for name, documents in texts.items():
        documents = [document for document in documents if document]
        order = np.random.default_rng(SEED).permutation(len(documents))
        chosen, size = [], 0
        for index in order:
            if size > MOST_CHARACTERS:
                break
            chosen.append(documents[index])
            size += len(documents[index])
        ids = [encoding.ids for encoding in tokenizer.encode_batch(chosen)]
        found[name] = np.concatenate([np.array(some, dtype=np.uint16) for some in ids])
    return found


def batches(tokens: dict[str, np.ndarray], mix: dict[str, float], seed: int) -> Iterator[torch.Tensor]:
    """Endless int64 [BATCH, CONTEXT + 1] windows, slices drawn by `mix`, each with the start token before it."""
    rng = np.random.default_rng(seed)
    names, weights = list(mix), np.array(list(mix.values()))
    while True:
        rows = []
        for name in rng.choice(names, size=BATCH, p=weights / weights.sum()):
            start = int(rng.integers(0, len(tokens[name]) - CONTEXT - 1))
            rows.append(tokens[name][start : start + CONTEXT + 1].astype(np.int64))
        window = torch.from_numpy(np.stack(rows))
        window[:, 0] = CONFIG.bos_token_id
        yield window


def train(model: MistralForCausalLM, data: Iterator[torch.Tensor], stage: Stage, name: str, log: TextIO) -> None:
    """AdamW; the learning rate warms up over 40 steps and falls along a cosine."""
    free = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(free, lr=stage.first, betas=(0.9, 0.95), weight_decay=0.05)
    started, running = time.monotonic(), []
    model.train()
    for step in range(stage.steps):
        turn = 0.5 * (1 + math.cos(math.pi * step / stage.steps))
        for group in optimiser.param_groups:
            group["lr"] = min(1.0, (step + 1) / 40) * (stage.last + (stage.first - stage.last) * turn)
        rows = next(data)
        logits = model(rows[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(free, 1.0)
        optimiser.step()
        running.append(loss.item())
        if (step + 1) % 100 == 0:
            row = {"stage": name, "step": step + 1, "loss": round(float(np.mean(running)), 4)}
            running.clear()
            print(row, round(time.monotonic() - started), "s", file=sys.stderr)
            log.write(json.dumps(row | {"seconds": round(time.monotonic() - started)}) + "\n")
            log.flush()


def run_stage(output: Path, name: str, tokens: dict[str, np.ndarray], log: TextIO) -> None:
    """Train one stage and save it."""
    stage, seed = STAGES[name], SEED + list(STAGES).index(name)
    torch.manual_seed(seed)
    model = MistralForCausalLM.from_pretrained(output / stage.start) if stage.start else MistralForCausalLM(CONFIG)
    mix = MIX
    if stage.own is not None:
        for parameter_name, parameter in model.named_parameters():
            parameter.requires_grad = ".mlp." in parameter_name
        # Some of the base's mix keeps an expert usable beside another in a top-2 mixture.
        mix = {other: (1 - stage.own) * share + stage.own * (other == name) for other, share in MIX.items()}
    train(model, batches(tokens, mix, seed), stage, name, log)
    (model.bfloat16() if stage.own is not None else model).save_pretrained(output / name)
    if name == "code":
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copyfile(TOKENIZER / file, output / name / file)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the experts")
    parser.add_argument("--stage", choices=STAGES, nargs="+", help="only these (default: all that do not exist)")
    parser.add_argument("--threads", type=int, help="of PyTorch (default: its own choice)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    options.output.mkdir(parents=True, exist_ok=True)
    tokens = training_tokens()
    print({name: len(ids) for name, ids in tokens.items()}, file=sys.stderr)
    with (options.output.parent / "training_log.jsonl").open("a") as log:
        for name in options.stage or STAGES:
            if not (options.output / name).is_dir():
                run_stage(options.output, name, tokens, log)
    return 0


if __name__ == "__main__":
    sys.exit(main())
