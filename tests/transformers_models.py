"""Which of transformers' models computes each family. Tests and programs of ci/ compare with that model;
`tests/torch_reference` makes it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from export.families.shared import phi_stack


def _as_it_is(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    return raw


@dataclass(frozen=True, kw_only=True)
class TransformersModel:
    """How transformers' model of a family is made from a checkpoint.

    `model` is the class in transformers. `name` converts a row's name to the class's name of that weight; "{}" in it
    stands for q, k and v, which are one row of the table and three tensors of the class. It returns None for a row that
    the class does not have. `router` is the path of the router's module inside a layer; None for a dense family.
    `config` converts a config.json to the keys of the class's configuration, from the JSON alone. `additions` is the
    module of tests/torch_reference that adds what the class lacks. `transposes`: the class stores the matrices of
    experts as [E, in, out].
    """

    model: str
    name: Callable[[str], str | None]
    router: str | None = None
    config: Callable[[Mapping[str, Any]], Mapping[str, Any]] = _as_it_is
    additions: str | None = None
    transposes: bool = False


def _llama_name(name: str) -> str:
    for ours, theirs in (("qkv_proj", "{}_proj"), ("gate_up.weight", "gate_up_proj"), ("down.weight", "down_proj")):
        name = name.replace(ours, theirs)
    return name


def _granitemoe_name(name: str) -> str:
    name = _llama_name(name).replace(".mlp.gate.", ".block_sparse_moe.router.")
    return name.replace(".mlp.", ".block_sparse_moe.")


def _gpt_oss_name(name: str) -> str:
    for matrix in ("gate_up", "down"):
        name = name.replace(f".{matrix}.bias", f".{matrix}_proj_bias")
    return _llama_name(name).replace(".mlp.gate.", ".mlp.router.")


def _phimoe_name(name: str) -> str:
    return _llama_name(name).replace(".mlp.gate.", ".mlp.router.")


TRANSFORMERS_MODELS: Mapping[str, TransformersModel] = {
    "phi": TransformersModel(
        model="PhiForCausalLM", name=phi_stack.transformers_name, config=phi_stack.transformers_config
    ),
    "phixtral": TransformersModel(
        model="PhiForCausalLM",
        name=phi_stack.transformers_name,
        router="mlp.gate",
        config=phi_stack.transformers_config,
        additions="phixtral",
    ),
    "mixtral": TransformersModel(model="MixtralForCausalLM", name=_llama_name, router="mlp.gate"),
    "gpt_oss": TransformersModel(model="GptOssForCausalLM", name=_gpt_oss_name, router="mlp.router", transposes=True),
    "phimoe": TransformersModel(model="PhimoeForCausalLM", name=_phimoe_name, router="mlp.router"),
    "olmoe": TransformersModel(model="OlmoeForCausalLM", name=_llama_name, router="mlp.gate"),
    "flex_olmo": TransformersModel(model="FlexOlmoForCausalLM", name=_llama_name, router="mlp.gate"),
    "qwen2_moe": TransformersModel(model="Qwen2MoeForCausalLM", name=_llama_name, router="mlp.gate"),
    "qwen3_moe": TransformersModel(model="Qwen3MoeForCausalLM", name=_llama_name, router="mlp.gate"),
    "mistral": TransformersModel(model="MistralForCausalLM", name=_llama_name),
    "llama": TransformersModel(model="LlamaForCausalLM", name=_llama_name),
    "qwen2": TransformersModel(model="Qwen2ForCausalLM", name=_llama_name),
    "qwen3": TransformersModel(model="Qwen3ForCausalLM", name=_llama_name),
    "granitemoe": TransformersModel(
        model="GraniteMoeForCausalLM", name=_granitemoe_name, router="block_sparse_moe.router"
    ),
}
