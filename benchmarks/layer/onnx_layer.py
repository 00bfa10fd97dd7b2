"""Runs the layer with ONNX Runtime: with moeship's operator Experts, and with ONNX Runtime's QMoE."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt

from export.optional import onnx_runtime
from export.quantize.layout import LAYOUT, MatrixLayout
from layer.shape import CHOSEN, EXPERTS, HIDDEN, MATRICES, WIDTH, Rows
from trt_build.ort.kernels import DOMAIN, LEVEL_VARIABLE, library

BITS, BLOCK = 4, 64  # of QMoE, and of ours unless a contender's name has others
Arrays = dict[str, tuple[npt.DTypeLike, tuple[int, ...]]]


def moeship_layer(kind: str, folder: Path, threads: int) -> OnnxLayer:
    """The layer with Experts. `kind` has the words of the contender's name behind "moeship"; each may be absent:
    an instruction set, bits as "q3", a block size as "b128"."""
    level, bits, block = "", BITS, BLOCK
    for word in kind.split():
        if word[0] in "qb" and word[1:].isdecimal():
            bits, block = (int(word[1:]), block) if word[0] == "q" else (bits, int(word[1:]))
        else:
            level = word
    node = partial(experts_node, bits=bits, block=block)
    return OnnxLayer(moeship_arrays(bits, block), node, folder, threads, own=True, level=level)


def qmoe_layer(folder: Path, threads: int) -> OnnxLayer:
    """The layer with ONNX Runtime's QMoE."""
    return OnnxLayer(qmoe_arrays(), qmoe_node, folder, threads)


def moeship_arrays(bits: int, block: int) -> Arrays:
    """Initializers of one layer in our layout, by name."""
    arrays: Arrays = {}
    for name, (rows, features) in MATRICES.items():
        layout = MatrixLayout(rows=rows, features=features, bits=bits, block_size=block)
        arrays[f"{name}_codes"] = (np.uint8, (EXPERTS, *layout.codes_shape))
        arrays[f"{name}_scales"] = (np.float16, (EXPERTS, *layout.scales_shape))
    return arrays


def qmoe_arrays() -> Arrays:
    """Initializers of one layer for ONNX Runtime's QMoE, by name."""
    arrays: Arrays = {}
    for name, (rows, features) in MATRICES.items():
        arrays[f"{name}_codes"] = (np.uint8, (EXPERTS, rows, features * BITS // 8))
        arrays[f"{name}_scales"] = (np.float32, (EXPERTS, rows, features // BLOCK))
    return arrays


def experts_node(
    names: Mapping[str, str],
    output: str,
    *,
    bits: int,
    block: int,
) -> Any:  # noqa: ANN401 - an onnx.NodeProto
    from onnx import helper

    inputs = ["x", "router", names["fc1_codes"], names["fc1_scales"], "", "", names["fc2_codes"], names["fc2_scales"]]
    return helper.make_node(
        "Experts", inputs, [output], domain=DOMAIN, layout=LAYOUT, bits=bits, block_size=block, second_bits=bits,
        second_block_size=block, activations="int8", hidden_size=HIDDEN, expert_size=WIDTH, experts=EXPERTS, k=CHOSEN,
        activation="gelu", activation_alpha=1.0, activation_beta=0.0, activation_limit=float("inf"),
    )  # fmt: skip


def qmoe_node(names: Mapping[str, str], output: str) -> Any:  # noqa: ANN401 - an onnx.NodeProto
    from onnx import helper

    inputs = ["x", "router", names["fc1_codes"], names["fc1_scales"], "", names["fc2_codes"], names["fc2_scales"]]
    return helper.make_node(
        "QMoE", inputs, [output], domain="com.microsoft", k=CHOSEN, activation_type="gelu", swiglu_fusion=0,
        normalize_routing_weights=1, use_sparse_mixer=0, expert_weight_bits=BITS, block_size=BLOCK, quant_type="int",
        accuracy_level=4,
    )  # fmt: skip


class OnnxLayer:
    """A graph of one layer with random weights, written into `folder` and mapped. With `own` its node is of moeship's
    kernels, and `level` selects their instruction set."""

    def __init__(
        self,
        arrays: Arrays,
        node: Callable[..., Any],
        folder: Path,
        threads: int,
        *,
        own: bool = False,
        level: str = "",
    ) -> None:
        with onnx_runtime("onnxruntime", "measuring the kernels", "cpu"):
            import onnxruntime
        self._version: str = onnxruntime.__version__
        graph, num_bytes = _graph(arrays, node, folder / "layer.bin")
        self.num_bytes = num_bytes * CHOSEN // EXPERTS
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 3
        # The next process needs the cores, so this session's threads must not spin while they wait for work.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        if own:
            options.register_custom_ops_library(str(library()))
        with mock.patch.dict(os.environ, {LEVEL_VARIABLE: level}):
            self._session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])

    def run(self, rows: Rows, pair: tuple[int, int]) -> None:
        logits = np.zeros((len(rows), EXPERTS), dtype=np.float32)
        logits[:, pair] = (2, 1)
        self._session.run(None, {"x": rows, "router": logits})

    def facts(self) -> str:
        return f"ONNX Runtime {self._version}"


def _graph(arrays: Arrays, node: Callable[..., Any], data: Path) -> tuple[bytes, int]:
    """The serialised model, and the number of bytes of weights, which are written to the file `data`."""
    from onnx import TensorProto, helper

    draw = np.random.default_rng(0)
    types = {"uint8": TensorProto.UINT8, "float16": TensorProto.FLOAT16, "float32": TensorProto.FLOAT}
    tensors, position = [], 0
    with data.open("wb") as file:
        for name, (dtype, shape) in arrays.items():
            kind, count = np.dtype(dtype), int(np.prod(shape))
            random = draw.integers(0, 256, count, dtype=np.uint8) if kind == np.uint8 else draw.random(count) * 0.01
            file.write(random.astype(kind).tobytes())
            tensor = TensorProto(name=name, data_type=types[kind.name], dims=shape, data_location=1)
            places = {"location": data.name, "offset": position, "length": count * kind.itemsize}
            for key, place in places.items():
                tensor.external_data.add(key=key, value=str(place))
            tensors.append(tensor)
            position += count * kind.itemsize
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node({name: name for name in arrays}, "y")], "layer",
        [value("x", TensorProto.FLOAT, ["t", HIDDEN]), value("router", TensorProto.FLOAT, None)],
        [value("y", TensorProto.FLOAT, None)], tensors,
    )  # fmt: skip
    opsets = [helper.make_opsetid(*opset) for opset in (("", 21), ("com.microsoft", 1), (DOMAIN, 1))]
    model: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return model, position
