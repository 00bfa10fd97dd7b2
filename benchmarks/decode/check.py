"""Is the peer a working model? llama.cpp on the written files against transformers on the same weights.

A small model with grouped heads is written in float32 and in each precision. Checked are: the types and every byte
against llama.cpp's own conversion of the float32 file; the logits of every position of a text, decoded one by one and
as a prompt, against MixtralForCausalLM holding the file's dequantised weights. A run without the rotary permutation of
query and key rows, in which GGUF and transformers differ, shows that the comparison can fail.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from decode import llama_formats
from decode.contenders import Llama, Task, mixtral
from decode.entrants import gguf_path
from decode.gguf_model import gguf, write_model
from export.architecture import Architecture
from synthetic_checkpoint import PHIXTRAL

SMALL = replace(
    PHIXTRAL, family="mixtral", hidden_size=512, num_layers=3, num_heads=8, num_kv_heads=4, head_size=64, rotary_dim=64,
    ffn_size=768, vocab_size=1024, max_positions=256,
)  # fmt: skip
NUM_TOKENS = 48
# Root mean square of the logits' difference over that of the logits. float32 differs by the order of sums, and with
# flash attention by queries in float16; at 4 bits llama.cpp also rounds activations to 8 bits.
MOST = {"f32": 1e-5, "q4_0": 0.1, "q4_k_m": 0.1}
MOST_WITH_FLASH_ATTENTION = 2e-3
_F32_CACHE = 0  # ggml_type
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.gate",
}
_EXPERTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

Logits = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One comparison: what was compared, the figure, what it may be at most (or at least, where it has to fail)."""

    what: str
    found: float
    limit: float
    at_least: bool = False

    @property
    def holds(self) -> bool:
        return self.found >= self.limit if self.at_least else self.found <= self.limit


def check_peer(folder: Path) -> int:
    """Print every finding; 0 where all hold, else 1."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        findings = list(_findings(Path(scratch)))
    for finding in findings:
        bound = f"{'>=' if finding.at_least else '<='} {finding.limit:.1e}"
        print(f"{finding.what:<66}{finding.found:>10.2e}  {bound}  {'holds' if finding.holds else 'FAILS'}")
    return 0 if all(finding.holds for finding in findings) else 1


def _findings(folder: Path) -> Iterator[Finding]:
    tokens = [int(i) for i in np.random.default_rng(1).integers(0, SMALL.vocab_size, NUM_TOKENS)]
    plain = gguf_path(folder, SMALL, "f32")
    for precision, most in MOST.items():
        path = gguf_path(folder, SMALL, precision)
        types = llama_formats.chosen_types(SMALL, precision)
        write_model(path, SMALL, types, llama_formats.quantize, llama_formats.FILE_TYPES[precision])
        if precision != "f32":
            converted = folder / "converted.gguf"
            llama_formats.quantise_file(plain, converted, precision)
            yield Finding(what=f"{precision}: tensors unlike llama.cpp's conversion", found=_unlike(path, converted),
                          limit=0)  # fmt: skip
        expected = _reference(path, tokens, permuted=True)
        for flash in (True, False):
            for how, found in _llama_logits(path, tokens, flash):
                rows = expected if len(found) == len(tokens) else expected[-len(found) :]
                name = f"{precision}: logits, {how}, flash attention {'on' if flash else 'off'}"
                limit = max(most, MOST_WITH_FLASH_ATTENTION) if flash else most
                yield Finding(what=name, found=_difference(found, rows), limit=limit)
        wrong = _difference(_reference(path, tokens, permuted=False), expected)
        yield Finding(
            what=f"{precision}: without the rotary permutation",
            found=wrong,
            limit=2 * max(most, MOST_WITH_FLASH_ATTENTION),
            at_least=True,
        )


def _unlike(ours: Path, converted: Path) -> int:
    """How many tensors differ in type or in any byte."""
    first, second = ({t.name: t for t in gguf().GGUFReader(path).tensors} for path in (ours, converted))
    return sum(
        name not in first
        or name not in second
        or first[name].tensor_type != second[name].tensor_type
        or not np.array_equal(first[name].data, second[name].data)
        for name in first.keys() | second.keys()
    )


def _llama_logits(path: Path, tokens: list[int], flash: bool) -> Iterator[tuple[str, Logits]]:
    settings = {"flash_attention": flash, "cache_type": _F32_CACHE}
    task = Task(
        contender="llama", source=path, model=SMALL, positions=SMALL.max_positions, threads=2, settings=settings
    )
    llama = Llama(task)
    yield "decoded", np.stack([llama.logits([token]).copy() for token in tokens])
    llama.forget()
    yield "as a prompt", llama.logits(tokens).copy()[None]


def _difference(found: Logits, expected: Logits) -> float:
    """Root mean square of the difference over that of the expected; infinite where a logit is not a number."""
    if not np.isfinite(found).all():
        return float("inf")
    return float(np.sqrt(np.mean((found - expected) ** 2) / np.mean(expected**2)))


def _reference(path: Path, tokens: list[int], permuted: bool) -> Logits:
    """transformers' logits [S, V] on a file's dequantised weights."""
    import torch

    package = gguf()
    weights = {t.name: package.dequantize(t.data, t.tensor_type) for t in package.GGUFReader(path).tensors}
    model = mixtral(SMALL, "fp32", "eager")
    state = {name: torch.from_numpy(np.array(value)) for name, value in _state(weights, permuted)}
    model.load_state_dict(state)
    with torch.no_grad():
        logits: Logits = model(torch.tensor([tokens])).logits[0].numpy()
    return logits


def _state(weights: dict[str, npt.NDArray[Any]], permuted: bool) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """transformers' names and values of a GGUF file's tensors."""
    for ours, theirs in _TOP.items():
        yield f"{theirs}.weight", weights[f"{ours}.weight"]
    heads = {"attn_q": SMALL.num_heads, "attn_k": SMALL.num_kv_heads}
    for layer in range(SMALL.num_layers):
        prefix = f"model.layers.{layer}"
        inside = {name: weights[f"blk.{layer}.{name}.weight"] for name in (*_LAYER, *_EXPERTS)}
        for ours, theirs in _LAYER.items():
            value = inside[ours]
            if permuted and ours in heads:
                value = _halves_from_pairs(value, heads[ours], SMALL)
            yield f"{prefix}.{theirs}.weight", value
        gate, up, down = (inside[name] for name in _EXPERTS)
        yield f"{prefix}.mlp.experts.gate_up_proj", np.concatenate([gate, up], axis=1)
        yield f"{prefix}.mlp.experts.down_proj", down


def _halves_from_pairs(rows: npt.NDArray[Any], heads: int, model: Architecture) -> npt.NDArray[Any]:
    """GGUF's `llama` rotates neighbouring rows of a head, transformers the head's halves."""
    return rows.reshape(heads, model.head_size // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)
