"""The precisions of a TensorRT-LLM checkpoint: how its matrices are stored, and the `quantization` of its config.json.

| precision  | quant_algo   | weights                                                                        |
|------------|--------------|--------------------------------------------------------------------------------|
| fp32, fp16, bf16 | null   | floats                                                                         |
| int8       | W8A16        | one scale an output channel, codes of 8 bits                                   |
| int4       | W4A16        | one scale an output channel, codes of 4 bits                                   |
| int4_gptq  | W4A16_GPTQ   | one scale and zero for `group_size` neighbours along the input, packed here    |
| int4_awq   | W4A16_AWQ    | one scale for `group_size` neighbours, and a factor of each input, packed at load |

Router, norms, biases, embedding and head are never quantised.
Sources: tensorrt_llm/models/modeling_utils.py (QuantConfig), quantization/quantize.py (what is left out),
cpp/tensorrt_llm/kernels/cutlass_kernels/cutlass_preprocessors.cpp (packing), layers/moe.py, builder.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from export.errors import QuantizationError, unknown

GROUP_SIZES = (128, 64)  # group sizes that the library has kernels for; NVIDIA/TensorRT-LLM#988
# The library's own list (quantization/quantize.py). A list in config.json replaces it, so all of it is written.
EXCLUDED_MODULES = (
    "*lm_head", "*router", "*vocab_embedding", "*position_embedding", "*block_embedding", "*shared_expert_gate",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrtllmPrecision:
    """One row of the table above. `dtype` is set if the precision is a float type; `bits` is 0 if nothing is
    quantised."""

    name: str
    quant_algo: str | None
    bits: int
    grouped: bool
    dtype: str | None

    def quantization(self, group_size: int | None) -> dict[str, Any]:
        """The object `quantization` of config.json."""
        if self.quant_algo is None:
            return {"quant_algo": None, "kv_cache_quant_algo": None}
        found: dict[str, Any] = {
            "quant_algo": self.quant_algo,
            "kv_cache_quant_algo": None,
            "exclude_modules": list(EXCLUDED_MODULES),
        }
        if self.grouped:
            gptq = self.quant_algo == "W4A16_GPTQ"
            found |= {"group_size": group_size, "has_zero_point": gptq, "pre_quant_scale": not gptq}
        return found


def _row(
    name: str, algo: str | None, bits: int = 0, *, grouped: bool = False, dtype: str | None = None
) -> TrtllmPrecision:
    return TrtllmPrecision(name=name, quant_algo=algo, bits=bits, grouped=grouped, dtype=dtype)


TRTLLM_PRECISIONS: Mapping[str, TrtllmPrecision] = MappingProxyType(
    {
        row.name: row
        for row in (
            _row("fp32", None, dtype="float32"),
            _row("fp16", None, dtype="float16"),
            _row("bf16", None, dtype="bfloat16"),
            _row("int8", "W8A16", 8),
            _row("int4", "W4A16", 4),
            _row("int4_gptq", "W4A16_GPTQ", 4, grouped=True),
            _row("int4_awq", "W4A16_AWQ", 4, grouped=True),
        )
    }
)


def trtllm_precision(name: str) -> TrtllmPrecision:
    """The precision of this name. Raises QuantizationError that lists the known names."""
    if name not in TRTLLM_PRECISIONS:
        raise QuantizationError(f"choosing the precision: {unknown(name, TRTLLM_PRECISIONS, 'TensorRT-LLM has')}")
    return TRTLLM_PRECISIONS[name]


def float_type(precision: TrtllmPrecision, dtype: str | None) -> str:
    """The dtype of tensors that are not quantised; `dtype` None takes the default. Raises QuantizationError for a dtype
    that the precision does not allow."""
    allowed = [precision.dtype] if precision.dtype else ["float16", "bfloat16"]
    chosen = dtype or allowed[0]
    if chosen not in allowed:
        raise QuantizationError(
            f"choosing the dtype: {chosen!r} with --precision {precision.name}, expected {' or '.join(allowed)}"
        )
    return chosen


def architecture_problems(precision: TrtllmPrecision, sm: int, dtype: str) -> list[str]:
    """The reasons why a GPU of compute capability `sm` (89 means 8.9) cannot run this precision; empty if it can."""
    found = []
    if precision.bits and 100 <= sm < 120:
        found.append(
            f"SM {sm} (Blackwell) has no products of integer weights and float activations in TensorRT-LLM's engines "
            f"(tensorrt_llm/builder.py); build fp16 or bf16 there, or {precision.name} for another GPU"
        )
    if sm < 80 and dtype == "bfloat16":
        found.append(f"SM {sm} has no bfloat16; build with --dtype float16")
    if sm < 70:
        found.append(f"SM {sm} is older than TensorRT-LLM's kernels, which begin with SM 70")
    return found
