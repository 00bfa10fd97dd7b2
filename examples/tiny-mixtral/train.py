"""Train a small Mixtral of four experts, two per token, on the text that examples/tiny-phixtral/corpus.py reads.

    python train.py --output checkpoint [--threads N]

Writes transformers' MixtralForCausalLM in bfloat16 with a tokenizer of Llama's kind (pieces with marked spaces, bytes
as tokens of their own, a start token before every prompt), and training_log.jsonl beside the folder.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import MixtralConfig, MixtralForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tiny-phixtral"))
import corpus

SEED = 20261122
SPECIAL = ["<unk>", "<s>", "</s>"]
TOKENIZER_SIZE = 1000  # below vocab_size: padded rows must never be sampled
STEPS, CONTEXT, BATCH, RATE = 1000, 192, 16, 3e-3
CONFIG = MixtralConfig(
    vocab_size=1024,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    num_local_experts=4,
    num_experts_per_tok=2,
    router_aux_loss_coef=0.02,
    bos_token_id=1,
    eos_token_id=2,
)


def train_tokenizer(text: str) -> Tokenizer:
    """A BPE over words with the space before them; what it has no piece for becomes bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(
        vocab_size=TOKENIZER_SIZE, special_tokens=[*SPECIAL, *byte_tokens], limit_alphabet=100, show_progress=False
    )
    tokenizer.train_from_iterator(text.splitlines(keepends=True), trainer)
    # The trainer marks the bytes as special, which would leave them out of every decoded text.
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in SPECIAL]
    tokenizer = Tokenizer.from_str(json.dumps(content))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return tokenizer


def train(tokens: np.ndarray, log_file: Path) -> MixtralForCausalLM:
    """AdamW with a linear warm-up and a cosine to a tenth; transformers adds the load-balancing loss."""
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    model = MixtralForCausalLM(CONFIG).train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.05)
    started, running = time.monotonic(), []
    with log_file.open("w") as log:
        for step in range(STEPS):
            warm = min(1.0, (step + 1) / 50)
            for group in optimiser.param_groups:
                group["lr"] = RATE * warm * (0.1 + 0.45 * (1 + math.cos(math.pi * step / STEPS)))
            starts = rng.integers(0, len(tokens) - CONTEXT, BATCH)
            rows = torch.from_numpy(np.stack([tokens[s : s + CONTEXT] for s in starts]).astype(np.int64))
            rows[:, 0] = CONFIG.bos_token_id
            output = model(rows, labels=rows, output_router_logits=True, use_cache=False)
            optimiser.zero_grad(set_to_none=True)
            output.loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            running.append((output.loss - CONFIG.router_aux_loss_coef * output.aux_loss).item())
            if (step + 1) % 100 == 0:
                row = {
                    "step": step + 1,
                    "loss": round(float(np.mean(running)), 4),
                    "seconds": round(time.monotonic() - started),
                }
                running.clear()
                log.write(json.dumps(row) + "\n")
                print(row, file=sys.stderr)
    return model.eval()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for the checkpoint")
    parser.add_argument("--threads", type=int, help="of PyTorch (default: its own choice)")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    texts = [document.text for document in corpus.documents() if not document.held_out and document.slice != "tests"]
    tokenizer = train_tokenizer("".join(texts)[:4_000_000])
    tokens = np.concatenate([np.array(tokenizer.encode(text).ids, dtype=np.uint16) for text in texts])
    print(f"{len(tokens)} tokens", file=sys.stderr)
    options.output.mkdir(parents=True, exist_ok=True)
    model = train(tokens, options.output.parent / "training_log.jsonl")
    model.bfloat16().save_pretrained(options.output)
    tokenizer.save(str(options.output / "tokenizer.json"))
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (options.output / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
