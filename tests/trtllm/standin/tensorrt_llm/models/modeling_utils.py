"""Stands for tensorrt_llm/models/modeling_utils.py: configs as JSON, checkpoints into models, the decoder's frame."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from tensorrt_llm._utils import get_init_params, str_dtype_to_torch
from tensorrt_llm.functional import PositionEmbeddingType, Tensor, gather_last_token_logits
from tensorrt_llm.layers import Attention, AttentionParams, Embedding, KeyValueCacheParams
from tensorrt_llm.logger import logger
from tensorrt_llm.mapping import Mapping
from tensorrt_llm.models.convert_utils import Weights, preprocess_weights
from tensorrt_llm.module import Module, ModuleList
from tensorrt_llm.quantization.mode import QuantMode
from tensorrt_llm.quantization.quantize import quantize


@dataclasses.dataclass
class QuantConfig:
    quant_algo: str | None = None
    kv_cache_quant_algo: str | None = None
    group_size: int = 128
    smoothquant_val: float = 0.5
    clamp_val: list[float] | None = None
    use_meta_recipe: bool = False
    has_zero_point: bool = False
    pre_quant_scale: bool = False
    exclude_modules: list[str] | None = None
    mamba_ssm_cache_dtype: str | None = None

    @property
    def quant_mode(self) -> QuantMode:
        return QuantMode.from_quant_algo(self.quant_algo)

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> QuantConfig:
        return cls(**config)

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class PretrainedConfig:
    """The facts of a checkpoint. Keys that no constructor names become attributes, with a warning."""

    def __init__(
        self,
        *,
        architecture: str,
        dtype: str,
        hidden_size: int,
        num_hidden_layers: int,
        num_attention_heads: int,
        vocab_size: int | None = None,
        hidden_act: str = "gelu",
        logits_dtype: str = "float32",
        norm_epsilon: float = 1e-05,
        position_embedding_type: PositionEmbeddingType | str = PositionEmbeddingType.learned_absolute,
        max_position_embeddings: int | None = None,
        rotary_embedding_dim: int | None = None,
        num_key_value_heads: int | None = None,
        intermediate_size: int | None = None,
        mapping: Mapping | dict[str, Any] | None = None,
        quantization: QuantConfig | dict[str, Any] | None = None,
        use_parallel_embedding: bool = False,
        embedding_sharding_dim: int = 0,
        head_size: int | None = None,
        qk_layernorm: bool = False,
        runtime_defaults: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.architecture, self.dtype, self.vocab_size = architecture, dtype, vocab_size
        self.hidden_size, self.num_hidden_layers = hidden_size, num_hidden_layers
        self.num_attention_heads, self.hidden_act = num_attention_heads, hidden_act
        self.logits_dtype, self.norm_epsilon, self.runtime_defaults = logits_dtype, norm_epsilon, runtime_defaults
        if isinstance(position_embedding_type, str):
            position_embedding_type = PositionEmbeddingType.from_string(position_embedding_type)
        self.position_embedding_type = position_embedding_type
        self.num_key_value_heads = num_attention_heads if num_key_value_heads is None else num_key_value_heads
        self.intermediate_size = hidden_size * 4 if intermediate_size is None else intermediate_size
        self.max_position_embeddings = max_position_embeddings
        self.mapping = Mapping.from_dict(mapping) if isinstance(mapping, dict) else mapping or Mapping()
        if isinstance(quantization, dict):
            quantization = QuantConfig.from_dict(quantization)
        self.quantization = quantization or QuantConfig()
        self.use_parallel_embedding, self.embedding_sharding_dim = use_parallel_embedding, embedding_sharding_dim
        self.head_size = hidden_size // num_attention_heads if head_size is None else head_size
        self.qk_layernorm = qk_layernorm
        if rotary_embedding_dim is None:
            rotary_embedding_dim = kwargs.get("rotary_dim", int(self.head_size * kwargs.get("rotary_pct", 1.0)))
        self.rotary_embedding_dim = rotary_embedding_dim
        for key, value in kwargs.items():
            setattr(self, key, value)
            logger.warning("Implicitly setting %s.%s = %s", type(self).__name__, key, value)

    @property
    def quant_mode(self) -> QuantMode:
        return self.quantization.quant_mode

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> PretrainedConfig:
        """A config of the class that the architecture's model names. Raises KeyError for one that is not registered."""
        from tensorrt_llm.models import MODEL_MAP

        return getattr(MODEL_MAP[config["architecture"]], "config_class", cls)(**config)

    @classmethod
    def from_json_file(cls, config_file: str) -> PretrainedConfig:
        return cls.from_dict(json.loads(Path(config_file).read_text()))

    @classmethod
    def from_checkpoint(cls, ckpt_dir: str) -> PretrainedConfig:
        return cls.from_json_file(str(Path(ckpt_dir) / "config.json"))

    def to_dict(self) -> dict[str, Any]:
        output = copy.deepcopy(self.__dict__)
        output["position_embedding_type"] = str(self.position_embedding_type)
        output["mapping"] = self.mapping.to_dict()
        del output["mapping"]["rank"]
        output["quantization"] = self.quantization.to_dict()
        return output

    def to_json_file(self, config_file: str) -> None:
        Path(config_file).write_text(json.dumps(self.to_dict(), indent=4))

    def set_rank(self, rank: int) -> None:
        self.mapping.rank = rank


