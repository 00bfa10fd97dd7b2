"""Checks that the benchmark's GGUF files are a working model: compares llama.cpp and ik_llama.cpp with transformers.

A small model of each family with grouped heads is written in float32 and in each precision. Two things are checked. The
types and all bytes of the tensors must equal llama.cpp's own conversion of the float32 file. The logits of every
position of a text, decoded one by one and as a prompt, must agree with the family's class of transformers on the file's
dequantised weights. For Mixtral and Granite-MoE GGUF and transformers order the rows of query and key differently; a
run that ignores this, or that reorders the rows of another family, shows that the comparison can fail.

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
from decode.shape import ARCHITECTURES, PAIRS
from export.architecture import Architecture, Scales
from synthetic_checkpoint import GPT_OSS, GRANITE, OLMOE, PHIXTRAL, QWEN3, llama_config, shortened

SMALL = replace(
    PHIXTRAL, family="mixtral", hidden_size=512, num_layers=3, num_heads=8, num_kv_heads=4, head_size=64, rotary_dim=64,
    ffn_size=768, vocab_size=1024, max_positions=256,
)  # fmt: skip
_SIZES: Mapping[str, Any] = {
    name: getattr(SMALL, name)
    for name in ("hidden_size", "num_heads", "num_kv_heads", "head_size", "rotary_dim", "ffn_size", "vocab_size",
                 "max_positions")
}  # fmt: skip
_MIXED: Mapping[str, Any] = {**_SIZES, "num_experts": 6, "experts_per_token": 3}
OTHERS = (
    replace(shortened(QWEN3, 3), **_MIXED),
    replace(shortened(OLMOE, 3), **{**_MIXED, "num_kv_heads": SMALL.num_heads}),  # all that llama.cpp takes
    # Larger factors of attention than the published ones, with which random weights attend to all positions alike.
    replace(shortened(GRANITE, 3), **_MIXED, scales=Scales(embedding=1.5, residual=0.8, attention=0.25, logits=6.0)),
    # Rows that are no whole blocks of 256, as in the published model.
    replace(shortened(GPT_OSS, 3), **{**_MIXED, "hidden_size": 576, "ffn_size": 320, "sliding_window": 20}),
)
OTHER_PRECISIONS = ("f32", "q4_0", "q4_k_m")
NUM_TOKENS = 48
# Limits on the relative difference of logits: root mean square of the difference divided by root mean square of the
# logits, median over positions. The median is used because rounding decides between experts with nearly equal logits,
# and then that position and later ones differ by more. In float32 the order of sums differs, and with flash attention
# queries are in float16. At 4 bits both libraries also round activations to 8 bits. ik_llama.cpp keeps keys and values
# in float16 at least.
MOST = {"f32": 1e-5, "q4_0": 0.1, "q4_k_m": 0.1, "iq4_xs": 0.1, "mxfp4": 0.1}
MOST_WITH_HALF = 2e-3
_F32_CACHE = 0  # ggml_type
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "post_attention_norm": "post_attention_layernorm",
}
_MIXTURE = {"granitemoe": "block_sparse_moe"}  # family -> the name of a layer's mixture, if it is not mlp
_ROUTER = {"granitemoe": "router", "gpt_oss": "router"}  # family -> the name of its router, if it is not gate
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
    if not _has_ik():
        print("ik_llama.cpp is not checked: its package is not installed")
    all_hold = True
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for model in (SMALL, *OTHERS):
            for finding in _findings(Path(scratch), model):
                bound = f"{'>=' if finding.at_least else '<='} {finding.limit:.1e}"
                verdict = "holds" if finding.holds else "FAILS"
                print(f"{model.family:<11}{finding.what:<66}{finding.found:>10.2e}  {bound}  {verdict}", flush=True)
                all_hold &= finding.holds
    return 0 if all_hold else 1


def precisions(model: Architecture) -> tuple[str, ...]:
    """The precisions that are checked of a model."""
    if model is SMALL:
        return tuple(name for name in MOST if name != "mxfp4")
    return (*OTHER_PRECISIONS, "mxfp4") if model.family == "gpt_oss" else OTHER_PRECISIONS


def _findings(folder: Path, model: Architecture) -> Iterator[Finding]:
    tokens = [int(i) for i in np.random.default_rng(1).integers(0, model.vocab_size, NUM_TOKENS)]
    plain = gguf_path(folder, model, "f32")
    for precision in precisions(model):
        most = MOST[precision]
        path = gguf_path(folder, model, precision)
        types = llama_formats.chosen_types(model, precision)
        write_model(path, model, types, llama_formats.quantize, llama_formats.FILE_TYPES[precision])
        if precision != "f32":
            converted = folder / "converted.gguf"
            llama_formats.quantise_file(plain, converted, precision)
            yield Finding(what=f"{precision}: tensors unlike llama.cpp's conversion", found=_unlike(path, converted),
                          limit=0)  # fmt: skip
        expected = _reference(path, model, tokens)
        for settings in CHOICES["llama"]:
            limit = max(most, MOST_WITH_HALF) if settings["flash_attention"] else most
            task = _task(f"llama-{precision}", path, model, {**settings, "cache_type": _F32_CACHE})
            yield from _compare(task, tokens, expected, limit)
        if model is SMALL and _has_ik():
            normalised = _reference(path, model, tokens, experts_join_normalised=True)
            for settings in CHOICES["ik"]:
                task = _task(f"ik-{precision}", path, model, settings)
                yield from _compare(task, tokens, normalised, max(most, MOST_WITH_HALF))
        wrong = _difference(_reference(path, model, tokens, reordered=not _turns_pairs(model)), expected)
        yield Finding(
            what=f"{precision}: with query and key in the other order",
            found=wrong,
            limit=2 * max(most, MOST_WITH_HALF),
            at_least=True,
        )


def _turns_pairs(model: Architecture) -> bool:
    return ARCHITECTURES[model.family] in PAIRS


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


def _task(contender: str, path: Path, model: Architecture, settings: Mapping[str, Any]) -> Task:
    return Task(
        contender=contender, source=path, model=model, positions=model.max_positions, threads=1, settings=settings
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


def _reference(
    path: Path,
    model: Architecture,
    tokens: list[int],
    reordered: bool | None = None,
    experts_join_normalised: bool = False,
) -> Logits:
    """The logits [S, V] that transformers computes with a file's dequantised weights. `reordered` says whether the rows
    of query and key are in another order there; None takes the family's."""
    import torch

    package = gguf()
    weights = {t.name: package.dequantize(t.data, t.tensor_type) for t in package.GGUFReader(path).tensors}
    network = mixtral(model, "fp32", "eager") if model is SMALL else transformers_model(model)
    pairs = _turns_pairs(model) if reordered is None else reordered
    state = {name: torch.from_numpy(np.array(value)) for name, value in state_of(model, weights, pairs)}
    network.load_state_dict(state, strict=not model.tied_head)
    if experts_join_normalised:
        for layer in network.model.layers:
            _join_normalised(layer)
    with torch.no_grad():
        logits: Logits = network(torch.tensor([tokens])).logits[0].numpy()
    return logits


