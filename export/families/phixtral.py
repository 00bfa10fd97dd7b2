"""phixtral: Phi-2 with a mixture of E Phi-2 MLPs in each layer instead of one MLP (mlabonne/phixtral-4x2_8).

The tensors that Phi-2 does not have, in each layer i:
  transformer.h.{i}.moe.gate.weight             [E, H]   no bias, never quantised
  transformer.h.{i}.moe.mlp.{e}.fc1.{weight,bias}   [F, H], [F]
  transformer.h.{i}.moe.mlp.{e}.fc2.{weight,bias}   [H, F], [H]
The router takes the K largest logits (among equal ones those of lower expert index), then the softmax over those K.
Source: the modeling_phi.py published with the model, and mlx-lm's phixtral.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from export.architecture import Architecture
from export.checkpoint.tensor_table import Part, Role, TensorSpec, single, stacked
from export.families import Family
from export.families.shared.network import Network
from export.families.shared.phi_stack import (
    BASE_MODULES,
    HARMLESS_TENSORS,
    has_experts,
    layer_name,
    read_msft_config,
    stack_graph,
    stack_head,
    stack_network,
    stack_tensors,
    stack_trtllm,
)

if TYPE_CHECKING:
    from export.onnx_graph.graph import GraphBuilder


def matches(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "phi-msft" and has_experts(config)


def read_config(raw: Mapping[str, Any]) -> Architecture:
    """Read the Architecture from a phixtral config.json. Raises ConfigError."""
    return read_msft_config(raw, "phixtral")


def moe_tensors(architecture: Architecture, layer: int) -> list[TensorSpec]:
    width, hidden, name = architecture.ffn_size, architecture.hidden_size, f"{layer_name(layer)}.moe"

    def experts(module: str, shape: tuple[int, ...], letters: str, role: Role) -> TensorSpec:
        parts = [Part(name=f"{name}.mlp.{e}.{module}", shape=shape) for e in range(architecture.num_experts)]
        return stacked(f"{name}.mlp.{module}", parts, letters, role)

    return [
        single(f"{name}.gate.weight", (architecture.num_experts, hidden), "E H", Role.ROUTER),
        experts("fc1.weight", (width, hidden), "E F H", Role.EXPERT),
        experts("fc1.bias", (width,), "E F", Role.BIAS),
        experts("fc2.weight", (hidden, width), "E H F", Role.EXPERT),
        experts("fc2.bias", (hidden,), "E H", Role.BIAS),
    ]


def tensors(architecture: Architecture, names: Sequence[str]) -> list[TensorSpec]:  # noqa: ARG001 - one spelling
    return stack_tensors(architecture, moe_tensors)


def _moe(graph: GraphBuilder, layer: int, normed: str) -> str:
    name = f"{layer_name(layer)}.moe"
    return graph.experts(
        normed, gate=f"{name}.gate.weight", fc1=f"{name}.mlp.fc1", fc2=f"{name}.mlp.fc2", name=name, activation="gelu"
    )


def decoder(graph: GraphBuilder, architecture: Architecture) -> str:
    return stack_graph(graph, architecture, _moe)


def network(raw: Mapping[str, Any]) -> Network:
    return stack_network(raw, "moe.mlp", gate="moe.gate")


FAMILY = Family(
    name="phixtral",
    matches=matches,
    read_config=read_config,
    tensors=tensors,
    decoder=decoder,
    head=stack_head,
    layer=layer_name,
    network=network,
    harmless_tensors=HARMLESS_TENSORS,
    base_modules=BASE_MODULES,
    trtllm=stack_trtllm(
        "PhixtralForCausalLM",
        {"moe.gate": "mlp.router", "moe.mlp.fc1": "mlp.fc", "moe.mlp.fc2": "mlp.proj"},
        module="phixtral",
    ),
)
