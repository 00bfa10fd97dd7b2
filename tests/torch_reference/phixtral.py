"""The mixture of experts that replaces the MLPs of transformers' Phi in a phixtral reference, computed by expert.

Its proof is an identity: if all experts are equal, the model computes what PhiForCausalLM computes
(tests/trt_build/comparison/test_parity.py).
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from export.checkpoint.tensor_table import Weights
from export.families import Model


class Mixture(nn.Module):
    """E MLPs and a router. Among equal logits the lowest expert index is chosen, as the sort is stable."""

    def __init__(
        self, gate: torch.Tensor, fc1: nn.ParameterDict, fc2: nn.ParameterDict, experts_per_token: int
    ) -> None:
        super().__init__()
        self.gate = nn.Linear(gate.shape[1], gate.shape[0], bias=False, device="meta")
        self.gate.weight = nn.Parameter(gate)  # [E, H]
        self.fc1, self.fc2 = fc1, fc2  # weight [E, F, H], bias [E, F]; weight [E, H, F], bias [E, H]
        self.experts_per_token = experts_per_token

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Mixture's output [B, S, H] for hidden states [B, S, H]."""
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


def add(reference: PreTrainedModel, model: Model) -> None:
    """Replace the MLP by a mixture in each layer that has experts in the checkpoint."""
    for index, layer in enumerate(reference.model.layers):
        name = f"{model.family.layer(index)}.moe"
        if f"{name}.gate.weight" in model.weights.table:
            layer.mlp = _mixture(model.weights, name, model.architecture.experts_per_token)


def _mixture(weights: Weights, name: str, experts_per_token: int) -> Mixture:
    def stacked(module: str) -> nn.ParameterDict:
        tensors = {kind: torch.from_numpy(weights.load(f"{name}.mlp.{module}.{kind}")) for kind in ("weight", "bias")}
        return nn.ParameterDict(tensors)

    gate = torch.from_numpy(weights.load(f"{name}.gate.weight"))
    return Mixture(gate, stacked("fc1"), stacked("fc2"), experts_per_token)
