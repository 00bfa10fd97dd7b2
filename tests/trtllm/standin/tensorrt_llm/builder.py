"""Stands for tensorrt_llm/builder.py: a loaded model and a build config to an engine directory.

config.json is what upstream writes: version, pretrained_config and build_config with its plugin_config. A rank's
engine, there a compiled plan, holds its parameters as they were loaded, in the safetensors format.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load, save

from tensorrt_llm._utils import get_sm_version
from tensorrt_llm.bindings import KVCacheType
from tensorrt_llm.models import PretrainedConfig, PretrainedModel
from tensorrt_llm.models.convert_utils import Weights
from tensorrt_llm.plugin import PluginConfig
from tensorrt_llm.version import __version__


class SpeculativeDecodingMode:
    """Upstream keeps it in models/modeling_utils.py; of its kinds moeship uses none."""

    NONE = 1


@dataclasses.dataclass
class LoraConfig:
    lora_dir: list[str] = dataclasses.field(default_factory=list)
    lora_ckpt_source: str = "hf"
    max_lora_rank: int = 64
    lora_target_modules: list[str] = dataclasses.field(default_factory=list)
    trtllm_modules_to_hf_modules: dict[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass
class BuildConfig:
    max_input_len: int = 1024
    max_seq_len: int | None = None
    opt_batch_size: int = 8
    max_batch_size: int = 2048
    max_beam_width: int = 1
    max_num_tokens: int = 8192
    opt_num_tokens: int | None = None
    max_prompt_embedding_table_size: int = 0
    kv_cache_type: KVCacheType | None = None
    gather_context_logits: bool = False
    gather_generation_logits: bool = False
    strongly_typed: bool = True
    force_num_profiles: int | None = None
    profiling_verbosity: str = "layer_names_only"
    enable_debug_output: bool = False
    max_draft_len: int = 0
    speculative_decoding_mode: int = SpeculativeDecodingMode.NONE
    use_refit: bool = False
    input_timing_cache: str | None = None
    output_timing_cache: str | None = "model.cache"
    lora_config: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    weight_sparsity: bool = False
    weight_streaming: bool = False
    plugin_config: PluginConfig = dataclasses.field(default_factory=PluginConfig)
    use_strip_plan: bool = False
    max_encoder_input_len: int = 1024
    dry_run: bool = False
    visualize_network: str | None = None
    monitor_memory: bool = False
    use_mrope: bool = False

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self) | {"kv_cache_type": self.kv_cache_type and self.kv_cache_type.name}

    @classmethod
    def from_dict(cls, config: dict[str, Any]) -> BuildConfig:
        values = dict(config)
        values["plugin_config"] = PluginConfig(**values["plugin_config"])
        values["lora_config"] = LoraConfig(**values["lora_config"])
        if values["kv_cache_type"] is not None:
            values["kv_cache_type"] = KVCacheType[values["kv_cache_type"]]
        return cls(**values)


class EngineConfig:
    def __init__(self, pretrained_config: PretrainedConfig, build_config: BuildConfig, version: str) -> None:
        self.pretrained_config, self.build_config, self.version = pretrained_config, build_config, version

    @classmethod
    def from_json_file(cls, config_file: str) -> EngineConfig:
        """Raises KeyError for an architecture that nobody registered in this process."""
        config = json.loads(Path(config_file).read_text())
        pretrained = PretrainedConfig.from_dict(config["pretrained_config"])
        return cls(pretrained, BuildConfig.from_dict(config["build_config"]), config["version"])

    def to_dict(self) -> dict[str, Any]:
        build_config = self.build_config.to_dict()
        del build_config["dry_run"], build_config["visualize_network"]
        return {
            "version": self.version,
            "pretrained_config": self.pretrained_config.to_dict(),
            "build_config": build_config,
        }


class Engine:
    """One rank's engine."""

    def __init__(self, config: EngineConfig, engine: bytes | None) -> None:
        self.config, self.engine = config, engine

    def save(self, engine_dir: str) -> None:
        folder, rank = Path(engine_dir), self.config.pretrained_config.mapping.rank
        folder.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(folder / "lora", ignore_errors=True)
        if rank == 0:
            (folder / "config.json").write_text(json.dumps(self.config.to_dict(), indent=4))
        if self.engine is not None:
            (folder / f"rank{rank}.engine").write_bytes(self.engine)

    @classmethod
    def from_dir(cls, engine_dir: str, rank: int = 0) -> Engine:
        folder = Path(engine_dir)
        config = EngineConfig.from_json_file(str(folder / "config.json"))
        config.pretrained_config.set_rank(rank)
        return cls(config, (folder / f"rank{rank}.engine").read_bytes())

    def parameters(self) -> Weights:
        return load(self.engine)


def _init_lengths(config: PretrainedConfig, build_config: BuildConfig) -> None:
    if build_config.max_seq_len is None:
        build_config.max_seq_len = config.max_position_embeddings or 2048
    build_config.max_input_len = min(build_config.max_input_len, build_config.max_seq_len)
    if build_config.opt_num_tokens is None:
        build_config.opt_num_tokens = min(
            build_config.max_num_tokens, build_config.max_batch_size * build_config.max_beam_width
        )


def build(model: PretrainedModel, build_config: BuildConfig) -> Engine:
    """A rank's engine. Raises RuntimeError for weight-only quantisation on a Blackwell data-centre GPU."""
    build_config, mode = copy.deepcopy(build_config), model.config.quant_mode
    build_config.kv_cache_type = build_config.kv_cache_type or KVCacheType.PAGED
    plugins = build_config.plugin_config = build_config.plugin_config.resolved(model.config.dtype)
    plugins.paged_kv_cache = build_config.kv_cache_type == KVCacheType.PAGED
    plugins.paged_state = plugins.use_fp8_context_fmha = False
    plugins.nccl_plugin = model.config.dtype if model.config.mapping.world_size > 1 else None
    _init_lengths(model.config, build_config)
    if 100 <= get_sm_version() < 120 and mode.is_weight_only():
        raise RuntimeError("INT8/INT4 quantization is not supported on SM>=100.")
    if plugins.moe_plugin is None and mode.is_weight_only():
        raise ValueError(f"OOTB MOE does not support weight only quantization now, current quant mode: {mode}")
    if model.lm_head is not None and not model.lm_head.weight.is_inited():
        model.lm_head.weight.value = model.transformer.vocab_embedding.weight.value.clone()
    values = {
        name: parameter.value.contiguous()
        for name, parameter in model.named_parameters()
        if not parameter.is_buffer
    }  # fmt: skip
    engine = None if build_config.dry_run else save(values)
    return Engine(EngineConfig(model.config, build_config, __version__), engine)
