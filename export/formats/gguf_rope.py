"""The scaling of a rotary embedding as llama.cpp writes it, in the words of config.json.

  rope.scaling.type     none, linear or yarn; linear where only a factor is stated
  rope_freqs.weight     a divisor for each frequency, all that the file states of Llama 3's scaling
Sources: llama.cpp, convert_hf_to_gguf.py (LlamaModel.generate_extra_tensors) and src/llama-model.cpp (load_hparams).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from export import rotary
from export.formats.view import FloatArray

FREQUENCIES = "rope_freqs.weight"
# Llama 3.1's and 3.2's. The factor is the largest divisor.
_LLAMA_3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
_ROUNDING = 1e-5  # of divisors that were computed in another order


def stated_scaling(
    kind: str, factor: float, original: int, betas: Mapping[str, float], divisors: FloatArray | None
) -> dict[str, Any] | str:
    """The scaling that the metadata and the tensor of divisors state, as the value of `rope_scaling`, but for
    `divided`; empty for none. The problem in words for one that is not read. `factor` 0 is none."""
    if kind not in ("", "none", "linear", "yarn"):
        return f"rope.scaling.type is {kind!r}, moeship reads none, linear and yarn"
    found: dict[str, Any] = {}
    if kind == "yarn":
        found = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": original, **betas}
    elif kind != "none" and factor not in (0.0, 1.0):
        found = {"rope_type": "linear", "factor": factor}
    if kind == "yarn" and not factor:
        return "rope.scaling.type is 'yarn', and there is no rope.scaling.factor"
    if found and divisors is not None:
        return f"{FREQUENCIES} and rope.scaling.factor both scale the rotary embedding"
    return found


def divided(divisors: FloatArray, base: float, positions: int) -> dict[str, Any]:
    """The value of `rope_scaling` for a divisor of each frequency, float32 [width / 2]: llama3 where they are those of
    Llama 3, else longrope with the divisors as they are, for texts of all `positions`."""
    width, factor = 2 * len(divisors), float(divisors.max())
    known = {"rope_type": "llama3", "factor": factor, **_LLAMA_3}
    scaling = rotary.scaling_of(known, positions) if factor > 1 else None
    if scaling is not None:
        expected = rotary.frequencies(width, base) / rotary.frequencies(width, base, scaling)
        if np.allclose(divisors, expected, rtol=_ROUNDING, atol=0):
            return known
    factors = divisors.astype(np.float64).tolist()
    return {
        "rope_type": "longrope", "short_factor": factors, "long_factor": factors, "attention_factor": 1.0,
        "original_max_position_embeddings": positions,
    }  # fmt: skip
