"""The reference: transformers' own model of the family, float32 on CPU.

Independent of the engine but for the reading of tensors: its configuration is transformers' reading of config.json as
it stands, not the facts that the engine was built from. For a phixtral, which transformers lacks, it is its Phi with
a mixture for each MLP, written out expert by expert; proven by an identity: with all experts equal it is
PhiForCausalLM. For a Mixtral it is MixtralForCausalLM, whose router is told which of equal logits to prefer.

This module imports torch and transformers; it is imported only where a reference is asked for.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import MixtralConfig, MixtralForCausalLM, PhiConfig, PhiForCausalLM, PreTrainedModel
from transformers.models.mixtral.modeling_mixtral import MixtralRotaryEmbedding, MixtralTopKRouter

from export.architecture import Architecture
from export.errors import ConfigError
from export.families import Model
from export.families.phi import TRANSFORMERS_MODULES, TRANSFORMERS_TOP
from export.tensor_table import Weights

_LOADING_KEYS = (
    "dtype", "torch_dtype", "auto_map", "use_cache", "return_dict", "output_attentions", "output_hidden_states",
    "output_router_logits", "is_encoder_decoder", "chunk_size_feed_forward", "problem_type",
)  # fmt: skip


class Mixture(nn.Module):
    """E MLPs and a router. Of equal logits the lowest expert index wins: a stable sort keeps their order."""

    def __init__(
        self, gate: torch.Tensor, fc1: nn.ParameterDict, fc2: nn.ParameterDict, experts_per_token: int
    ) -> None:
        super().__init__()
        self.gate = nn.Linear(gate.shape[1], gate.shape[0], bias=False, device="meta")
        self.gate.weight = nn.Parameter(gate)  # [E, H]
        self.fc1, self.fc2 = fc1, fc2  # weight [E, F, H], bias [E, F]; weight [E, H, F], bias [E, H]
        self.experts_per_token = experts_per_token

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, S, H] to [B, S, H]."""
        tokens = x.reshape(-1, x.shape[-1])  # [T, H]
        logits, experts = torch.sort(self.gate(tokens), dim=-1, descending=True, stable=True)
        shares = torch.softmax(logits[:, : self.experts_per_token], dim=-1)  # [T, K]
        chosen = experts[:, : self.experts_per_token]
        result = torch.zeros_like(tokens)
        for e in range(self.gate.out_features):
            rows, place = torch.where(chosen == e)
            hidden = nn.functional.linear(tokens[rows], self.fc1["weight"][e], self.fc1["bias"][e])
            output = nn.functional.linear(
                nn.functional.gelu(hidden, approximate="tanh"), self.fc2["weight"][e], self.fc2["bias"][e]
            )
            result.index_add_(0, rows, output * shares[rows, place, None])
        return result.reshape(x.shape)


def load_reference(model: Model) -> PreTrainedModel:
    """The checkpoint as a transformers model in float32, with `generate` and all. Raises ConfigError for a family
    that has no reference."""
    loaders = {"phi": _load_phi, "phixtral": _load_phi, "mixtral": _load_mixtral}
    if model.family.name not in loaders:
        raise ConfigError(f"loading the reference: none is known for the family {model.family.name}")
    return loaders[model.family.name](model)


def _load_phi(model: Model) -> PhiForCausalLM:
    facts = model.architecture
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = PhiForCausalLM(_config(model)).eval()
    if facts.is_moe:
        for index, layer in enumerate(reference.model.layers):
            layer.mlp = _mixture(model.weights, f"transformer.h.{index}.moe", facts)
    state = dict(_state(model.weights, facts))
    missing, unexpected = reference.load_state_dict(state, strict=False, assign=True)
    absent = [name for name in missing if ".mlp." not in name or not facts.is_moe]
    if absent or unexpected:
        raise AssertionError(f"the reference and the table disagree: missing {absent}, unexpected {unexpected}")
    return reference


def _config(model: Model) -> PhiConfig:
    raw = model.weights.checkpoint.config
    config = PhiConfig.from_dict(_without_loading_keys(raw if raw["model_type"] == "phi" else _phi_spelling(raw)))
    config._attn_implementation = "eager"
    if model.architecture.is_moe:
        config.intermediate_size = 1  # replaced by the mixture
    return config


