"""The checkpoints that a merge writes: of which models, their config.json, and the model each tensor is taken from.

  phixtral, from dense Phi-2s
    from expert e     transformer.h.{i}.mlp.fc1|fc2           -> transformer.h.{i}.moe.mlp.{e}.fc1|fc2
    from the prompts  gate rows                               -> transformer.h.{i}.moe.gate.weight
  mixtral, from dense Mistrals or from dense Llamas; under model.layers.{i}
    from expert e     mlp.gate_proj|down_proj|up_proj         -> block_sparse_moe.experts.{e}.w1|w2|w3
    from the prompts  gate rows                               -> block_sparse_moe.gate.weight
  qwen2_moe, from dense Qwen2s, and qwen3_moe, from dense Qwen3s; under model.layers.{i}
    from expert e     mlp.gate_proj|down_proj|up_proj         -> mlp.experts.{e}.gate_proj|down_proj|up_proj
    from the prompts  gate rows                               -> mlp.gate.weight
    of a qwen2_moe alone
    from the shared expert                the same matrices   -> mlp.shared_expert.gate_proj|down_proj|up_proj
    from the shared expert's prompts      one row             -> mlp.shared_expert_gate.weight
  all
    from the base     embedding, norms, attention, head       -> under the same name

A phixtral has the layout of mlabonne/phixtral-4x2_8 (model_type phi-msft). Its auto_map is left out: it names Python
files that do not travel with the merged checkpoint. The others have the names of the published files, which every
version of transformers and TensorRT-LLM read; mergekit 0.1.5 packs the experts of Mixtrals and Qwen3s as transformers 5
does. Their config.json says what mergekit's says (mergekit/moe/mixtral.py, qwen.py and qwen3.py). A mixtral and a
qwen2_moe have no sliding window, even where the base has one. In a Qwen's mixture every layer has experts, as wide as
the base's MLP, and the weights of the chosen ones are divided by their sum.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from export.architecture import Architecture
from export.checkpoint.shard_writer import PlannedTensor
from export.checkpoint.tensor_table import Join, Role
from export.errors import MergeError
from export.families import Family, Model, mixtral, phixtral, qwen2_moe, qwen3_moe
from export.families.shared.phi_stack import ROPE_BASE
from export.merge.layout import DTYPE_NAMES, MergedTensor

_MATRICES = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}  # of an expert of a Mixtral
_EXPERT_MATRIX = re.compile(
    r"(model\.layers\.\d+)\.(?:block_sparse_moe|mlp)\.(?:experts\.(\d+)|shared_expert)\.(w[123]|\w+_proj)\.weight"
)


@dataclass(frozen=True, kw_only=True)
class Output:
    """A kind of checkpoint that a merge writes.

    - `name`: its family; `sources`: the families of the dense models, all of which must be of one family.
    - `config(base, architecture, dtype, tokens)`: the config.json. `dtype` is a safetensors label, `tokens` are the
      keys of the token ids.
    - `tensors(architecture, dtype)`: the tensors, in the order of the family's table.
    - `problems(base)`: what of the base the layout cannot say.
    - `architecture(facts)`: the base's facts with those that the mixture has otherwise, beside its experts.
    - `has_shared`: whether every token goes through a shared expert. `drops_window`: whether the mixture has no sliding
      window where the base has one.
    """

    name: str
    sources: tuple[str, ...]
    config: Callable[[Model, Architecture, str, Mapping[str, Any]], dict[str, Any]]
    tensors: Callable[[Architecture, str], list[MergedTensor]]
    problems: Callable[[Model], list[str]]
    architecture: Callable[[Architecture], Architecture] = lambda facts: facts
    has_shared: bool = False
    drops_window: bool = True


def choose_output(base: Model, asked: str | None) -> Output:
    """The kind of checkpoint that is made of models like `base`. Raises MergeError if there is none, or if its name
    does not begin with `asked`."""
    where = base.weights.checkpoint.identity
    found = next((output for output in OUTPUTS if base.family.name in output.sources), None)
    if found is None:
        known = "; ".join(f"{' or '.join(output.sources)} into {output.name}" for output in OUTPUTS)
        raise MergeError(
            f"merging into {where}: the base is of family {base.family.name}; moeship merges dense models: {known}"
        )
    if asked is not None and not found.name.startswith(asked):
        raise MergeError(
            f"merging into {where}: architecture is {asked}, and the base is of family {base.family.name}, from which "
            f"moeship merges {found.name}; leave architecture out, or take another base"
        )
    return found


def phixtral_config(architecture: Architecture, dtype: str, tokens: Mapping[str, Any]) -> dict[str, Any]:
    """A phixtral's config.json. `dtype` is a safetensors label, `tokens` are the keys of the token ids."""
    heads, width = architecture.num_kv_heads, architecture.ffn_size
    return {
        "activation_function": "gelu_new",
        "architectures": ["PhiForCausalLM"],
        "attn_pdrop": 0.0,
        **tokens,
        "embd_pdrop": 0.0,
        "flash_attn": False,
        "flash_rotary": False,
        "fused_dense": False,
        "img_processor": None,
        "initializer_range": 0.02,
        "layer_norm_epsilon": architecture.norm_epsilon,
        "model_type": "phi-msft",
        "n_embd": architecture.hidden_size,
        "n_head": architecture.num_heads,
        "n_head_kv": None if heads == architecture.num_heads else heads,
        "n_inner": None if width == 4 * architecture.hidden_size else width,
        "n_layer": architecture.num_layers,
        "n_positions": architecture.max_positions,
        "num_experts_per_tok": architecture.experts_per_token,
        "num_local_experts": architecture.num_experts,
        "resid_pdrop": 0.1,
        "rotary_dim": architecture.rotary_dim,
        "tie_word_embeddings": False,
        "torch_dtype": DTYPE_NAMES[dtype],
        "vocab_size": architecture.vocab_size,
    }


