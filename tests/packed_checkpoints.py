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
