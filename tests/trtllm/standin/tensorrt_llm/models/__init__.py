"""Stands for tensorrt_llm/models/__init__.py: which class runs which architecture."""

from tensorrt_llm.models.llama.config import LLaMAConfig
from tensorrt_llm.models.llama.model import LLaMAForCausalLM
from tensorrt_llm.models.modeling_utils import PretrainedConfig, PretrainedModel, QuantConfig
from tensorrt_llm.models.qwen.config import QWenConfig
from tensorrt_llm.models.qwen.model import QWenForCausalLM

MODEL_MAP = {
    "LlamaForCausalLM": LLaMAForCausalLM,
    "MixtralForCausalLM": LLaMAForCausalLM,
    "Qwen2MoeForCausalLM": QWenForCausalLM,
    "Qwen3MoeForCausalLM": QWenForCausalLM,
}

__all__ = [
    "MODEL_MAP", "LLaMAConfig", "LLaMAForCausalLM", "PretrainedConfig", "PretrainedModel", "QWenConfig",
    "QWenForCausalLM", "QuantConfig",
]  # fmt: skip
