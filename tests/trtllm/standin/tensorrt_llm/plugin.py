"""Stands for tensorrt_llm/plugin/plugin.py: the plugin settings, each of which is a flag of trtllm-build."""

from __future__ import annotations

import argparse
import dataclasses
from typing import Any

_DTYPES = ("auto", "float16", "float32", "bfloat16", "int32", "disable")
_CHOICES = {
    "gemm_plugin": (*_DTYPES, "fp8", "nvfp4"),
    "gemm_swiglu_plugin": ("fp8", "disable"),
    "fp8_rowwise_gemm_plugin": _DTYPES,
    "low_latency_gemm_plugin": ("fp8", "disable"),
    "low_latency_gemm_swiglu_plugin": ("fp8", "disable"),
    "gemm_allreduce_plugin": ("float16", "bfloat16", "disable"),
}


@dataclasses.dataclass
class PluginConfig:
    """Plugins by the type that they compute in ("auto": the model's, None: not used), features by yes or no."""

    dtype: str | None = None
    bert_attention_plugin: str | None = "auto"
    gpt_attention_plugin: str | None = "auto"
    gemm_plugin: str | None = None
    gemm_swiglu_plugin: str | None = None
    fp8_rowwise_gemm_plugin: str | None = None
    lora_plugin: str | None = None
    dora_plugin: bool = False
    moe_plugin: str | None = "auto"
    mamba_conv1d_plugin: str | None = "auto"
    nccl_plugin: str | None = "auto"
    low_latency_gemm_plugin: str | None = None
    low_latency_gemm_swiglu_plugin: str | None = None
    gemm_allreduce_plugin: str | None = None
    context_fmha: bool = True
    bert_context_fmha_fp32_acc: bool = False
    paged_kv_cache: bool | None = None
    remove_input_padding: bool = True
    tokens_per_block: int = 32
    use_paged_context_fmha: bool = True
    use_fp8_context_fmha: bool = True
    fuse_fp4_quant: bool = False
    multiple_profiles: bool = False
    paged_state: bool = True
    streamingllm: bool = False
    norm_quant_fusion: bool = False
    reduce_fusion: bool = False
    user_buffer: bool = False
    use_fused_mlp: bool = True
    pp_reduce_scatter: bool = False

    @classmethod
    def from_arguments(cls, arguments: argparse.Namespace) -> PluginConfig:
        given = {name: _parsed(value) for name, value in vars(arguments).items() if name in flag_defaults()}
        return cls(**given)

    def resolved(self, dtype: str) -> PluginConfig:
        """With the model's dtype for "auto"."""
        values = {name: dtype if value == "auto" else value for name, value in vars(self).items()}
        return PluginConfig(**values | {"dtype": dtype})

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


def _parsed(value: Any) -> Any:
    return {"enable": True, "disable": None}.get(value, value) if isinstance(value, str) else value


def flag_defaults() -> dict[str, Any]:
    """Flag -> default as the command line spells it."""
    own = {"dtype", "paged_kv_cache"}
    spelled = {True: "enable", False: "disable", None: "disable"}
    return {
        field.name: field.default if isinstance(field.default, (int, str)) and not isinstance(field.default, bool)
        else spelled[field.default]
        for field in dataclasses.fields(PluginConfig)
        if field.name not in own
    }  # fmt: skip


def add_plugin_argument(parser: argparse._ArgumentGroup) -> None:
    for name, default in flag_defaults().items():
        if isinstance(default, int):
            parser.add_argument(f"--{name}", type=int, default=default)
            continue
        is_switch = not name.endswith("_plugin") or name == "dora_plugin"
        choices = ("enable", "disable") if is_switch else _CHOICES.get(name, _DTYPES)
        parser.add_argument(f"--{name}", choices=choices, default=default)
