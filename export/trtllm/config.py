"""The config.json of a TensorRT-LLM checkpoint, from which TensorRT-LLM builds its network.

Keys: tensorrt_llm/models/modeling_utils.py (PretrainedConfig, QuantConfig), models/phi/{config,model}.py (which reads
rotary_pct and rotary_base), models/{llama,qwen}/config.py, layers/moe.py (MoeConfig). Every key that changes a number
is written, and none is left to the library's default.
"""

from __future__ import annotations

import math
from typing import Any

from export.architecture import Router
from export.families import Model
from export.rotary import RotaryScaling
from export.trtllm.layout import LayoutOptions

# MoeConfig.ExpertScaleNormalizationMode: softmax over all logits, then the K largest of its values; and the K largest
# logits, then softmax over these K, which are the same values divided by their sum.
NONE, RENORMALIZE = 0, 1


def checkpoint_config(model: Model, options: LayoutOptions) -> dict[str, Any]:
    """All of config.json, as plain JSON values."""
    facts, network = model.architecture, model.family.trtllm_network()
    config: dict[str, Any] = {
        "architecture": network.architecture,
        "dtype": options.dtype,
        "logits_dtype": "float32",
        "vocab_size": facts.vocab_size,
        "hidden_size": facts.hidden_size,
        "num_hidden_layers": facts.num_layers,
        "num_attention_heads": facts.num_heads,
        "num_key_value_heads": facts.num_kv_heads,
        "head_size": facts.head_size,
        "intermediate_size": facts.ffn_size,
        "hidden_act": network.hidden_act,
        "norm_epsilon": facts.norm_epsilon,
        "position_embedding_type": "rope_gpt_neox",
        "max_position_embeddings": facts.max_positions,
        "rotary_base": facts.rope_base,
        "rotary_scaling": rotary_scaling(facts.rotary_scaling),
        "rotary_pct": rotary_share(facts.rotary_dim, facts.head_size),
        "rotary_embedding_dim": facts.rotary_dim,
        "use_parallel_embedding": False,
        "embedding_sharding_dim": 0,
        "qk_layernorm": False,  # the classes that norm queries and keys do not read it
        "mapping": options.parallel.mapping(),
        "quantization": options.precision.quantization(options.group_size),
    }
    if facts.is_moe:
        config["moe"] = {
            "num_experts": len(options.experts),
            "top_k": facts.experts_per_token,
            "normalization_mode": _normalization(facts.router),
        }
    if network.shared_expert and options.precision.bits:
        # Where weights are loaded the library compares the patterns with names of tensors, and takes "gate.weight" in a
        # name for a matrix to quantise (models/convert_utils.py); where layers are made, with names of modules.
        config["quantization"]["exclude_modules"].append("*shared_expert_gate.weight")
    return {**config, **network.config(facts)}


def _normalization(router: Router) -> int:
    """How the weights of chosen experts are made of the logits, by the library's number."""
    return RENORMALIZE if router.normalise else NONE


def rotary_scaling(scaling: RotaryScaling | None) -> dict[str, Any] | None:
    """The value of rotary_scaling, for the kinds that a network may have (TrtllmNetwork.scaled). Source:
    RopeEmbeddingUtils in tensorrt_llm/functional.py."""
    if scaling is None:
        return None
    if scaling.kind == "linear":
        return {"type": "linear", "factor": scaling.factor}
    assert scaling.kind == "llama3"
    return {
        "type": scaling.kind,
        "factor": scaling.factor,
        "low_freq_factor": scaling.low_freq_factor,
        "high_freq_factor": scaling.high_freq_factor,
        "original_max_position_embeddings": scaling.original_positions,
    }


def rotary_share(rotary_dim: int, head_size: int) -> float:
    """The value of rotary_pct for which int(head_size * rotary_pct), as the library computes it, is `rotary_dim`: the
    quotient, or the next float above it where rounding would lose a dimension."""
    share = rotary_dim / head_size
    return share if int(head_size * share) == rotary_dim else math.nextafter(share, 1.0)
