"""Packs quantised weights with the CPU kernels of ONNX Runtime on this machine.

ONNX Runtime repacks every MatMulNBits and QMoE weight when it loads a graph. If a graph is saved with
`session.save_external_prepacked_constant_initializers`, the external data of an initializer also names its packed
blobs and a key: `operator+hash|offset;bytes;checksum|...` (microsoft/onnxruntime#23069).
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from export.errors import ExportError
from export.onnx_graph import names
from export.optional import onnx_runtime

if TYPE_CHECKING:
    import onnx

TILE_ROWS = 16  # number of rows that the kernels pack together


@dataclass(frozen=True, kw_only=True)
class QuantizedWeight:
    """One weight of a MatMulNBits or QMoE node: the shapes of its codes and scales, and how the node reads them.

    MatMulNBits: codes uint8 [N, blocks, block bytes], scales float32 [N, blocks].
    QMoE: codes uint8 [E, N, K * bits / 8], scales float32 [E, N, blocks].
    """

    operator: str
    codes: tuple[int, ...]
    scales: tuple[int, ...]
    bits: int
    block_size: int
    accuracy_level: int

    @property
    def num_features(self) -> int:
        return self.scales[-1] * self.block_size

    @property
    def scales_bytes(self) -> int:
        return 4 * math.prod(self.scales)

    @property
    def codes_bytes(self) -> int:
        return math.prod(self.codes)


def pack_in_memory(
    weight: QuantizedWeight, codes: npt.NDArray[np.uint8], scales: npt.NDArray[np.float32]
) -> npt.NDArray[np.uint8]:
    """The first packed blob of a weight. Working files are made in the temporary folder. Raises ExportError if this
    machine's kernel does not pack the weight."""
    import onnx
    from onnx import numpy_helper

    tensors = [numpy_helper.from_array(codes, "codes"), numpy_helper.from_array(scales, "scales")]
    with tempfile.TemporaryDirectory(prefix="moeship-pack-") as scratch:
        output = Path(scratch) / "packed.bin"
        save_with_packed_forms(_one_node(weight, tensors).SerializeToString(), output, Path(scratch))
        for tensor in onnx.load(output.with_suffix(".onnx"), load_external_data=False).graph.initializer:
            note = {entry.key: entry.value for entry in tensor.external_data}.get("prepacked_0")
            if tensor.name == "codes" and note is not None:
                offset, size, _ = map(int, note.split("|")[1].split(";"))
                return np.fromfile(output, np.uint8, size, offset=offset)
    raise ExportError(
        f"packing a {weight.operator} weight of {weight.bits} bits in blocks of {weight.block_size}: ONNX Runtime "
        "keeps no packed form of it on this machine"
    )


def save_with_packed_forms(graph: bytes, output: Path, folder: Path) -> None:
    """Have ONNX Runtime load a graph whose data is in `folder`, and save the graph's data and the packed forms in the
    file `output`."""
    with onnx_runtime("onnxruntime", "reading packed weights", "cpu"):
        import onnxruntime
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.enable_cpu_mem_arena = False
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.optimized_model_filepath = str(output.with_suffix(".onnx"))
    for key, value in (
        ("session.save_external_prepacked_constant_initializers", "1"),
        ("session.optimized_model_external_initializers_file_name", output.name),
        ("session.optimized_model_external_initializers_min_size_in_bytes", "0"),
        ("session.model_external_initializers_file_folder_path", str(folder)),
    ):
        options.add_session_config_entry(key, value)
    onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


def _one_node(weight: QuantizedWeight, tensors: Sequence[onnx.TensorProto]) -> onnx.ModelProto:
    """A graph with one node that reads the weight. The other inputs and the routing do not change how it is packed."""
    from onnx import TensorProto, helper

    value, features = helper.make_tensor_value_info, weight.num_features
    inputs = [value("x", TensorProto.FLOAT, ["tokens", features])]
    if weight.operator == "MatMulNBits":
        node = helper.make_node(
            "MatMulNBits", ["x", "codes", "scales"], ["y"], domain=names.MICROSOFT_DOMAIN,
            K=features, N=weight.codes[0], bits=weight.bits, block_size=weight.block_size,
            accuracy_level=weight.accuracy_level,
        )  # fmt: skip
    else:
        experts = weight.codes[0]
        inputs.append(value("router", TensorProto.FLOAT, ["tokens", experts]))
        # The node's other matrix, a tile of one block.
        block_bytes, rows = weight.block_size * weight.bits // 8, experts * TILE_ROWS
        other = (experts, TILE_ROWS, block_bytes), (experts, TILE_ROWS, 1)
        tensors = [
            *tensors,
            helper.make_tensor("other", TensorProto.UINT8, other[0], bytes(rows * block_bytes), raw=True),
            helper.make_tensor("other_scales", TensorProto.FLOAT, other[1], bytes(rows * 4), raw=True),
        ]
        places = ("x", "router", "codes", "scales", "", "other", "other_scales")
        node = helper.make_node(
            "QMoE", list(places), ["y"], domain=names.MICROSOFT_DOMAIN,
            k=1, activation_type="gelu", normalize_routing_weights=1, use_sparse_mixer=0, swiglu_fusion=0,
            expert_weight_bits=weight.bits, block_size=weight.block_size, quant_type="int", weights_prepacked=0,
            accuracy_level=weight.accuracy_level,
        )  # fmt: skip
    output = value("y", TensorProto.FLOAT, None)
    graph = helper.make_graph([node], "one_weight", inputs, [output], tensors)
    opsets = [helper.make_opsetid("", names.OPSET), helper.make_opsetid(names.MICROSOFT_DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=names.IR_VERSION)