class DecoderLayerList(ModuleList):
    """This pipeline rank's layers, each made with its index in the whole model and named by its index here."""

    def __init__(self, cls: Callable[[Any, int], Module], config: PretrainedConfig) -> None:
        self.num_hidden_layers = config.num_hidden_layers
        self.layer_list = config.mapping.pp_layers(config.num_hidden_layers)
        self.quant_mode = config.quant_mode
        super().__init__([cls(config, index) for index in self.layer_list])

    def forward(
        self,
        hidden_states: Tensor,
        use_cache: bool = False,
        attention_mask: Tensor | None = None,
        kv_cache_params: KeyValueCacheParams | None = None,
        attention_params: AttentionParams | None = None,
        mrope_params: Any = None,
        position_ids: Tensor | None = None,
        lora_params: Any = None,
        spec_decoding_params: Any = None,
        vision_token_mask: Tensor | None = None,
    ) -> Any:
        kv_cache_params.fill_none_tensor_list(len(self.layer_list))
        optional = {
            "position_ids": position_ids,
            "vision_token_mask": vision_token_mask,
            "lora_layer_params": lora_params,
            "spec_decoding_params": spec_decoding_params,
            "mrope_params": mrope_params,
        }
        given = {name: value for name, value in optional.items() if value is not None}
        presents = []
        for layer, past in zip(self, kv_cache_params.past_key_value, strict=True):
            hidden_states = layer(
                hidden_states,
                use_cache=use_cache,
                attention_mask=attention_mask,
                kv_cache_params=KeyValueCacheParams(past_key_value=[past]),
                attention_params=attention_params,
                **given,
            )
            if use_cache:
                hidden_states, present = hidden_states
                presents.append(present)
        return (hidden_states, presents) if use_cache else hidden_states


