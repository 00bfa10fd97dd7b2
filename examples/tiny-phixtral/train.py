"""Train four small Phi-2-architecture experts from one common base, each on another slice of the standard library.

The base is trained on all slices; each expert continues from it on one slice with only its MLPs free, so that all
four share the base's attention, embedding, norms and head exactly, which is what a phixtral keeps of them.

    python train.py --output experts

Writes experts/base/ (float32), experts/<slice>/ (transformers' PhiForCausalLM layout, float16 safetensors,
tokenizer); what exists is kept, so an interrupted run goes on. Writes beside the experts' folder training_log.jsonl and
perplexity.json (held-out perplexity of the base and of every expert on every slice, by transformers in float32).
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import corpus
import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PhiConfig, PhiForCausalLM

SEED = 20261122
END_OF_TEXT = "<|endoftext|>"
TOKENIZER_SIZE = 2000  # below vocab_size, as Phi-2's 50295 is below 51200: padded rows must never be sampled
BASE_MIX = {"code": 0.35, "prose": 0.25, "tests": 0.25, "headers": 0.15}
CONTEXT, BATCH = 256, 24


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Optimiser steps, peak learning rate, and dropout on the residual branches."""

    steps: int
    rate: float
    dropout: float = 0.0


BASE = Schedule(steps=5000, rate=2e-3)
# The headers are a twentieth of the tests: the base has read them fifteen times already, and 800 steps more overfit
# (held-out perplexity 13.2, the base's is 11.8).
EXPERTS = {
    "code": Schedule(steps=800, rate=1e-3),
    "prose": Schedule(steps=800, rate=1e-3),
    "tests": Schedule(steps=800, rate=1e-3),
    "headers": Schedule(steps=80, rate=2e-4, dropout=0.1),
}
CONFIG = PhiConfig(
    vocab_size=2048,
    hidden_size=192,
    intermediate_size=768,
    num_hidden_layers=4,
    num_attention_heads=6,
    num_key_value_heads=6,
    max_position_embeddings=512,
    partial_rotary_factor=0.5,
    hidden_act="gelu_new",
    layer_norm_eps=1e-5,
    resid_pdrop=0.0,
    attention_dropout=0.0,
    embd_pdrop=0.0,
    tie_word_embeddings=False,
    bos_token_id=0,
    eos_token_id=0,
)


