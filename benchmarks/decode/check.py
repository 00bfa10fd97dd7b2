"""Checks that the benchmark's GGUF files are a working model: compares llama.cpp and ik_llama.cpp with transformers.

A small model with grouped heads is written in float32 and in each precision. Two things are checked. The types and all
bytes of the tensors must equal llama.cpp's own conversion of the float32 file. The logits of every position of a text,
decoded one by one and as a prompt, must agree with MixtralForCausalLM on the file's dequantised weights. GGUF and
transformers order the rows of query and key differently; a run that ignores this shows that the comparison can fail.

ik_llama.cpp (package 0.1.5) adds the output of a Mixtral's experts to the normalised input instead of the input: its
build_llama passes the wrong tensor to llm_build_moe_ffn. The number of additions is the same, so its speed is that of a
correct model. Its logits are compared with those of a transformers model with the same error.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from decode import llama_formats
from decode.contenders import CHOICES, Task, mixtral
from decode.entrants import gguf_path
from decode.gguf_model import gguf, write_model
from decode.logits import logits_of
from export.architecture import Architecture
from synthetic_checkpoint import PHIXTRAL

SMALL = replace(
    PHIXTRAL, family="mixtral", hidden_size=512, num_layers=3, num_heads=8, num_kv_heads=4, head_size=64, rotary_dim=64,
    ffn_size=768, vocab_size=1024, max_positions=256,
)  # fmt: skip
NUM_TOKENS = 48
# Limits on the relative difference of logits: root mean square of the difference divided by root mean square of the
# logits, median over positions. The median is used because rounding decides between experts with nearly equal logits,
# and then that position and later ones differ by more. In float32 the order of sums differs, and with flash attention
# queries are in float16. At 4 bits both libraries also round activations to 8 bits. ik_llama.cpp keeps keys and values
# in float16 at least.
MOST = {"f32": 1e-5, "q4_0": 0.1, "q4_k_m": 0.1, "iq4_xs": 0.1}
MOST_WITH_HALF = 2e-3
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
    """One comparison: what was compared, the figure, and its upper limit (lower limit for a run that has to fail)."""

    what: str
    found: float
    limit: float
    at_least: bool = False

    @property
    def holds(self) -> bool:
        return self.found >= self.limit if self.at_least else self.found <= self.limit


def check_peer(folder: Path) -> int:
    """Make and print every comparison; returns 0 if all hold, else 1."""
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        findings = list(_findings(Path(scratch)))
    if not _has_ik():
        print("ik_llama.cpp is not checked: its package is not installed")
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
        expected = _reference(path, tokens)
        for settings in CHOICES["llama"]:
            limit = max(most, MOST_WITH_HALF) if settings["flash_attention"] else most
            task = _task(f"llama-{precision}", path, {**settings, "cache_type": _F32_CACHE})
            yield from _compare(task, tokens, expected, limit)
        if _has_ik():
            normalised = _reference(path, tokens, experts_join_normalised=True)
            for settings in CHOICES["ik"]:
                task = _task(f"ik-{precision}", path, settings)
                yield from _compare(task, tokens, normalised, max(most, MOST_WITH_HALF))
        wrong = _difference(_reference(path, tokens, permuted=False), expected)
        yield Finding(
            what=f"{precision}: without the rotary permutation",
            found=wrong,
            limit=2 * max(most, MOST_WITH_HALF),
            at_least=True,
        )


def _unlike(ours: Path, converted: Path) -> int:
    """The number of tensors whose types or bytes differ."""
    first, second = ({t.name: t for t in gguf().GGUFReader(path).tensors} for path in (ours, converted))
    return sum(
        name not in first
        or name not in second
        or first[name].tensor_type != second[name].tensor_type
        or not np.array_equal(first[name].data, second[name].data)
        for name in first.keys() | second.keys()
    )


def _has_ik() -> bool:
    return importlib.util.find_spec("ik_llama_cpp") is not None


def _task(contender: str, path: Path, settings: Mapping[str, Any]) -> Task:
    return Task(
        contender=contender, source=path, model=SMALL, positions=SMALL.max_positions, threads=2, settings=settings
    )


def _compare(task: Task, tokens: list[int], expected: Logits, limit: float) -> Iterator[Finding]:
    settings = ", ".join(f"{name} {'on' if value else 'off'}" for name, value in task.settings.items()
                         if isinstance(value, bool)).replace("_", " ")  # fmt: skip
    for how, found in logits_of(task, tokens).items():
        yield Finding(
            what=f"{task.contender}: logits, {how}, {settings}",
            found=_difference(found, expected[-len(found) :]),
            limit=limit,
        )


def _difference(found: Logits, expected: Logits) -> float:
    """The relative difference of logits [S, V], as defined at MOST; infinite if a logit is not finite."""
    if not np.isfinite(found).all():
        return float("inf")
    positions = np.mean((found - expected) ** 2, axis=-1) / np.mean(expected**2, axis=-1)
    return float(np.sqrt(np.median(positions)))


def _reference(path: Path, tokens: list[int], permuted: bool = True, experts_join_normalised: bool = False) -> Logits:
    """The logits [S, V] that transformers computes with a file's dequantised weights."""
    import torch

    package = gguf()
    weights = {t.name: package.dequantize(t.data, t.tensor_type) for t in package.GGUFReader(path).tensors}
    model = mixtral(SMALL, "fp32", "eager")
    state = {name: torch.from_numpy(np.array(value)) for name, value in _state(weights, permuted)}
    model.load_state_dict(state)
    if experts_join_normalised:
        for layer in model.model.layers:
            _join_normalised(layer)
    with torch.no_grad():
        logits: Logits = model(torch.tensor([tokens])).logits[0].numpy()
    return logits


def _join_normalised(layer: Any) -> None:  # noqa: ANN401 - transformers is not typed
    """Make a layer add its experts' output to the normalised input, as ik_llama.cpp does. The layer itself adds the
    input, so the difference of the two inputs is added to the experts' output."""
    kept: dict[str, Any] = {}
    layer.post_attention_layernorm.register_forward_hook(
        lambda _module, inputs, output: kept.update(difference=output - inputs[0])
    )
    layer.mlp.register_forward_hook(lambda _module, _inputs, output: output + kept["difference"])


def _state(weights: dict[str, npt.NDArray[Any]], permuted: bool) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Pairs of transformers' tensor name and values for the tensors of a GGUF file."""
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
    """Reorder the rows of a query or key matrix from GGUF to transformers. GGUF's `llama` rotates pairs of neighbouring
    rows of a head, transformers rotates the two halves of a head."""
    return rows.reshape(heads, model.head_size // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)
