"""TensorRT-LLM's networks of mixtures with the layers of `export.families.shared.llama_stack`, one function for each of
the library's classes.

Sources: tensorrt_llm/models/llama/{model,convert}.py, tensorrt_llm/models/qwen/{config,model,convert}.py,
tensorrt_llm/layers/moe.py (SharedMoE).
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from export.architecture import Architecture, Router
from export.families.shared.llama_stack import EMBEDDING, FINAL_NORM, HEAD, layer_name
from export.families.shared.trtllm_network import TrtllmNetwork

_TOP = MappingProxyType({EMBEDDING: "transformer.vocab_embedding", FINAL_NORM: "transformer.ln_f", HEAD: "lm_head"})
_MODULES = MappingProxyType(
    {
        "input_layernorm": "input_layernorm",
        "self_attn.qkv_proj": "attention.qkv",
        "self_attn.o_proj": "attention.dense",
        "post_attention_layernorm": "post_layernorm",
        "mlp.gate": "mlp.router",
        "mlp.experts.gate_up": "mlp.fc",
        "mlp.experts.down": "mlp.proj",
    }
)
_HEAD_NORMS = MappingProxyType(
    {"self_attn.q_norm": "attention.q_layernorm", "self_attn.k_norm": "attention.k_layernorm"}
)
_BESIDE = MappingProxyType(
    {"mlp.shared_expert.down_proj": "mlp.shared_expert.proj", "mlp.shared_expert_gate": "mlp.shared_expert_gate"}
)
_UP_AND_GATE = ("mlp.shared_expert.up_proj", "mlp.shared_expert.gate_proj")
_SCALED = ("linear", "llama3")


def llama_class(architecture: str) -> TrtllmNetwork:
    """LLaMAForCausalLM with experts; `architecture` is the key under which MODEL_MAP has the class."""
    return TrtllmNetwork(
        architecture=architecture,
        hidden_act="swiglu",
        scaled=_SCALED,
        pipeline=True,
        gated=True,
        layer=layer_name,
        top=_TOP,
        modules=_MODULES,
    )


def qwen_class(
    architecture: str, qwen_type: str, *, shared_expert: bool = False, head_norms: bool = False, module: str | None
) -> TrtllmNetwork:
    """QWenForCausalLM with experts; `architecture` is the key under which MODEL_MAP has the class, and `qwen_type` the
    value of config.json by which it chooses what its layers have. All layers have experts: the class knows no layer
    with one MLP instead. The weights of the chosen experts are divided by their sum or not, as config.json says.
    Attention's first matrix has biases where there are no `head_norms`."""

    def config(facts: Architecture) -> Mapping[str, Any]:
        return {
            "qwen_type": qwen_type,
            "attn_bias": not head_norms,
            "mlp_bias": False,
            "moe_intermediate_size": facts.ffn_size,
            "moe_shared_expert_intermediate_size": facts.shared_ffn_size or 0,
            "mlp_only_layers": [],
            "decoder_sparse_step": 1,
            "use_logn_attn": False,
            "seq_length": facts.max_positions,  # read by the class though the scaling that it is for is off
            "disable_weight_only_quant_plugin": False,
            "num_labels": 1,
            "tie_word_embeddings": False,
        }

    return TrtllmNetwork(
        architecture=architecture,
        module=module,
        hidden_act="swiglu",
        scaled=_SCALED,
        pipeline=True,
        gated=True,
        layer=layer_name,
        top=_TOP,
        modules={**_MODULES, **(_HEAD_NORMS if head_norms else {}), **(_BESIDE if shared_expert else {})},
        joined={"mlp.shared_expert.fc": _UP_AND_GATE} if shared_expert else {},
        routers=(Router(), Router(normalise=False)),
        head_norms=head_norms,
        shared_expert=shared_expert,
        config=config,
    )
