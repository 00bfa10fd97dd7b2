"""Wire tensors of plain values, as Triton's Python backend hands them to a model."""

from __future__ import annotations

import numpy as np

from triton_repo.contracts.wire import COMPATIBILITY_INPUTS, INPUTS


def wire(**values):
    """Tensor by name, [1, n] of the contract's type; a text becomes its UTF-8."""
    specs = {spec.name: spec for spec in (*INPUTS, *COMPATIBILITY_INPUTS)}
    dtypes = {"STRING": object, "INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32, "BOOL": bool}
    tensors = {}
    for name, value in values.items():
        items = list(value) if isinstance(value, (list, tuple)) else [value]
        items = [item.encode() if isinstance(item, str) else item for item in items]
        tensors[name] = np.array([items], dtype=dtypes[specs[name].dtype])
    return tensors