def _phixtral_tensors(architecture: Architecture, dtype: str) -> list[MergedTensor]:
    tensors = []
    for spec in phixtral.FAMILY.tensors(architecture, ()):
        layer = int(spec.name.split(".")[2]) if spec.name.startswith("transformer.h.") else None
        for index, part in enumerate(spec.parts):
            planned = PlannedTensor(name=part.name, dtype=dtype, shape=part.shape)
            expert = index if spec.join is Join.STACK else None
            row = None if spec.role is Role.ROUTER else part.name.replace(f".moe.mlp.{index}.", ".mlp.")
            residual = ".mlp.fc2." in (row or "")
            tensors.append(MergedTensor(planned=planned, layer=layer, expert=expert, row=row, residual=residual))
    return tensors


def _phixtral_problems(base: Model) -> list[str]:
    identity, facts = base.weights.checkpoint.identity, base.architecture
    problems = []
    if facts.rope_base != ROPE_BASE:
        problems.append(
            f"the base ({identity}) has rope_theta {facts.rope_base:g}; the phi-msft layout has no key for it and "
            f"fixes it at {ROPE_BASE:g}"
        )
    if facts.rotary_scaling is not None:
        problems.append(
            f"the base ({identity}) has a scaled rotary embedding ({facts.rotary_scaling.described}); the phi-msft "
            "layout has no key for it"
        )
    return problems


_ROTARY_KEYS = ("rope_scaling", "rope_parameters", "original_max_position_embeddings")


def _stack_config(base: Model, architecture: Architecture, dtype: str, tokens: Mapping[str, Any]) -> dict[str, Any]:
    """The keys that config.json has of every mixture with Llama's layers."""
    raw = base.weights.checkpoint.config
    rotary = {key: raw[key] for key in _ROTARY_KEYS if raw.get(key)}
    return {
        "attention_dropout": 0.0,
        **tokens,
        "head_dim": architecture.head_size,
        "hidden_act": "silu",
        "hidden_size": architecture.hidden_size,
        "initializer_range": 0.02,
        "intermediate_size": architecture.ffn_size,
        "max_position_embeddings": raw["max_position_embeddings"],
        "model_type": architecture.family,
        "num_attention_heads": architecture.num_heads,
        "num_experts_per_tok": architecture.experts_per_token,
        "num_hidden_layers": architecture.num_layers,
        "num_key_value_heads": architecture.num_kv_heads,
        "output_router_logits": False,
        "rms_norm_eps": architecture.norm_epsilon,
        "rope_theta": architecture.rope_base,
        **rotary,
        "router_aux_loss_coef": 0.001,
        "tie_word_embeddings": architecture.tied_head,
        "torch_dtype": DTYPE_NAMES[dtype],
        "use_cache": True,
        "vocab_size": architecture.vocab_size,
    }


