"""Stands for tensorrt_llm/quantization/mode.py: the algorithms by name, and the mode that layers ask."""

from __future__ import annotations

from enum import IntFlag, StrEnum, auto


class QuantAlgo(StrEnum):
    W8A16 = "W8A16"
    W4A16 = "W4A16"
    W4A16_AWQ = "W4A16_AWQ"
    W4A8_AWQ = "W4A8_AWQ"
    W4A16_GPTQ = "W4A16_GPTQ"
    W8A16_GPTQ = "W8A16_GPTQ"


class GroupwiseQuantAlgo(IntFlag):
    """What a group-wise product has besides weights and scales."""

    BIAS = auto()
    ZERO = auto()
    PRE_QUANT_SCALE = auto()
    W4A8_ALPHA = auto()
    INT8_WEIGHT = auto()


class QuantMode(IntFlag):
    INT4_WEIGHTS = auto()
    INT8_WEIGHTS = auto()
    PER_GROUP = auto()

    def is_int4_weight_only(self) -> bool:
        return bool(self & QuantMode.INT4_WEIGHTS)

    def is_int8_weight_only(self) -> bool:
        return bool(self & QuantMode.INT8_WEIGHTS)

    def is_weight_only(self) -> bool:
        return self.is_int4_weight_only() or self.is_int8_weight_only()

    def has_per_group_scaling(self) -> bool:
        return bool(self & QuantMode.PER_GROUP)

    def has_any_quant(self) -> bool:
        return bool(self)

    @staticmethod
    def use_weight_only(use_int4_weights: bool = False, per_group: bool = False) -> QuantMode:
        weights = QuantMode.INT4_WEIGHTS if use_int4_weights else QuantMode.INT8_WEIGHTS
        return weights | (QuantMode.PER_GROUP if per_group else QuantMode(0))

    @staticmethod
    def from_quant_algo(quant_algo: str | None) -> QuantMode:
        if quant_algo is None:
            return QuantMode(0)
        if quant_algo in (QuantAlgo.W8A16, QuantAlgo.W4A16):
            return QuantMode.use_weight_only(use_int4_weights=quant_algo == QuantAlgo.W4A16)
        if quant_algo in (QuantAlgo.W4A16_AWQ, QuantAlgo.W4A16_GPTQ):
            return QuantMode.use_weight_only(use_int4_weights=True, per_group=True)
        raise NotImplementedError(f"quant_algo {quant_algo!r} is not part of this stand-in")
