"""The model for llama.cpp, which has no phixtral: a Mixtral with as many weights as a given architecture.

An expert of a Mixtral has three matrices of H x F', an expert of a phixtral two of H x F. F' is the multiple of 256
nearest to 2/3 F, because llama.cpp's K-quants pack rows in blocks of 256. Everything else is equal: depth, width,
heads, experts, experts per token, vocabulary. Rounding F' changes the number of weights slightly; the report states the
numbers, and rates are not corrected for it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from export.architecture import Architecture
from export.errors import ConfigError

ROW_MULTIPLE = 256
EXPERT_MATRICES = {"phixtral": 2, "mixtral": 3}
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
_EXPERTS = "_exps.weight"


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
        """Whether llama.cpp keeps the tensor in float32 at every precision, as norms and the router."""
        return len(self.shape) == 1 or self.name.endswith("ffn_gate_inp.weight")


def tensors(model: Architecture) -> list[Tensor]:
    """Every tensor of a Mixtral, in the order in which it is used."""
    hidden, width, experts = model.hidden_size, model.ffn_size, model.num_experts
    queries, keys = model.num_heads * model.head_size, model.num_kv_heads * model.head_size
    layer = {
        "attn_norm.weight": (hidden,),
        "attn_q.weight": (queries, hidden),
        "attn_k.weight": (keys, hidden),
        "attn_v.weight": (keys, hidden),
        "attn_output.weight": (hidden, queries),
        "ffn_norm.weight": (hidden,),
        "ffn_gate_inp.weight": (experts, hidden),
        f"ffn_gate{_EXPERTS}": (experts, width, hidden),
        f"ffn_up{_EXPERTS}": (experts, width, hidden),
        f"ffn_down{_EXPERTS}": (experts, hidden, width),
    }
    inside = [
        Tensor(name=f"blk.{index}.{name}", shape=shape)
        for index in range(model.num_layers)
        for name, shape in layer.items()
    ]
    table = (model.vocab_size, hidden)
    norm = Tensor(name="output_norm.weight", shape=(hidden,))
    return [Tensor(name=EMBEDDING, shape=table), *inside, norm, Tensor(name=HEAD, shape=table)]


def share_read(name: str, model: Architecture) -> float:
    """The fraction of a tensor's bytes that decoding one token reads: K of E experts, one row of the embedding, all of
    anything else."""
    if name.endswith(_EXPERTS):
        return model.experts_per_token / model.num_experts
    return 1 / model.vocab_size if name == EMBEDDING else 1.0


def mixtral_of_equal_weights(facts: Architecture) -> Architecture:
    """The Mixtral whose expert matrices hold as many weights as those of `facts`, a phixtral or a Mixtral itself.

    Raises ConfigError for other families, and for widths that llama.cpp's K-quants cannot pack.
    """
    if facts.family not in EXPERT_MATRICES:
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
    """Count the weights of attention, router, experts, embedding and head. Norms and biases, less than a thousandth of
    all, are left out."""
    hidden = facts.hidden_size
    queries, keys = facts.num_heads * facts.head_size, facts.num_kv_heads * facts.head_size
    expert = EXPERT_MATRICES[facts.family] * hidden * facts.ffn_size
    shared = hidden * (2 * queries + 2 * keys + facts.num_experts)
    table = facts.vocab_size * hidden
    return Weights(
        total=facts.num_layers * (shared + facts.num_experts * expert) + 2 * table,
        active=facts.num_layers * (shared + facts.experts_per_token * expert) + table,
    )
