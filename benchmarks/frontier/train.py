"""Train a Mixtral whose widths llama.cpp's K-quants take, multiples of 256, on text of this Python installation.

    python benchmarks/frontier/train.py --output DIR [--packages FOLDER] [--steps N] [--threads N]

The text is the standard library's (examples/tiny-phixtral/corpus.py) and the sources, documents and licences of the
packages in FOLDER (default: those of the Python that runs this). One document in sixteen is held out, chosen by its
name. Writes transformers' MixtralForCausalLM in float32 with a tokenizer of Llama's kind, the held-out text as
`held-out.txt`, and `training.json`: losses, and bits per byte of the held-out text, of the model and of a model that
knows only how often each token occurs. The weights are not committed: the script makes them, in some 40 minutes of one
core. Other machines have other packages and round differently, so theirs are close and not equal.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from transformers import MixtralConfig, MixtralForCausalLM

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "examples" / "tiny-phixtral"), str(ROOT / "benchmarks" / "frontier")]
import corpus  # noqa: E402
from llama_tokenizer import SETTINGS, train_tokenizer  # noqa: E402

SEED = 20261128
CONTEXT, BATCH, RATE, STEPS = 512, 4, 3e-3, 1500
WARM_STEPS = 60
TOKENIZER_SIZE, TOKENIZER_CHARACTERS = 4000, 4_000_000
PACKAGE_SUFFIXES = {".py", ".pyi", ".md", ".rst", ".h"}
PACKAGE_CHARACTERS, LONGEST_DOCUMENT = 12_000_000, 200_000
HELD_OUT_DOCUMENTS, HELD_OUT_CHARACTERS = 40, 1500  # of held-out.txt: pieces of as many documents
CONFIG = MixtralConfig(
    vocab_size=4096,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=CONTEXT,
    num_local_experts=8,
    num_experts_per_tok=2,
    router_aux_loss_coef=0.02,
    bos_token_id=1,
    eos_token_id=2,
)
Tokens = npt.NDArray[np.uint16]


def documents(packages: Path) -> Iterator[tuple[str, str]]:
    """Names and texts: all of the standard library, and PACKAGE_CHARACTERS of the packages, in the order of the digests
    of their names."""
    for document in corpus.documents():
        yield document.name, document.text
    files = [path for path in packages.rglob("*") if path.suffix in PACKAGE_SUFFIXES or path.name.startswith("LICEN")]
    named = sorted(
        (hashlib.sha256(name.encode()).digest(), name) for name in (str(f.relative_to(packages)) for f in files)
    )
    room = PACKAGE_CHARACTERS
    for _, name in named:
        path = packages / name
        if not path.is_file() or path.stat().st_size > LONGEST_DOCUMENT or "__pycache__" in name:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        room -= len(text)
        if room < 0:
            return
        yield name, text


def held_out_text(texts: list[str]) -> str:
    """Pieces from the middle of held-out documents that lie evenly among all of them."""
    long = [text for text in texts if len(text) > 2 * HELD_OUT_CHARACTERS]
    chosen = long[:: max(1, len(long) // HELD_OUT_DOCUMENTS)][:HELD_OUT_DOCUMENTS]
    middles = [len(text) // 2 for text in chosen]
    return "\n\n".join(text[m : m + HELD_OUT_CHARACTERS] for text, m in zip(chosen, middles, strict=True)) + "\n"


def train(tokens: Tokens, steps: int, log: list[dict[str, Any]]) -> MixtralForCausalLM:
    """AdamW with a linear warm-up and a linear fall to 2 %; transformers adds the load-balancing loss."""
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    model = MixtralForCausalLM(CONFIG).train()
    matrices = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim == 1]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": others, "weight_decay": 0.0}]
    optimiser = torch.optim.AdamW(groups, lr=RATE, betas=(0.9, 0.95), fused=True)
    started, running = time.process_time(), []
    for step in range(steps):
        factor = min((step + 1) / WARM_STEPS, max(0.02, 1 - step / steps))
        for group in optimiser.param_groups:
            group["lr"] = RATE * factor
        starts = rng.integers(0, len(tokens) - CONTEXT, BATCH)
        rows = torch.from_numpy(np.stack([tokens[s : s + CONTEXT] for s in starts]).astype(np.int64))
        rows[:, 0] = CONFIG.bos_token_id
        with torch.autocast("cpu", dtype=torch.bfloat16):
            output = model(rows, labels=rows, output_router_logits=True, use_cache=False)
        optimiser.zero_grad(set_to_none=True)
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        running.append((output.loss - CONFIG.router_aux_loss_coef * output.aux_loss).item())
        if (step + 1) % 50 == 0:
            seconds = round(time.process_time() - started)
            log.append({"step": step + 1, "loss": round(math.fsum(running) / len(running), 4), "processor_s": seconds})
            running.clear()
            print(log[-1], file=sys.stderr, flush=True)
    return model.eval()


def bits_per_byte(model: MixtralForCausalLM, ids: list[int], num_bytes: int) -> float:
    """Bits that the model takes for a text of `num_bytes` bytes in windows of CONTEXT, each after a start token."""
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(ids), CONTEXT - 1):
            rows = torch.tensor([[CONFIG.bos_token_id, *ids[start : start + CONTEXT - 1]]])
            logits = model(rows, use_cache=False).logits[0, :-1].float()
            nats += torch.nn.functional.cross_entropy(logits, rows[0, 1:], reduction="sum").item()
    return nats / math.log(2) / num_bytes


def unigram_bits_per_byte(tokens: Tokens, ids: list[int], num_bytes: int) -> float:
    counts = np.bincount(tokens, minlength=CONFIG.vocab_size).astype(np.float64) + 1
    return float(-np.log2(counts / counts.sum())[ids].sum() / num_bytes)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--packages", type=Path, default=Path(sysconfig.get_path("purelib")))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--threads", type=int, default=1, help="of PyTorch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    kept, held_out = [], []
    for name, text in documents(options.packages):
        (held_out if corpus.is_held_out(name) else kept).append(text)
    tokenizer = train_tokenizer("".join(kept[:: max(1, len(kept) // 600)])[:TOKENIZER_CHARACTERS], TOKENIZER_SIZE)
    options.output.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(options.output / "tokenizer.json"))
    (options.output / "tokenizer_config.json").write_text(json.dumps(SETTINGS, indent=2) + "\n")
    text = held_out_text(held_out)
    (options.output / "held-out.txt").write_text(text, encoding="utf-8")
    encoded = (tokenizer.encode(piece).ids for piece in kept)
    tokens = np.concatenate([np.array(ids, dtype=np.uint16) for ids in encoded])
    print(f"{len(kept)} documents, {len(tokens)} tokens; {len(held_out)} held out", file=sys.stderr, flush=True)
    losses: list[dict[str, Any]] = []
    model = train(tokens, options.steps, losses)
    model.save_pretrained(options.output)
    ids, num_bytes = tokenizer.encode(text, add_special_tokens=False).ids, len(text.encode())
    report = {
        "tokens": len(tokens),
        "tokens_seen": options.steps * BATCH * CONTEXT,
        "held_out": {
            "bytes": num_bytes,
            "tokens": len(ids),
            "bits_per_byte": round(bits_per_byte(model, ids, num_bytes), 4),
            "unigram_bits_per_byte": round(unigram_bits_per_byte(tokens, ids, num_bytes), 4),
        },
        "losses": losses,
    }
    (options.output / "training.json").write_text(json.dumps(report, indent=1) + "\n")
    print(report["held_out"], file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
