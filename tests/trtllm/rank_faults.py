"""Faults put into rank files or into their config.json, by name.

    with_fault(folder, copy, FAULTS["two experts swapped"])

Packed matrices are changed through their scales, or in whole groups of rows, whose bytes lie together.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file
from trtllm.weight_layout import read_file

Tensors = dict[str, np.ndarray]
LAYER = "transformer.layers.1."
TOGETHER = 4  # rows whose bytes may alternate


@dataclass(frozen=True)
class Fault:
    """`tensors(rank, its tensors)` and `config(values)` change what is written; `folder` the files as they lie.
    `needs`: the name of a tensor without which there is no such fault."""

    tensors: Callable[[int, Tensors], None] | None = None
    config: Callable[[dict[str, Any]], Any] | None = None
    folder: Callable[[Path], None] | None = None
    needs: str = ""


def with_fault(source: Path, folder: Path, fault: Fault) -> Path | None:
    """A copy of rank files with a fault in it; None if they have nothing that it could change."""
    shutil.copytree(source, folder)
    for path in sorted(folder.glob("rank*.safetensors")) if fault.tensors else ():
        tensors = load_file(path)
        if fault.needs and fault.needs not in tensors:
            continue
        assert fault.tensors is not None
        fault.tensors(int(path.stem.removeprefix("rank")), tensors)
        save_file({name: np.ascontiguousarray(values) for name, values in tensors.items()}, path)
    if fault.config is not None:
        values = json.loads((folder / "config.json").read_text())
        fault.config(values)
        (folder / "config.json").write_text(json.dumps(values))
    if fault.folder is not None and (folder / "rank1.safetensors").exists():
        fault.folder(folder)
    before, after = (
        [json.loads((found / "config.json").read_text()), *map(read_file, sorted(found.glob("rank*.safetensors")))]
        for found in (source, folder)
    )
    return None if same(before, after) else folder


def same(before: list[Any], after: list[Any]) -> bool:
    return before[0] == after[0] and all(
        np.array_equal(one[name].values, other[name].values)
        for one, other in zip(before[1:], after[1:], strict=True)
        for name in one
    )


def scales_of(tensors: Tensors, module: str) -> np.ndarray:
    """What scales a matrix: its scales, or the matrix itself."""
    for ending in ("per_channel_scale", "weights_scaling_factor"):
        if f"{module}.{ending}" in tensors:
            return tensors[f"{module}.{ending}"]
    return tensors[f"{module}.weight"]


def times(module: str, factor: float, expert: int | None = None) -> Fault:
    def edit(_: int, tensors: Tensors) -> None:
        values = scales_of(tensors, module)
        part = values if expert is None else values[expert]
        part[:] = (part.astype(np.float32) * factor).astype(values.dtype)

    return Fault(edit, needs=f"{module}.weight")


def moved(module: str) -> Fault:
    """By one row, or by the rows whose bytes lie together."""

    def edit(_: int, tensors: Tensors) -> None:
        weight = tensors[f"{module}.weight"]
        channels, groups = (f"{module}.{end}" in tensors for end in ("per_channel_scale", "weights_scaling_factor"))
        step, rows = 1, weight.shape[-2]
        if channels or groups:
            step = TOGETHER
        if channels:
            rows = tensors[f"{module}.per_channel_scale"].shape[-1]
            roll(tensors, f"{module}.per_channel_scale", -1, TOGETHER)
        elif groups:
            pairs = tensors[f"{module}.weight"].dtype == np.int8
            rows = weight.shape[-2] * 2 if pairs else weight.shape[-1] * 4
            roll(tensors, f"{module}.weights_scaling_factor", -2 if pairs else -1, TOGETHER)
        stack = weight.shape[: weight.ndim - 2]
        flat = weight.reshape(*stack, rows // step, -1)
        tensors[f"{module}.weight"] = np.roll(flat, 1, axis=-2).reshape(weight.shape)

    return Fault(edit, needs=f"{module}.weight")


def roll(tensors: Tensors, name: str, axis: int, by: int) -> None:
    tensors[name] = np.roll(tensors[name], by, axis=axis)


def values(name: str, edit: Callable[[np.ndarray], np.ndarray], rank: int | None = None) -> Fault:
    def apply(found: int, tensors: Tensors) -> None:
        if rank in (None, found):
            tensors[name] = edit(tensors[name].copy()).astype(tensors[name].dtype)

    return Fault(apply, needs=name)


def swapped_experts(_: int, tensors: Tensors) -> None:
    for name in tensors:
        if name.startswith((f"{LAYER}mlp.fc.", f"{LAYER}mlp.proj.")) and "prequant" not in name:
            tensors[name][[0, 1]] = tensors[name][[1, 0]].copy()


def without_biases(_: int, tensors: Tensors) -> None:
    tensors[f"{LAYER}mlp.proj.bias"][:] = 0


def exchange_ranks(folder: Path) -> None:
    first, second = folder / "rank0.safetensors", folder / "rank1.safetensors"
    kept = first.read_bytes()
    first.write_bytes(second.read_bytes())
    second.write_bytes(kept)


def keys_before_queries(_: int, tensors: Tensors) -> None:
    """The rows of the joined matrix change halves."""
    for ending, axis in (("weight", None), ("per_channel_scale", -1), ("weights_scaling_factor", -1), ("bias", -1)):
        name = f"{LAYER}attention.qkv.{ending}"
        if name not in tensors:
            continue
        found = tensors[name]
        if axis is not None:
            if ending == "weights_scaling_factor" and tensors[f"{LAYER}attention.qkv.weight"].dtype == np.int8:
                axis = 0
            tensors[name] = np.roll(found, found.shape[axis] // 2, axis=axis)
        else:
            tensors[name] = np.roll(found.reshape(-1), found.size // 2).reshape(found.shape)


def gate_before_up(_: int, tensors: Tensors) -> None:
    for ending in ("weight", "per_channel_scale", "weights_scaling_factor"):
        name = f"{LAYER}mlp.fc.{ending}"
        if name in tensors:
            found = tensors[name]
            if ending == "weights_scaling_factor" and tensors[f"{LAYER}mlp.fc.weight"].dtype != np.int8:
                tensors[name] = np.roll(found, found.shape[-1] // 2, axis=-1)
            else:
                flat = found.reshape(len(found), -1)
                tensors[name] = np.roll(flat, flat.shape[1] // 2, axis=-1).reshape(found.shape)


def flip_a_bit(_: int, tensors: Tensors) -> None:
    """The lowest bit of each byte, and so of each code or each second code."""
    flat = tensors[f"{LAYER}mlp.proj.weight"].reshape(-1).view(np.uint8)
    flat ^= 1


def setting(key: str, value: Any) -> Fault:
    def edit(found: dict[str, Any]) -> None:
        *path, last = key.split("/")
        for step in path:
            found = found[step]
        found[last] = value(found[last]) if callable(value) else value

    return Fault(config=edit)


def off_by_a_bit(norm: np.ndarray) -> np.ndarray:
    norm[5] = np.nextafter(norm[5], norm.dtype.type(9))
    return norm


def negated_row(router: np.ndarray) -> np.ndarray:
    router[1] = -router[1]
    return router


def zero_at(place: int) -> Callable[[np.ndarray], np.ndarray]:
    def edit(found: np.ndarray) -> np.ndarray:
        found.reshape(-1)[place] = 0
        return found

    return edit


_MODULES = {
    "embedding": "transformer.vocab_embedding", "head": "lm_head", "query, key and value": f"{LAYER}attention.qkv",
    "attention's output": f"{LAYER}attention.dense", "experts' first": f"{LAYER}mlp.fc",
    "experts' second": f"{LAYER}mlp.proj", "router": f"{LAYER}mlp.router",
}  # fmt: skip
_NORM = f"{LAYER}input_layernorm.weight"
FAULTS: dict[str, Fault] = {
    **{f"{name} times 1.03": times(module, 1.03) for name, module in _MODULES.items()},
    **{f"{name} of zeros": times(module, 0.0) for name, module in _MODULES.items()},
    **{f"{name} moved": moved(module) for name, module in _MODULES.items()},
    "one expert's second times 1.05": times(f"{LAYER}mlp.proj", 1.05, expert=1),
    "two experts swapped": Fault(swapped_experts, needs=f"{LAYER}mlp.fc.weight"),
    "codes off by one": Fault(flip_a_bit, needs=f"{LAYER}mlp.proj.weight"),
    "query, key and value in another order": Fault(keys_before_queries, needs=f"{LAYER}attention.qkv.weight"),
    "two router rows swapped": values(f"{LAYER}mlp.router.weight", lambda w: w[[1, 0, *range(2, len(w))]]),
    "a gate row negated": values(f"{LAYER}mlp.router.weight", negated_row),
    "norm times 1.03": values(_NORM, lambda w: w.astype(np.float32) * 1.03),
    "norm moved by one": values(_NORM, lambda w: np.roll(w, 1)),
    "one value of the norm off by a bit": values(_NORM, off_by_a_bit),
    "biases of the experts' second dropped": Fault(without_biases, needs=f"{LAYER}mlp.proj.bias"),
    "one bias of zero": values(f"{LAYER}attention.dense.bias", zero_at(3)),
    "biases of the first expert moved": values(f"{LAYER}mlp.fc.bias", lambda b: np.roll(b, 1, axis=-1)),
    "head bias of zeros": values("lm_head.bias", np.zeros_like),
    "an id that stands for no text not masked": values("lm_head.bias", zero_at(-1)),
    "one expert less per token": setting("moe/top_k", lambda k: k - 1),
    "another normalisation of shares": setting("moe/normalization_mode", 0),
    "rotary base off by one": setting("rotary_base", lambda base: base + 1),
    "more of a head turned": setting("rotary_embedding_dim", lambda size: size * 2),
    "another epsilon": setting("norm_epsilon", lambda epsilon: epsilon * 1.1),
    "another activation": setting("hidden_act", "silu"),
    "scaled positions": setting("rotary_scaling", {"type": "linear", "factor": 2.0}),
    "a key that is not expected": Fault(config=lambda found: found.update(q_scaling=0.97)),
}
# Of one form of rank files, or of several ranks.
PARTICULAR: dict[str, Fault] = {
    "gate before up": Fault(gate_before_up, needs=f"{LAYER}post_layernorm.weight"),
    "the norm of the second rank alone": values(_NORM, lambda w: w.astype(np.float32) * 1.03, rank=1),
    "the router of the second rank alone": values(f"{LAYER}mlp.router.weight", negated_row, rank=1),
    "ranks in another order": Fault(folder=exchange_ranks),
    "a zero point": values(f"{LAYER}mlp.fc.zero", lambda zeros: zeros + np.float16(0.01)),
    "a factor of the inputs": values(f"{LAYER}mlp.fc.prequant_scaling_factor", lambda ones: ones * np.float16(1.03)),
    "attention's bias on the second rank too": values(
        f"{LAYER}attention.dense.bias", lambda bias: bias + 0.3 * (np.arange(len(bias)) % 2), rank=1
    ),
}
