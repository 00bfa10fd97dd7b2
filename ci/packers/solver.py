"""Writes tests/export/quantize/gptqmodel.npz: codes that GPTQModel's own GPTQ finds, beside weights and inputs.

    packers/bin/python ci/packers/solver.py tests/export/quantize/gptqmodel.npz

The inputs have a covariance far from the identity, so that the feedback of errors decides the codes.
"""

from __future__ import annotations

import sys

import numpy as np
import torch
from gptqmodel.quantization.config import QuantizeConfig
from gptqmodel.quantization.gptq import GPTQ

GROUP, DAMPING = 32, 0.01


def main(path: str) -> None:
    generator = np.random.default_rng(5)
    rows, features, tokens = 24, 128, 200
    mixing = generator.standard_normal((24, features)) * generator.uniform(0.2, 2.0, features)
    inputs = generator.standard_normal((tokens, 24)) @ mixing + 0.3 * generator.standard_normal((tokens, features))
    weights = generator.standard_t(5, (rows, features)) * 0.05
    inputs, weights = inputs.astype(np.float16), weights.astype(np.float16)
    found = {"inputs": inputs, "weights": weights}
    for bits in (3, 4, 8):
        linear = torch.nn.Linear(features, rows, bias=False)
        linear.weight.data = torch.from_numpy(weights).float()
        config = QuantizeConfig(
            bits=bits, group_size=GROUP, desc_act=False, sym=True, act_group_aware=False, damp_percent=DAMPING
        )
        quantiser = GPTQ(linear, config)
        quantiser.quantizer.configure(perchannel=True)
        x = torch.from_numpy(inputs).float()[None]
        quantiser.add_batch(x, linear(x))
        values, scales, zeros, *_ = quantiser.quantize(blocksize=128)
        found[f"values{bits}"] = values.float().numpy()
        found[f"scales{bits}"] = scales.float().numpy()
        found[f"zeros{bits}"] = zeros.float().numpy().astype(np.uint8)
    np.savez_compressed(path, **found)


if __name__ == "__main__":
    main(sys.argv[1])
