"""Small checkpoints whose linears are packed, for tests of what becomes of them; written with numpy alone.

That the formats are read rightly is shown by matrices of the field's own packers (tests/export/formats/test_golden.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

Array = npt.NDArray[Any]
LINEARS = (".Wqkv", ".out_proj", ".fc1", ".fc2", "_proj", ".dense", ".w1", ".w2", ".w3")


def packed_stream(codes: Array, bits: int) -> Array:
    """Pack codes [..., K] into int32 words [..., K * bits / 32], a stream of bits from the lowest bit on."""
    single = (codes[..., None] >> np.arange(bits, dtype=np.uint8) & 1).astype(np.uint8)
    flat = single.reshape(*codes.shape[:-1], -1)
    return np.packbits(flat, axis=-1, bitorder="little").view("<i4")


def gptq_parts(
    weight: Array, *, bits: int = 4, group_size: int = 32, sym: bool = False, ordered: bool = False, seed: int = 0
) -> dict[str, Array]:
    """The tensors of a linear in GPTQ's version 2, by their endings. Values are rounded to the nearest code."""
    rows, features = weight.shape
    groups = np.arange(features) // group_size
    if ordered:
        groups = np.random.default_rng(seed).permutation(groups)
    top, half = (1 << bits) - 1, 1 << (bits - 1)
    count = int(groups.max()) + 1
    scales, zeros = np.empty((count, rows), np.float16), np.full((count, rows), half, np.uint8)
    codes = np.empty((rows, features), np.uint8)
    for group in range(count):
        own = weight[:, groups == group].astype(np.float32)
        low, high = np.minimum(own.min(axis=1), -1e-3), np.maximum(own.max(axis=1), 1e-3)
        scales[group] = np.maximum(-low, high) / half if sym else (high - low) / top
        step = scales[group].astype(np.float32)
        if not sym:
            zeros[group] = np.clip(np.rint(-low / step), 1, top)
        codes[:, groups == group] = np.clip(np.rint(own / step[:, None]) + zeros[group][:, None], 0, top)
    return {
        "qweight": np.ascontiguousarray(packed_stream(codes, bits).T),
        "qzeros": packed_stream(zeros, bits),
        "scales": scales,
        "g_idx": groups.astype(np.int32),
    }


def pack_checkpoint(
    folder: Path,
    pack: Callable[[Array], dict[str, Array]],
    settings: dict[str, Any],
    linears: tuple[str, ...] = LINEARS,
) -> Path:
    """Pack the linears of a checkpoint in place, each with `pack`, and write `settings` as its quantization_config."""
    tensors = {}
    for name, values in load_file(folder / "model.safetensors").items():
        stem = name.removesuffix(".weight")
        if name.endswith(".weight") and values.ndim == 2 and stem.endswith(linears):
            tensors |= {f"{stem}.{ending}": part for ending, part in pack(values).items()}
        else:
            tensors[name] = values
    save_file(tensors, folder / "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    return folder


def pack_gptq(folder: Path, *, more_settings: dict[str, Any] | None = None, **options: Any) -> Path:
    """Pack the linears of a checkpoint as GPTQ does, version 2."""
    settings = {
        "quant_method": "gptq", "bits": options.get("bits", 4), "group_size": options.get("group_size", 32),
        "desc_act": options.get("ordered", False), "sym": options.get("sym", False), "checkpoint_format": "gptq_v2",
        **(more_settings or {}),
    }  # fmt: skip
    return pack_checkpoint(folder, lambda weight: gptq_parts(weight, **options), settings)


def awq_parts(weight: Array, *, group_size: int = 64) -> dict[str, Array]:
    """The tensors of a linear as AutoAWQ's version gemm has them, by their endings."""
    parts = gptq_parts(weight, group_size=group_size)
    rows, features = weight.shape
    codes = _unpacked(parts["qweight"].T)[:, :features]
    zeros = _unpacked(parts["qzeros"])[:, :rows]
    return {"qweight": _awq_words(codes.T), "qzeros": _awq_words(zeros), "scales": parts["scales"]}


def _unpacked(words: Array) -> Array:
    packed = np.ascontiguousarray(words).view(np.uint8)
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)