def _phi_spelling(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A phi-msft config.json in transformers' words; what may be absent is as in the published configuration_phi.py."""
    hidden, heads = raw["n_embd"], raw["n_head"]
    return {
        "vocab_size": raw["vocab_size"],
        "hidden_size": hidden,
        "intermediate_size": raw.get("n_inner") or 4 * hidden,
        "num_hidden_layers": raw["n_layer"],
        "num_attention_heads": heads,
        "num_key_value_heads": raw.get("n_head_kv") or heads,
        "max_position_embeddings": raw["n_positions"],
        "layer_norm_eps": raw["layer_norm_epsilon"],
        "hidden_act": raw["activation_function"],
        "tie_word_embeddings": raw.get("tie_word_embeddings", False),
        "bos_token_id": raw.get("bos_token_id"),
        "eos_token_id": raw.get("eos_token_id"),
        "rope_theta": 10000.0,
        # transformers takes int(D * factor); the quarter keeps a rounded quotient from losing a dimension.
        "partial_rotary_factor": (raw["rotary_dim"] + 0.25) / (hidden // heads),
    }


def _without_loading_keys(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json without what says how to load a model and what its calls return, which is settled here."""
    return {key: value for key, value in raw.items() if key not in _LOADING_KEYS}


def _mixture(weights: Weights, name: str, facts: Architecture) -> Mixture:
    def stacked(module: str) -> nn.ParameterDict:
        tensors = {kind: torch.from_numpy(weights.load(f"{name}.mlp.{module}.{kind}")) for kind in ("weight", "bias")}
        return nn.ParameterDict(tensors)

    gate = torch.from_numpy(weights.load(f"{name}.gate.weight"))
    return Mixture(gate, stacked("fc1"), stacked("fc2"), facts.experts_per_token)


def _state(weights: Weights, facts: Architecture) -> list[tuple[str, torch.Tensor]]:
    """transformers' names and tensors of all but the mixtures."""
    queries, keys = facts.num_heads * facts.head_size, facts.num_kv_heads * facts.head_size
    state = []
    for name in weights.table:
        stem, _, kind = name.rpartition(".")
        if ".moe." in name:
            continue
        tensor = torch.from_numpy(weights.load(name))
        if stem in TRANSFORMERS_TOP:
            state.append((f"{TRANSFORMERS_TOP[stem]}.{kind}", tensor))
            continue
        layer, module = stem.removeprefix("transformer.h.").split(".", 1)
        prefix = f"model.layers.{layer}"
        if module == "mixer.Wqkv":
            for letter, part in zip("qkv", tensor.split([queries, keys, keys]), strict=True):
                state.append((f"{prefix}.self_attn.{letter}_proj.{kind}", part.contiguous()))
        else:
            state.append((f"{prefix}.{TRANSFORMERS_MODULES[module]}.{kind}", tensor))
    return state


class LowestFirstRouter(MixtralTopKRouter):
    """Mixtral's router with the order of equal probabilities settled: of equals the lowest expert index wins."""

    def forward(self, hidden_states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """[T, H] to logits [T, E], the shares of the K chosen [T, K] and which they are, int64 [T, K]."""
        logits = nn.functional.linear(hidden_states, self.weight)
        probabilities, experts = torch.sort(torch.softmax(logits, dim=-1), dim=-1, descending=True, stable=True)
        chosen = probabilities[:, : self.top_k]
        return logits, chosen / chosen.sum(dim=-1, keepdim=True), experts[:, : self.top_k]


def mixtral_config(model: Model) -> MixtralConfig:
    """transformers' configuration of a Mixtral checkpoint; the number of experts a token is the model's, which may
    have been overridden."""
    config = MixtralConfig.from_dict(_without_loading_keys(model.weights.checkpoint.config))
    config.num_experts_per_tok = model.architecture.experts_per_token
    config._attn_implementation = "eager"
    config._experts_implementation = "eager"
    return config


def _load_mixtral(model: Model) -> MixtralForCausalLM:
    config = mixtral_config(model)
    with torch.device("meta"):
        reference = MixtralForCausalLM(config).eval()
        for layer in reference.model.layers:
            layer.mlp.gate = LowestFirstRouter(config)
    reference.model.rotary_emb = MixtralRotaryEmbedding(config)
    reference.load_state_dict(dict(_mixtral_state(model)), strict=True, assign=True)
    return reference


def _mixtral_state(model: Model) -> Iterator[tuple[str, torch.Tensor]]:
    """transformers' names and tensors, each loaded when it is asked for."""
    facts = model.architecture
    queries, keys = facts.num_heads * facts.head_size, facts.num_kv_heads * facts.head_size
    for name in model.weights.table:
        tensor = torch.from_numpy(model.weights.load(name))
        stem = name.removesuffix(".weight")
        if stem.endswith(".qkv_proj"):
            for letter, part in zip("qkv", tensor.split([queries, keys, keys]), strict=True):
                yield name.replace("qkv_proj", f"{letter}_proj"), part
        elif stem.endswith(".experts.gate_up"):  # rows in turn; transformers has all of gate, then all of up
            yield f"{stem}_proj", torch.cat([tensor[:, 0::2], tensor[:, 1::2]], dim=1)
        elif stem.endswith(".experts.down"):
            yield f"{stem}_proj", tensor
        else:
            yield name, tensor
