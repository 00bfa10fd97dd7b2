"""Stands for tensorrt_llm/quantization/quantize.py: swaps the layers of a model for their quantised kinds.

A layer is made anew from its constructor's arguments, read back as its attributes; mixtures too, since they take their
form when they are made. A list of exclude_modules replaces the default one.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from typing import Any

from tensorrt_llm._utils import get_init_params
from tensorrt_llm.layers import ColumnLinear, MixtureOfExperts, RowLinear
from tensorrt_llm.module import Module
from tensorrt_llm.quantization.layers import (
    WeightOnlyGroupwiseQuantColumnLinear,
    WeightOnlyGroupwiseQuantRowLinear,
    WeightOnlyQuantColumnLinear,
    WeightOnlyQuantRowLinear,
)
from tensorrt_llm.quantization.mode import QuantMode

DEFAULT_EXCLUDE_MODULES = (
    "*lm_head", "*router", "*vocab_embedding", "*position_embedding", "*block_embedding", "*shared_expert_gate",
)  # fmt: skip


def quantize_layers(
    model: Module, quant_config: Any, quant_map: dict[type, type], add_params: Callable[[dict[str, Any]], None]
) -> None:
    patterns = quant_config.exclude_modules
    patterns = DEFAULT_EXCLUDE_MODULES if patterns is None else patterns
    for name, module, parent in model.named_modules_with_parent():
        excluded = any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        is_mixture = isinstance(module, MixtureOfExperts)
        # Upstream looks a mixture up in the map by its base class, so that one with an expert beside the others becomes
        # one without where mixtures are made anew (in groups), and keeps its class where they are not.
        quant_cls = next((new for old, new in quant_map.items() if is_mixture and isinstance(module, old)), None)
        if is_mixture and quant_cls is None:
            quant_cls = type(module)
        if quant_cls is None and not excluded:
            quant_cls = next((new for old, new in quant_map.items() if isinstance(module, old)), None)
        if quant_cls is None:
            continue
        params = get_init_params(module, quant_cls)
        if is_mixture:
            params["quant_mode"] = QuantMode(0) if excluded else quant_config.quant_mode
        elif isinstance(module, ColumnLinear):
            params |= {"bias": module.bias is not None, "out_features": module.out_features * module.tp_size}
        else:
            params |= {"bias": module.bias is not None, "in_features": module.in_features * module.tp_size}
        if not is_mixture or MixtureOfExperts in quant_map:
            add_params(params)
        setattr(parent, name.rsplit(".", 1)[-1], quant_cls(**params))


def quantize(model: Any, quant_config: Any) -> Any:
    """The model with the layers that its quantisation asks for, changed in place."""
    mode, tp_rank = quant_config.quant_mode, model.config.mapping.tp_rank

    def add_channelwise(params: dict[str, Any]) -> None:
        params |= {"quant_mode": mode, "tp_rank": tp_rank}

    def add_groupwise(params: dict[str, Any]) -> None:
        params |= {
            "group_size": quant_config.group_size,
            "pre_quant_scale": quant_config.pre_quant_scale,
            "zero": quant_config.has_zero_point,
        }
        if "tp_rank" in params:
            params["tp_rank"] = tp_rank

    if mode.has_per_group_scaling():
        linears = {
            ColumnLinear: WeightOnlyGroupwiseQuantColumnLinear,
            RowLinear: WeightOnlyGroupwiseQuantRowLinear,
            MixtureOfExperts: MixtureOfExperts,
        }
        quantize_layers(model, quant_config, linears, add_groupwise)
    elif mode.is_weight_only():
        linears = {ColumnLinear: WeightOnlyQuantColumnLinear, RowLinear: WeightOnlyQuantRowLinear}
        quantize_layers(model, quant_config, linears, add_channelwise)
    return model
