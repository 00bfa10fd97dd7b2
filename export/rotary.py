"""Rotary embedding: its scaling, its frequencies, and its tables of cos and sin.

Every graph and the reference compute their tables here. Kinds of scaling, with the names of config.json:

  linear    every frequency divided by `factor`
  llama3    low frequencies divided by `factor`, high ones as they are, and a smooth passage between them
  yarn      a ramp from divided to undivided frequencies, and cos and sin multiplied by an attention factor
  longrope  each frequency divided by a factor of its own, and an attention factor. There are two lists of factors: one
            for texts of at most `original_positions`, one for longer texts
Source: transformers, modeling_rope_utils.py; Peng et al., YaRN, 2023; Ding et al., LongRoPE, 2024.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import numpy.typing as npt

FloatArray = npt.NDArray[np.float32]

KINDS = ("linear", "llama3", "yarn", "longrope")
# Kind -> keys of config.json that it reads, beside those of every kind (rope_theta, partial_rotary_factor).
KEYS: Mapping[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": (
        "factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
        "mscale_all_dim", "truncate",
    ),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings", "factor", "attention_factor"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RotaryScaling:
    """How the frequencies of a rotary embedding are scaled. `original_positions` is the length of the texts that the
    model was first trained on; cos and sin are multiplied by `attention_factor`. Raises ValueError for a value that no
    scaling has."""

    kind: str
    factor: float = 1.0
    original_positions: int = 1
    attention_factor: float = 1.0
    low_freq_factor: float = 1.0  # of llama3, as is the next
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0  # of yarn, as are the next two
    beta_slow: float = 1.0
    truncate: bool = True
    short_factors: tuple[float, ...] = ()  # of longrope, one for each frequency, as are the next
    long_factors: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"rotary scaling is of kind {self.kind!r}, expected {', '.join(KINDS)}")
        numbers = [getattr(self, field.name) for field in fields(self) if field.name not in ("kind", "truncate")]
        flat = [value for number in numbers for value in (number if isinstance(number, tuple) else (number,))]
        if not all(0 < value < math.inf for value in flat):
            raise ValueError(f"rotary scaling has {numbers}, expected positive numbers")
        if self.kind == "llama3" and not self.low_freq_factor < self.high_freq_factor:
            raise ValueError("rotary scaling: low_freq_factor must be below high_freq_factor")

    @property
    def described(self) -> str:
        """The scaling in words, for `moeship inspect`."""
        text = self.kind if self.kind == "longrope" else f"{self.kind}, factor {self.factor:g}"
        if self.kind != "linear":
            text += f", original {self.original_positions} positions"
        return text + (f", cos and sin times {self.attention_factor:.6g}" if self.attention_factor != 1 else "")


def parameters(config: Mapping[str, Any], base: float, share: float | None = None) -> dict[str, Any]:
    """The object of rotary values that transformers makes of a config.json. The values are those of rope_scaling, else
    of rope_parameters, else keys at the top, else `base` and `share`, the class's own rope_theta and
    partial_rotary_factor. A length at the top replaces the object's, as in transformers' standardize_rope_params."""
    found = dict(config.get("rope_scaling") or config.get("rope_parameters") or {})
    found.setdefault("rope_theta", config.get("rope_theta", base))
    whole = config.get("partial_rotary_factor", share)
    if share is not None or whole is not None:
        found.setdefault("partial_rotary_factor", whole)
    elif found.get("partial_rotary_factor") is None:  # a class that has no such share does not look at null
        found.pop("partial_rotary_factor", None)
    found.setdefault("rope_type", found.get("type", "default"))
    length = "original_max_position_embeddings"
    if length in KEYS.get(str(found["rope_type"]), ()):
        found.setdefault(length, config.get("max_position_embeddings"))
        if length in config:
            found[length] = config[length]
    return found


def kind_key(values: Mapping[str, Any]) -> str:
    """The key under which an object of a config.json names the kind of scaling: "type" in older files."""
    return "type" if "type" in values and "rope_type" not in values else "rope_type"


def scaling_of(values: Mapping[str, Any], max_positions: int) -> RotaryScaling | None:
    """The scaling that an object of `parameters` states; None for none. `max_positions` is the model's. The values have
    been checked. Raises ValueError as RotaryScaling does."""
    kind = values["rope_type"]
    if kind == "default":
        return None
    original = values.get("original_max_position_embeddings") or 1
    factor = values.get("factor")
    factor = max_positions / original if factor is None else factor
    stated = values.get("attention_factor")
    common = {"kind": kind, "factor": float(factor), "original_positions": original}
    if kind == "linear":
        return RotaryScaling(kind=kind, factor=float(factor))
    if kind == "llama3":
        low, high = float(values["low_freq_factor"]), float(values["high_freq_factor"])
        return RotaryScaling(**common, low_freq_factor=low, high_freq_factor=high)
    if kind == "yarn":
        return RotaryScaling(
            **common,
            attention_factor=float(_yarn_factor(factor, values) if stated is None else stated),
            beta_fast=float(values.get("beta_fast") or 32),
            beta_slow=float(values.get("beta_slow") or 1),
            truncate=values.get("truncate", True),
        )
    if stated is None:
        stated = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    short, long = (tuple(map(float, values[name])) for name in ("short_factor", "long_factor"))
    return RotaryScaling(**common, attention_factor=float(stated), short_factors=short, long_factors=long)


def _yarn_factor(factor: float, values: Mapping[str, Any]) -> float:
    def grown(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    top, bottom = values.get("mscale"), values.get("mscale_all_dim")
    return grown(top) / grown(bottom) if top and bottom else grown(1.0)


def frequencies(width: int, base: float, scaling: RotaryScaling | None = None, length: int = 1) -> FloatArray:
    """The frequencies of a rotary embedding of `width` dimensions, float32 [width / 2], for a text of `length`
    positions: base^(-2i / width), scaled.

    Powers and frequencies are each rounded to float32 where PyTorch's models round them. Each is the float32 nearest to
    the exact value; PyTorch's own hang on the processor: of 1,024 frequencies its AVX2 code gives 10 another last bit,
    its plain code 1 (tests/export/reference/test_rotary.py).
    """
    places = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    powers = (base ** places.astype(np.float64)).astype(np.float32)
    plain = np.float32(1) / powers
    if scaling is None:
        return plain
    factor = np.float32(scaling.factor)
    if scaling.kind == "linear":
        return plain / factor
    if scaling.kind == "llama3":
        return _llama3(plain, scaling)
    if scaling.kind == "longrope":
        own = scaling.long_factors if length > scaling.original_positions else scaling.short_factors
        return np.float32(1) / (np.array(own, dtype=np.float32) * powers)
    kept = np.float32(1) - _ramp(width, base, scaling)
    divided: FloatArray = np.divide(np.float32(1), factor * powers)
    return divided * (np.float32(1) - kept) + np.multiply(plain, kept)


def _llama3(plain: FloatArray, scaling: RotaryScaling) -> FloatArray:
    original, low, high = scaling.original_positions, scaling.low_freq_factor, scaling.high_freq_factor
    factor = np.float32(scaling.factor)
    lengths = np.float32(2 * math.pi) / plain
    smooth = (np.float32(original) / lengths - np.float32(low)) / np.float32(high - low)
    between = (np.float32(1) - smooth) * plain / factor + smooth * plain
    scaled = np.where(lengths > original / low, plain / factor, plain)
    medium = (lengths >= original / high) & (lengths <= original / low)
    result: FloatArray = np.where(medium, between, scaled).astype(np.float32)
    return result


def _ramp(width: int, base: float, scaling: RotaryScaling) -> FloatArray:
    """yarn's ramp, float32 [width / 2]: 0 where a frequency stays, 1 where it is divided by the factor."""

    def place(rotations: float) -> float:
        return width * math.log(scaling.original_positions / (rotations * 2 * math.pi)) / (2 * math.log(base))

    first, last = place(scaling.beta_fast), place(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, width - 1)
    if first == last:
        last += 0.001
    ramp = (np.arange(width // 2, dtype=np.float32) - np.float32(first)) / np.float32(last - first)
    return np.clip(ramp, np.float32(0), np.float32(1))


def tables(length: int, width: int, base: float, scaling: RotaryScaling | None = None) -> tuple[FloatArray, FloatArray]:
    """cos and sin, float32 [length, width / 2], of position * frequency, for a text of `length` positions.

    Angles, cos and sin are rounded to float32 as PyTorch's models round them; at position 2000 an angle that was
    computed in float64 would differ by 1e-4. Source: Su et al., RoFormer, 2021.
    """
    positions = np.arange(length, dtype=np.float32)
    angles = np.outer(positions, frequencies(width, base, scaling, length)).astype(np.float64)
    cosines, sines = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    if scaling is not None and scaling.attention_factor != 1:
        cosines *= np.float32(scaling.attention_factor)
        sines *= np.float32(scaling.attention_factor)
    return cosines, sines