def transformers_model(model: Architecture) -> Any:  # noqa: ANN401 - transformers is not typed
    """transformers' model of a family, with uninitialised weights in float32."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = llama_config(model)
    values.pop("quantization_config", None)
    if "rope_scaling" in values:
        values["rope_scaling"] = {**values["rope_scaling"], "truncate": True}  # llama.cpp always does
    values |= {"dtype": torch.float32, "head_dim": model.head_size, "experts_implementation": "eager"}
    config = AutoConfig.for_model(values.pop("model_type"), **values)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()


def _join_normalised(layer: Any) -> None:  # noqa: ANN401 - transformers is not typed
    """Make a layer add its experts' output to the normalised input, as ik_llama.cpp does. The layer itself adds the
    input, so the difference of the two inputs is added to the experts' output."""
    kept: dict[str, Any] = {}
    layer.post_attention_layernorm.register_forward_hook(
        lambda _module, inputs, output: kept.update(difference=output - inputs[0])
    )
    layer.mlp.register_forward_hook(lambda _module, _inputs, output: output + kept["difference"])


def state_of(
    model: Architecture, weights: Mapping[str, npt.NDArray[Any]], pairs: bool
) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """Pairs of transformers' tensor name and values for the tensors of a GGUF file. With `pairs` the file's rows of
    query and key are reordered."""
    for ours, theirs in _TOP.items():
        if f"{ours}.weight" in weights:
            yield f"{theirs}.weight", weights[f"{ours}.weight"]
    heads = {"attn_q": model.num_heads, "attn_k": model.num_kv_heads}
    mixture = _MIXTURE.get(model.family, "mlp")
    names = {**_LAYER, "ffn_gate_inp": f"{mixture}.{_ROUTER.get(model.family, 'gate')}"}
    for layer in range(model.num_layers):
        prefix = f"model.layers.{layer}"
        start = f"blk.{layer}."
        inside = {name.removeprefix(start): value for name, value in weights.items() if name.startswith(start)}
        for name, value in inside.items():
            ours, _, kind = name.rpartition(".")
            if ours in names:
                turned = _halves_from_pairs(value, heads[ours], model) if pairs and ours in heads else value
                yield f"{prefix}.{names[ours]}.{kind}", turned
        if "attn_sinks.weight" in inside:
            yield f"{prefix}.self_attn.sinks", inside["attn_sinks.weight"]
        for name, value in _experts(model, inside):
            yield f"{prefix}.{mixture}.experts.{name}", value


def _experts(model: Architecture, inside: Mapping[str, npt.NDArray[Any]]) -> Iterator[tuple[str, npt.NDArray[Any]]]:
    """A layer's experts as transformers keeps them: F rows of gate and then F of up, except in gpt-oss, whose columns
    alternate."""
    gate, up, down = (inside[f"ffn_{name}_exps.weight"] for name in ("gate", "up", "down"))
    if model.family != "gpt_oss":
        yield "gate_up_proj", np.concatenate([gate, up], axis=1)
        yield "down_proj", down
        return
    biases = [inside[f"ffn_{name}_exps.bias"] for name in ("gate", "up", "down")]
    yield "gate_up_proj", np.stack([gate, up], axis=2).reshape(len(gate), -1, gate.shape[2]).swapaxes(1, 2)
    yield "gate_up_proj_bias", np.stack(biases[:2], axis=2).reshape(len(gate), -1)
    yield "down_proj", down.swapaxes(1, 2)
    yield "down_proj_bias", biases[2]


def _halves_from_pairs(rows: npt.NDArray[Any], heads: int, model: Architecture) -> npt.NDArray[Any]:
    """Reorder the rows of a query or key matrix from GGUF to transformers. GGUF's `llama` rotates pairs of neighbouring
    rows of a head, transformers rotates the two halves of a head."""
    return rows.reshape(heads, model.head_size // 2, 2, -1).swapaxes(1, 2).reshape(rows.shape)