def train_tokenizer(texts: dict[str, str]) -> Tokenizer:
    """A byte-level BPE like Phi-2's CodeGen tokenizer, from equal shares of every slice."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    share = min(len(text) for text in texts.values())
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text[:share] for text in texts.values()), trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "CodeGenTokenizer",
        "add_prefix_space": False,
        "bos_token": END_OF_TEXT,
        "eos_token": END_OF_TEXT,
        "unk_token": END_OF_TEXT,
        "model_max_length": CONFIG.max_position_embeddings,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def load_slices() -> tuple[dict[str, str], dict[str, str]]:
    """Training and held-out text of every slice; documents are joined with END_OF_TEXT."""
    joined: dict[bool, dict[str, list[str]]] = {False: {}, True: {}}
    for document in corpus.documents():
        joined[document.held_out].setdefault(document.slice, []).append(document.text)
    train, held_out = ({name: END_OF_TEXT.join(joined[side][name]) for name in corpus.SLICES} for side in (False, True))
    return train, held_out


def batches(tokens: dict[str, np.ndarray], mix: dict[str, float], seed: int) -> Iterator[torch.Tensor]:
    """Endless int64 [BATCH, CONTEXT + 1] windows, slices drawn by `mix`."""
    rng = np.random.default_rng(seed)
    names, weights = list(mix), np.array(list(mix.values()))
    while True:
        rows = []
        for name in rng.choice(names, size=BATCH, p=weights / weights.sum()):
            start = int(rng.integers(0, len(tokens[name]) - CONTEXT - 1))
            rows.append(tokens[name][start : start + CONTEXT + 1].astype(np.int64))
        yield torch.from_numpy(np.stack(rows))


def train(model, parameters, data, schedule: Schedule, label: str, log) -> None:
    """AdamW with a linear warm-up and a cosine to a tenth, bfloat16 arithmetic over float32 weights."""
    decay = [p for p in parameters if p.ndim == 2]
    plain = [p for p in parameters if p.ndim != 2]
    optimiser = torch.optim.AdamW(
        [{"params": decay, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}],
        lr=schedule.rate,
        betas=(0.9, 0.95),
    )
    for layer in model.model.layers:
        layer.resid_dropout.p = schedule.dropout
    model.train()
    steps, started, running = schedule.steps, time.monotonic(), []
    for step in range(steps):
        warm = min(1.0, (step + 1) / min(100, steps // 8))
        rate = schedule.rate * warm * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * step / steps)))
        for group in optimiser.param_groups:
            group["lr"] = rate
        rows = next(data)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(rows[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), rows[:, 1:].flatten())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimiser.step()
        running.append(loss.item())
        if (step + 1) % 100 == 0 or step + 1 == steps:
            row = {
                "phase": label,
                "step": step + 1,
                "loss": round(float(np.mean(running)), 4),
                "rate": round(rate, 6),
                "tokens": (step + 1) * BATCH * CONTEXT,
                "seconds": round(time.monotonic() - started),
            }
            running.clear()
            log.write(json.dumps(row) + "\n")
            log.flush()
            print(row, file=sys.stderr)


@torch.no_grad()
def perplexity(model, tokens: np.ndarray, most_windows: int = 96) -> float:
    """exp of the mean negative log-likelihood over evenly spread windows of CONTEXT predictions, float32."""
    model.eval()
    starts = np.linspace(0, len(tokens) - CONTEXT - 2, most_windows).astype(int)
    rows = torch.from_numpy(np.stack([tokens[s : s + CONTEXT + 1].astype(np.int64) for s in starts]))
    losses = []
    for part in rows.split(16):
        logits = model(part[:, :-1], use_cache=False).logits
        losses.append(torch.nn.functional.cross_entropy(logits.flatten(0, 1), part[:, 1:].flatten()).item() * len(part))
    return math.exp(sum(losses) / len(rows))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the four experts")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(SEED)

    train_text, held_out_text = load_slices()
    tokenizer = train_tokenizer(train_text)
    tokens, held_out = (
        {name: np.array(tokenizer.encode(text).ids, dtype=np.uint16) for name, text in texts.items()}
        for texts in (train_text, held_out_text)
    )
    print({name: len(ids) for name, ids in tokens.items()}, file=sys.stderr)

    base_folder = options.output / "base"
    scores: dict[str, dict[str, float]] = {}
    with (options.output.parent / "training_log.jsonl").open("a") as log:
        if base_folder.is_dir():
            model = PhiForCausalLM.from_pretrained(base_folder)
        else:
            model = PhiForCausalLM(CONFIG)
            mixed = batches(tokens, BASE_MIX, SEED)
            train(model, list(model.parameters()), mixed, BASE, "base", log)
            model.save_pretrained(base_folder)
        base = {name: value.clone() for name, value in model.state_dict().items()}
        scores["base"] = {name: perplexity(model, ids) for name, ids in held_out.items()}
        for name, parameter in model.named_parameters():
            parameter.requires_grad = ".mlp." in name
        free = [p for p in model.parameters() if p.requires_grad]
        for index, name in enumerate(corpus.SLICES):
            folder = options.output / name
            if not folder.is_dir():
                model.load_state_dict(base)
                # A tenth of the base's mix keeps an expert usable beside another in a top-2 mixture.
                mix = {other: 0.1 * BASE_MIX[other] + 0.9 * (other == name) for other in corpus.SLICES}
                train(model, free, batches(tokens, mix, SEED + 1 + index), EXPERTS[name], name, log)
                half = PhiForCausalLM(CONFIG).half()
                half.load_state_dict(model.state_dict())
                half.save_pretrained(folder)
                save_tokenizer(tokenizer, folder)
            expert = PhiForCausalLM.from_pretrained(folder, dtype=torch.float32)
            scores[name] = {other: perplexity(expert, ids) for other, ids in held_out.items()}
            print(name, scores[name], file=sys.stderr)
    (options.output.parent / "perplexity.json").write_text(json.dumps(scores, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
