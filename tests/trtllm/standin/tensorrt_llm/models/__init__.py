"""Stands for tensorrt_llm/models/__init__.py: which class runs which architecture."""

from tensorrt_llm.models.llama.config import LLaMAConfig
from tensorrt_llm.models.llama.model import LLaMAForCausalLM
from tensorrt_llm.models.modeling_utils import PretrainedConfig, PretrainedModel, QuantConfig

MODEL_MAP = {"LlamaForCausalLM": LLaMAForCausalLM, "MixtralForCausalLM": LLaMAForCausalLM}

__all__ = ["MODEL_MAP", "LLaMAConfig", "LLaMAForCausalLM", "PretrainedConfig", "PretrainedModel", "QuantConfig"]
