"""The reference: transformers' Phi, its MLPs replaced by a mixture where the checkpoint has experts, float32 on CPU.

Independent of the engine but for the reading of tensors: attention, rotary embedding, norms and head are transformers'
own; the mixture is written out expert by expert. Proven by an identity: with all experts equal it is PhiForCausalLM.

This module imports torch and transformers; it is imported only where a reference is asked for.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn
from transformers import PhiConfig, PhiForCausalLM

from export.architecture import Architecture
from export.errors import ConfigError
from export.families import Model
from export.families.phi import TRANSFORMERS_MODULES, TRANSFORMERS_TOP
from export.hidden_states import phi_config
from export.tensor_table import Weights


class Mixture(nn.Module):
    """E MLPs and a router. Of equal logits the lowest expert index wins: a stable sort keeps their order."""

    def __init__(
        self, gate: torch.Tensor, fc1: nn.ParameterDict, fc2: nn.ParameterDict, experts_per_token: int
    ) -> None:
        super().__init__()
        self.gate = nn.Parameter(gate)  # [E, H]
        self.fc1, self.fc2 = fc1, fc2  # weight [E, F, H], bias [E, F]; weight [E, H, F], bias [E, H]
        self.experts_per_token = experts_per_token

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[B, S, H] to [B, S, H]."""
        tokens = x.reshape(-1, x.shape[-1])  # [T, H]
        logits, experts = torch.sort(tokens @ self.gate.T, dim=-1, descending=True, stable=True)
        shares = torch.softmax(logits[:, : self.experts_per_token], dim=-1)  # [T, K]
        chosen = experts[:, : self.experts_per_token]
        result = torch.zeros_like(tokens)
        for e in range(self.gate.shape[0]):
            rows, place = torch.where(chosen == e)
            hidden = nn.functional.linear(tokens[rows], self.fc1["weight"][e], self.fc1["bias"][e])
            output = nn.functional.linear(
                nn.functional.gelu(hidden, approximate="tanh"), self.fc2["weight"][e], self.fc2["bias"][e]
            )
            result.index_add_(0, rows, output * shares[rows, place, None])
        return result.reshape(x.shape)


def load_reference(model: Model) -> PhiForCausalLM:
    """The checkpoint as a transformers model in float32, with `generate` and all. Raises ConfigError for a family
    that has no reference."""
    if model.family.name not in ("phi", "phixtral"):
        raise ConfigError(f"loading the reference: none is known for the family {model.family.name}")
    facts = model.architecture
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        reference = PhiForCausalLM(_config(facts)).eval()
    if facts.is_moe:
        for index, layer in enumerate(reference.model.layers):
            layer.mlp = _mixture(model.weights, f"transformer.h.{index}.moe", facts)
    state = dict(_state(model.weights, facts))
    missing, unexpected = reference.load_state_dict(state, strict=False, assign=True)
    absent = [name for name in missing if ".mlp." not in name or not facts.is_moe]
    if absent or unexpected:
        raise AssertionError(f"the reference and the table disagree: missing {absent}, unexpected {unexpected}")
    return reference


def _config(facts: Architecture) -> PhiConfig:
    config = phi_config(facts)
    config._attn_implementation = "eager"
    if facts.is_moe:
        config.intermediate_size = 1  # replaced by the mixture
    return config


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