def _mixtral_config(base: Model, architecture: Architecture, dtype: str, tokens: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["MixtralForCausalLM"],
        **_stack_config(base, architecture, dtype, tokens),
        "num_local_experts": architecture.num_experts,
        "router_jitter_noise": 0.0,
        "sliding_window": None,
    }


def _qwen_config(base: Model, architecture: Architecture, dtype: str, tokens: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_stack_config(base, architecture, dtype, tokens),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": architecture.ffn_size,
        "norm_topk_prob": True,
        "num_experts": architecture.num_experts,
        "sliding_window": architecture.sliding_window,
        "use_sliding_window": architecture.sliding_window is not None,
    }


def _qwen2_config(base: Model, architecture: Architecture, dtype: str, tokens: Mapping[str, Any]) -> dict[str, Any]:
    values = _qwen_config(base, architecture, dtype, tokens)
    if architecture.head_size * architecture.num_heads == architecture.hidden_size:
        del values["head_dim"]  # it is no key of transformers' Qwen2MoeConfig, which takes it from the width
    width = architecture.shared_ffn_size
    return {"architectures": ["Qwen2MoeForCausalLM"], **values, "shared_expert_intermediate_size": width}


def _qwen3_config(base: Model, architecture: Architecture, dtype: str, tokens: Mapping[str, Any]) -> dict[str, Any]:
    values = _qwen_config(base, architecture, dtype, tokens)
    return {"architectures": ["Qwen3MoeForCausalLM"], **values, "attention_bias": False}


def _qwen3_problems(base: Model) -> list[str]:
    full = base.architecture.full_layers
    if not full:
        return []
    return [
        f"the base ({base.weights.checkpoint.identity}) has a sliding window in some layers and none in "
        f"{len(full)} of {base.architecture.num_layers}; a qwen3_moe has it in all layers or in none"
    ]


def _stack_tensors(family: Family, architecture: Architecture, dtype: str) -> list[MergedTensor]:
    """The tensors of a mixture with Llama's layers, in their published names."""
    tensors: dict[str, MergedTensor] = {}
    for spec in family.tensors(architecture, ()):
        words = spec.name.split(".")
        layer = int(words[2]) if words[1] == "layers" else None
        for index, part in enumerate(spec.parts):
            planned = PlannedTensor(name=part.name, dtype=dtype, shape=part.shape)
            matrix = _EXPERT_MATRIX.fullmatch(part.name)
            if matrix is not None:
                stem, expert, letter = matrix.groups()
                of = _MATRICES.get(letter, letter)
                found = MergedTensor(
                    planned=planned,
                    layer=layer,
                    expert=architecture.num_experts if expert is None else int(expert),
                    row=f"{stem}.mlp.{of}.weight",
                    residual=of == "down_proj",
                )
            elif spec.role in (Role.ROUTER, Role.SHARE):
                expert = architecture.num_experts if spec.role is Role.SHARE else None
                found = MergedTensor(planned=planned, layer=layer, expert=expert, row=None)
            else:
                found = MergedTensor(planned=planned, layer=layer, expert=None, row=spec.name, part=index)
            tensors.setdefault(part.name, found)  # a tied head is the embedding, which comes before it
    return list(tensors.values())


def _as_qwen2_moe(facts: Architecture) -> Architecture:
    return replace(facts, shared_ffn_size=facts.ffn_size, sliding_window=None, full_layers=())


OUTPUTS = (
    Output(
        name="phixtral",
        sources=("phi",),
        config=lambda _base, *arguments: phixtral_config(*arguments),
        tensors=_phixtral_tensors,
        problems=_phixtral_problems,
    ),
    Output(
        name="mixtral",
        sources=("mistral", "llama"),
        config=_mixtral_config,
        tensors=partial(_stack_tensors, mixtral.FAMILY),
        problems=lambda _base: [],
    ),
    Output(
        name="qwen2_moe",
        sources=("qwen2",),
        config=_qwen2_config,
        tensors=partial(_stack_tensors, qwen2_moe.FAMILY),
        problems=lambda _base: [],
        architecture=_as_qwen2_moe,
        has_shared=True,
    ),
    Output(
        name="qwen3_moe",
        sources=("qwen3",),
        config=_qwen3_config,
        tensors=partial(_stack_tensors, qwen3_moe.FAMILY),
        problems=_qwen3_problems,
        drops_window=False,
    ),
)
