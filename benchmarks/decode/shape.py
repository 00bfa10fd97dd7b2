"""The models that llama.cpp runs beside our engines: their tensors, and what a token reads of them.

It runs the families of ARCHITECTURES in their own shape. It has no phixtral, and runs a Mixtral with as many weights in
its place: an expert of a Mixtral has three matrices of H x F', an expert of a phixtral two of H x F. F' is the multiple
of 256 nearest to 2/3 F, because llama.cpp's K-quants pack rows in blocks of 256. Everything else is equal: depth,
width, heads, experts, experts per token, vocabulary. Rounding F' changes the number of weights slightly; the report
states the numbers, and rates are not corrected for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from export.architecture import Architecture
from export.errors import ConfigError

ROW_MULTIPLE = 256
# Family -> general.architecture of its GGUF files.
ARCHITECTURES = {
    "mixtral": "llama", "qwen3_moe": "qwen3moe", "olmoe": "olmoe", "granitemoe": "granitemoe", "gpt_oss": "gpt-oss",
}  # fmt: skip
PAIRS = ("llama", "granitemoe")  # architectures whose rotary embedding turns neighbouring rows, not a head's halves
EXPERT_MATRICES = {"phixtral": 2, **dict.fromkeys(ARCHITECTURES, 3)}
WITH_SINKS = ("gpt_oss",)
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
_EXPERTS = "_exps"


@dataclass(frozen=True, kw_only=True)
class Tensor:
    """One tensor: its name in GGUF files (gguf-py's constants), and its shape with the outermost dimension first."""

    name: str
    shape: tuple[int, ...]

    @property
    def num_weights(self) -> int:
        return math.prod(self.shape)

    @property
    def is_plain(self) -> bool:
        """Whether llama.cpp keeps the tensor in float32 at every precision, as norms, biases and the router."""
        return len(self.shape) == 1 or self.name.endswith((".bias", "ffn_gate_inp.weight"))


def tensors(model: Architecture) -> list[Tensor]:
    """Every tensor of a model of ARCHITECTURES, in the order in which it is used. A tied head has none of its own."""
    inside = [
        Tensor(name=f"blk.{index}.{name}", shape=shape)
        for index in range(model.num_layers)
        for name, shape in _layer(model).items()
    ]
    table = (model.vocab_size, model.hidden_size)
    norm = Tensor(name="output_norm.weight", shape=(model.hidden_size,))
    head = [] if model.tied_head else [Tensor(name=HEAD, shape=table)]
    return [Tensor(name=EMBEDDING, shape=table), *inside, norm, *head]


def _layer(model: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of the tensors of one layer."""
    hidden, width, experts = model.hidden_size, model.ffn_size, model.num_experts
    queries, keys = model.num_heads * model.head_size, model.num_kv_heads * model.head_size
    attention = {
        "attn_q": (queries, hidden),
        "attn_k": (keys, hidden),
        "attn_v": (keys, hidden),
        "attn_output": (hidden, queries),
    }
    mixture = {
        "ffn_gate_inp": (experts, hidden),
        f"ffn_gate{_EXPERTS}": (experts, width, hidden),
        f"ffn_up{_EXPERTS}": (experts, width, hidden),
        f"ffn_down{_EXPERTS}": (experts, hidden, width),
    }
    normed = {None: (), "head": (model.head_size, model.head_size), "width": (queries, keys)}[model.qkv.norm]
    norms = dict(zip(("attn_q_norm.weight", "attn_k_norm.weight"), ((size,) for size in normed), strict=False))
    ffn_norm = "post_attention_norm" if model.family in WITH_SINKS else "ffn_norm"
    sinks = {"attn_sinks.weight": (model.num_heads,)} if model.family in WITH_SINKS else {}
    return {
        "attn_norm.weight": (hidden,),
        **_with_biases(attention, model.attention_bias),
        **norms,
        **sinks,
        f"{ffn_norm}.weight": (hidden,),
        **_with_biases(mixture, model.family in WITH_SINKS),
    }


def _with_biases(matrices: Mapping[str, tuple[int, ...]], biased: bool) -> dict[str, tuple[int, ...]]:
    """The weights [..., R, C] and, if `biased`, the biases [..., R] of matrices."""
    found = {}
    for name, shape in matrices.items():
        found[f"{name}.weight"] = shape
        if biased:
            found[f"{name}.bias"] = shape[:-1]
    return found


def share_read(name: str, model: Architecture) -> float:
    """The fraction of a tensor's bytes that decoding one token reads: K of E experts, one row of an embedding that is
    not the head too, all of anything else."""
    if _EXPERTS in name:
        return model.experts_per_token / model.num_experts
    return 1 / model.vocab_size if name == EMBEDDING and not model.tied_head else 1.0


def llama_model(facts: Architecture) -> Architecture:
    """The model that llama.cpp runs beside an engine: the same, or the Mixtral of equal weights for a phixtral.

    Raises ConfigError for other families, and for a Mixtral's widths that llama.cpp's K-quants cannot pack.
    """
    is_mixtral = ARCHITECTURES.get(facts.family, "llama") == "llama"
    return mixtral_of_equal_weights(facts) if is_mixtral else facts


def mixtral_of_equal_weights(facts: Architecture) -> Architecture:
    """The Mixtral whose expert matrices hold as many weights as those of `facts`, a phixtral or a Mixtral itself.

    Raises ConfigError for other families, and for widths that llama.cpp's K-quants cannot pack.
    """
    if facts.family not in ("phixtral", "mixtral"):
        raise ConfigError(
            f"shaping llama.cpp's model after a {facts.family}: expected a mixture of the families "
            f"{', '.join(EXPERT_MATRICES)}; benchmark an engine of one of these"
        )
    if facts.hidden_size % ROW_MULTIPLE:
        raise ConfigError(
            f"shaping llama.cpp's model after a {facts.family} of hidden size {facts.hidden_size}: its K-quants need "
            f"rows of a multiple of {ROW_MULTIPLE}; benchmark an engine of such a width"
        )
    wanted = facts.ffn_size * EXPERT_MATRICES[facts.family] / EXPERT_MATRICES["mixtral"]
    width = max(1, round(wanted / ROW_MULTIPLE)) * ROW_MULTIPLE
    return Architecture(**{**vars(facts), "family": "mixtral", "ffn_size": width, "rotary_dim": facts.head_size})


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Numbers of matrix weights of a model: of all, and of those that one token is multiplied with."""

    total: int
    active: int


def count_weights(facts: Architecture) -> Weights:
    """Count the weights of attention, router, experts, embedding and head, a tied one once. Norms and biases, less than
    a thousandth of all, are left out."""
    hidden = facts.hidden_size
    queries, keys = facts.num_heads * facts.head_size, facts.num_kv_heads * facts.head_size
    expert = EXPERT_MATRICES[facts.family] * hidden * facts.ffn_size
    shared = hidden * (2 * queries + 2 * keys + facts.num_experts)
    table = facts.vocab_size * hidden
    return Weights(
        total=facts.num_layers * (shared + facts.num_experts * expert) + (1 if facts.tied_head else 2) * table,
        active=facts.num_layers * (shared + facts.experts_per_token * expert) + table,
    )