class PostInitCaller(type):
    """Calls __post_init__ once the whole chain of constructors has run."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:
        model = type.__call__(cls, *args, **kwargs)
        model.__post_init__()
        return model


class PretrainedModel(Module, metaclass=PostInitCaller):
    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__()
        self.config = config

    def __post_init__(self) -> None:
        quantize(self, self.config.quantization)
        if self.config.use_parallel_embedding:
            parallelize_embedding(self)

    @classmethod
    def from_config(cls, config: PretrainedConfig) -> PretrainedModel:
        return cls(config)

    @classmethod
    def from_checkpoint(
        cls, ckpt_dir: str, rank: int | None = None, config: PretrainedConfig | None = None
    ) -> PretrainedModel:
        """The model of one rank, its file loaded; quantised where the config asks for it and the file is not."""
        if config is None:
            config = PretrainedConfig.from_checkpoint(ckpt_dir)
        if rank is not None:
            config.set_rank(rank)
        path = Path(ckpt_dir) / f"rank{config.mapping.rank}.safetensors"
        assert path.is_file(), f"no {path}"
        weights = preprocess_weights(load_file(path), config)
        model = cls(config)
        model.load(weights)
        return model

    def load(self, weights: Weights) -> None:
        """Set every parameter. Raises RuntimeError for a tensor that is missing or of another shape; a head may be
        missing where the embedding is there, since the two may be one."""
        required, has_embedding = set(), any(name.endswith("vocab_embedding.weight") for name in weights)
        for name, parameter in self.named_parameters():
            shared = name.endswith("lm_head.weight") and name not in weights and has_embedding
            if not parameter.is_inited() and not shared:
                required.add(name)
        if not required <= weights.keys():
            raise RuntimeError(f"Required but not provided tensors:{required - weights.keys()}")
        if not weights.keys() <= required:
            logger.warning("Provided but not required tensors: %s", weights.keys() - required)
        for name, parameter in self.named_parameters():
            if name in weights:
                try:
                    parameter.value = weights[name]
                except Exception as error:
                    raise RuntimeError(f"Encounter error '{error}' for parameter '{name}'") from error


def parallelize_embedding(model: PretrainedModel) -> None:
    """Cut every embedding that is not cut yet among the tensor parallel ranks."""
    mapping = model.config.mapping
    for name, module, parent in model.named_modules_with_parent():
        if isinstance(module, Embedding) and module.tp_group is None:
            params = get_init_params(module) | {
                "tp_group": mapping.tp_group,
                "tp_size": mapping.tp_size,
                "tp_rank": mapping.tp_rank,
                "sharding_dim": model.config.embedding_sharding_dim,
            }
            setattr(parent, name.rsplit(".", 1)[-1], type(module)(**params))


class DecoderModelForCausalLM(PretrainedModel):
    def __init__(self, config: PretrainedConfig, transformer: Module, lm_head: Module | None) -> None:
        super().__init__(config)
        self.transformer = transformer
        self.lm_head = lm_head
        Attention.create_attention_const_params(self, config)
        self.position_embedding_type = config.position_embedding_type

    def forward(
        self,
        input_ids: Tensor,
        position_ids: Tensor | None = None,
        use_cache: bool = False,
        last_token_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        kv_cache_params: KeyValueCacheParams | None = None,
        attention_params: AttentionParams | None = None,
        mrope_params: Any = None,
        hidden_states: Tensor | None = None,
        prompt_embedding_table: Tensor | None = None,
        prompt_tasks: Tensor | None = None,
        prompt_vocab_size: Tensor | None = None,
        lora_params: Any = None,
        spec_decoding_params: Any = None,
    ) -> Any:
        """Token ids [T] of one sequence to logits [T or asked for, V] on the last pipeline rank, hidden states [T, H]
        on the others; with use_cache (that, the layers' caches)."""
        optional = {
            "lora_params": lora_params,
            "hidden_states": hidden_states,
            "prompt_embedding_table": prompt_embedding_table,
            "prompt_tasks": prompt_tasks,
            "prompt_vocab_size": prompt_vocab_size,
            "spec_decoding_params": spec_decoding_params,
            "mrope_params": mrope_params,
        }
        output = self.transformer.forward(
            input_ids=input_ids,
            position_ids=position_ids,
            use_cache=use_cache,
            attention_mask=attention_mask,
            kv_cache_params=kv_cache_params,
            attention_params=Attention.fill_attention_params(self, attention_params),
            **{name: value for name, value in optional.items() if value is not None},
        )
        result, presents = output if use_cache else (output, ())
        if self.config.mapping.is_last_pp_rank():
            logits = self.lm_head(gather_last_token_logits(result, last_token_ids))
            result = logits.to(str_dtype_to_torch(self.config.logits_dtype))
        return (result, presents) if use_cache else result