def _awq_words(codes: Array) -> Array:
    """Codes [rows, outputs] as words int32 [rows, outputs / 8], in AWQ's order."""
    ordered = codes.reshape(len(codes), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].reshape(len(codes), -1)
    return packed_stream(np.ascontiguousarray(ordered), 4)


def pack_awq(folder: Path, *, group_size: int = 64) -> Path:
    """Pack the linears of a checkpoint as AWQ does."""
    settings = {"quant_method": "awq", "bits": 4, "group_size": group_size, "zero_point": True, "version": "gemm"}
    return pack_checkpoint(folder, lambda weight: awq_parts(weight, group_size=group_size), settings)


def ct_parts(weight: Array, *, group_size: int = 64) -> dict[str, Array]:
    """The tensors of a linear in the format pack-quantized of compressed-tensors, 4 bits and symmetric."""
    rows, features = weight.shape
    blocks = weight.astype(np.float32).reshape(rows, -1, group_size)
    scales = (np.abs(blocks).max(axis=-1) / 7).astype(np.float16)
    codes = np.rint(blocks / scales[..., None].astype(np.float32)).reshape(rows, features) + 8
    return {
        "weight_packed": packed_stream(codes.astype(np.uint8), 4),
        "weight_scale": scales,
        "weight_shape": np.array([rows, features], np.int64),
    }


def ct_settings(**weights: Any) -> dict[str, Any]:
    """A quantization_config of compressed-tensors."""
    chosen = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 64, **weights}
    groups = {"group_0": {"targets": ["Linear"], "weights": chosen, "input_activations": None}}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "config_groups": groups,
        "ignore": ["lm_head"],
    }


def pack_compressed(folder: Path, *, group_size: int = 64) -> Path:
    """Pack the linears of a checkpoint as compressed-tensors does."""
    settings = ct_settings(group_size=group_size)
    return pack_checkpoint(folder, lambda weight: ct_parts(weight, group_size=group_size), settings)


def int8_parts(weight: Array) -> dict[str, Array]:
    """The tensors of a linear as bitsandbytes stores 8 bits; the weight itself is added by `pack_int8`."""
    largest = np.abs(weight.astype(np.float32)).max(axis=1)
    return {"weight": np.rint(weight / largest[:, None] * 127).astype(np.int8), "SCB": largest}


def pack_int8(folder: Path) -> Path:
    """Pack the linears of a checkpoint as bitsandbytes does with 8 bits."""
    return pack_checkpoint(folder, int8_parts, {"quant_method": "bitsandbytes", "load_in_8bit": True})


def nf4_parts(weight: Array) -> dict[str, Array]:
    """The tensors of a linear as bitsandbytes stores nf4, in blocks of 64; the codes are arbitrary."""
    rows, features = weight.shape
    rng = np.random.default_rng(rows)
    state = {"quant_type": "nf4", "blocksize": 64, "dtype": "float16", "shape": [rows, features]}
    return {
        "weight": rng.integers(0, 256, (rows * features // 2, 1), dtype=np.uint8),
        "weight.absmax": np.full(rows * features // 64, 0.1, np.float32),
        "weight.quant_map": np.linspace(-1, 1, 16, dtype=np.float32),
        "weight.quant_state.bitsandbytes__nf4": np.frombuffer(json.dumps(state).encode(), np.uint8),
    }


def pack_nf4(folder: Path) -> Path:
    """Pack the linears of a checkpoint as bitsandbytes does with nf4."""
    return pack_checkpoint(folder, nf4_parts, {"quant_method": "bitsandbytes", "load_in_4bit": True})
