"""Stands for tensorrt_llm/quantization/functional.py and the compiled operators behind it: the layout of weight-only
weights, and products with them.

A weight lies as the kernels read it. From the codes q of [K = in, N = out] (a mixture's experts one by one):
  4. rows are permuted in groups of 32 (int8: 16);
  5. the grid is turned: each column's codes follow each other along K;
  6. in tiles of 64 rows, four neighbouring columns (int8: two) lie together; not for a 2-D weight on SM90;
  7. codes become unsigned, and the eight (int8: four) of a 32-bit word are reordered.
The numbers are the steps of the converter that `weight_only_packing` in contract.json tells. Here the steps move a
grid of places, once a shape; packing and unpacking then are one look-up each.
Source: cpp/tensorrt_llm/kernels/cutlass_kernels/cutlass_preprocessors.cpp, cpp/tensorrt_llm/thop/weightOnlyQuantOp.cpp.
"""

from __future__ import annotations

import functools

import torch

from tensorrt_llm._utils import absent, get_sm_version

Tensor = torch.Tensor

_ROW_MAP = {
    4: (0, 1, 8, 9, 16, 17, 24, 25, 2, 3, 10, 11, 18, 19, 26, 27, 4, 5, 12, 13, 20, 21, 28, 29, 6, 7, 14, 15, 22, 23,
        30, 31),
    8: (0, 1, 8, 9, 2, 3, 10, 11, 4, 5, 12, 13, 6, 7, 14, 15),
}  # fmt: skip
_COLUMNS_TOGETHER = {4: 4, 8: 2}
_WORD_ORDER = {4: (0, 2, 4, 6, 1, 3, 5, 7), 8: (0, 2, 1, 3)}
_TILE_ROWS = 64
_BITS = {torch.quint4x2: 4, torch.int8: 8}


@functools.cache
def places(rows: int, columns: int, bits: int, interleaved: bool) -> Tensor:
    """For each code in the order of memory, which element k * N + n of the grid it is; int64 [K * N]. Raises
    ValueError for a shape that the layout does not fit."""
    if rows % _TILE_ROWS or columns % 64:
        raise ValueError(f"packing a weight of [{rows}, {columns}]: both must be multiples of 64")
    grid = torch.arange(rows * columns).reshape(rows, columns)
    step = len(_ROW_MAP[bits])
    grid = grid[[base + offset for base in range(0, rows, step) for offset in _ROW_MAP[bits]]]
    grid = grid.T
    if interleaved:
        together = _COLUMNS_TOGETHER[bits]
        grid = grid.reshape(columns // together, together, rows // _TILE_ROWS, _TILE_ROWS).transpose(1, 2)
    return grid.reshape(-1, 32 // bits)[:, list(_WORD_ORDER[bits])].reshape(-1)


def is_interleaved(dimensions: int, sm: int) -> bool:
    """Whether a weight of as many dimensions has its columns together: a mixture's always, others not on SM90."""
    return dimensions == 3 or not 90 <= sm < 100


def pack_codes(codes: Tensor, bits: int, interleaved: bool) -> Tensor:
    """Signed codes int8 [..., K, N] to int8 [..., K, N * bits / 8] as the kernels read them."""
    *experts, rows, columns = codes.shape
    unsigned = (codes.reshape(-1, rows * columns).int() + 2 ** (bits - 1)).to(torch.uint8)
    unsigned = unsigned[:, places(rows, columns, bits, interleaved)]
    if bits == 4:
        unsigned = unsigned[:, 0::2] | (unsigned[:, 1::2] << 4)
    return unsigned.view(torch.int8).reshape(*experts, rows, columns * bits // 8)


def unpack_codes(packed: Tensor, bits: int, interleaved: bool) -> Tensor:
    """The inverse of `pack_codes`."""
    *experts, rows, columns = packed.shape
    columns = columns * 8 // bits
    raw = packed.contiguous().view(torch.uint8).reshape(-1, rows * columns * bits // 8)
    if bits == 4:
        raw = torch.stack([raw & 15, raw >> 4], dim=-1).reshape(len(raw), -1)
    codes = torch.empty_like(raw)
    codes[:, places(rows, columns, bits, interleaved)] = raw
    return (codes.int() - 2 ** (bits - 1)).to(torch.int8).reshape(*experts, rows, columns)


def _round_half_away(x: Tensor) -> Tensor:
    whole = x.trunc()
    return whole + ((x - whole).abs() >= 0.5) * x.sign()


def symmetric_quantize_last_axis_of_batched_matrix(weight: Tensor, quant_type: torch.dtype) -> tuple[Tensor, Tensor]:
    """Weights [..., K, N] to packed codes int8 and the scale of each column [..., N] in the weights' dtype.

    Stands for torch.ops.trtllm.symmetric_quantize_last_axis_of_batched_matrix, which quantises a plain checkpoint when
    it is loaded. (The Python function upstream of the same name takes 2-D weights only.)
    """
    bits, values = _BITS[quant_type], weight.float()
    end = 2 ** (bits - 1)
    scale = values.abs().amax(dim=-2) / end
    codes = _round_half_away(values / scale.where(scale > 0, 1.0)[..., None, :]).clamp(-end, end - 1)
    interleaved = is_interleaved(weight.dim(), get_sm_version())
    return pack_codes(codes.to(torch.int8), bits, interleaved), scale.to(weight.dtype)


def preprocess_weights_for_mixed_gemm(tensor: Tensor, quant_mode: torch.dtype, act_dtype: torch.dtype) -> Tensor:
    """Signed codes to the kernels' layout. int4 codes come two neighbouring columns in a byte, the even one low."""
    absent(act_dtype=act_dtype != torch.float16)
    bits = _BITS[quant_mode]
    codes = tensor
    if bits == 4:
        raw = tensor.contiguous().view(torch.uint8).int()
        codes = torch.stack([raw & 15, raw >> 4], dim=-1).flatten(-2)
        codes = (codes - 16 * (codes > 7)).to(torch.int8)
    return pack_codes(codes, bits, is_interleaved(tensor.dim(), get_sm_version()))


def dequantize_channelwise(packed: Tensor, scale: Tensor, bits: int) -> Tensor:
    """float32 [..., K, N] of packed codes with one scale a column."""
    codes = unpack_codes(packed, bits, is_interleaved(packed.dim(), get_sm_version()))
    return codes.float() * scale.float()[..., None, :]


def dequantize_groupwise(packed: Tensor, scale: Tensor, zero: Tensor | None, group_size: int) -> Tensor:
    """float32 [..., K, N] of int4 codes that lie in a tensor [..., K, N / 4] of the model's dtype; a scale, and a zero
    point that is added, for each group of rows [..., K / g, N]."""
    codes = unpack_codes(packed.view(torch.int8), 4, is_interleaved(packed.dim(), get_sm_version()))
    weight = codes.float() * scale.float().repeat_interleave(group_size, dim=-2)
    return weight if zero is None else weight + zero.float().repeat_interleave(group_size, dim=-2)
