"""The scales of caches in int8: one for each channel of each layer's keys and of its values, in a file of their own.

A stored value is code * scale, with codes from -128 to 127. `kv_scales.safetensors` has, for each layer, the float32
tensors `layers.{i}.k_scale` and `layers.{i}.v_scale` [G, D], for G key/value heads of D channels. The graph that
computes with such caches refers to these bytes, so that its own file does not depend on the values.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from export.architecture import Architecture
from export.checkpoint.shard_writer import PlannedTensor, header_of, write_safetensors

if TYPE_CHECKING:
    import onnx

SCALES_FILE = "kv_scales.safetensors"
QUANTISATION = "PER_CHANNEL"  # GroupQueryAttention's k_quant_type and v_quant_type

Floats = npt.NDArray[np.float32]


def key_scale(layer: int) -> str:
    return f"layers.{layer}.k_scale"


def value_scale(layer: int) -> str:
    return f"layers.{layer}.v_scale"


def planned_scales(facts: Architecture) -> list[PlannedTensor]:
    """The tensors of the file, in its order."""
    shape = (facts.num_kv_heads, facts.head_size)
    names = (name(layer) for layer in range(facts.num_layers) for name in (key_scale, value_scale))
    return [PlannedTensor(name=name, dtype="F32", shape=shape) for name in names]


def scales_bytes(facts: Architecture) -> int:
    """The size of the file."""
    planned = planned_scales(facts)
    return len(header_of(planned)) + sum(tensor.num_bytes for tensor in planned)


def scale_initializers(facts: Architecture) -> Iterator[onnx.TensorProto]:
    """The tensors as initializers [G * D] of a graph that lies beside the file."""
    from onnx import TensorProto

    planned = planned_scales(facts)
    offset = len(header_of(planned))
    for tensor in planned:
        found = TensorProto(
            name=tensor.name, data_type=TensorProto.FLOAT, dims=[tensor.num_elements],
            data_location=TensorProto.EXTERNAL,
        )  # fmt: skip
        for key, value in (("location", SCALES_FILE), ("offset", str(offset)), ("length", str(tensor.num_bytes))):
            found.external_data.add(key=key, value=value)
        offset += tensor.num_bytes
        yield found


def write_scales(folder: Path, facts: Architecture, scales: Floats) -> None:
    """Write the file. `scales` [L, 2, G, D]: of each layer the keys' and the values'. Raises OutputError for errors of
    the disk."""
    planned = planned_scales(facts)
    values = dict(zip((tensor.name for tensor in planned), scales.reshape(-1, *scales.shape[2:]), strict=True))
    write_safetensors(folder / SCALES_FILE, planned, lambda tensor: [values[tensor.name]])
