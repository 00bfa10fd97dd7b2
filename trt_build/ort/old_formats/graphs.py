"""Makes the graphs of engines of formats 2 and 3 loadable: removes their references to packed weights."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy.typing as npt

from export.optional import optional_package
from trt_build.errors import EngineError
from trt_build.ort.old_formats.manifest import PROBE_GRAPH, OldFormat
from trt_build.ort.old_formats.packed_alone import file_layouts, unpacked_weights

logger = logging.getLogger(__name__)

_PACKED_NOTE = "prepacked_"  # prefix of the external data keys that refer to a packed form


@dataclass(frozen=True, kw_only=True)
class OldGraph:
    """A serialised graph, whose data file is in the engine's folder, and arrays by initializer name that replace
    initializers of the graph."""

    content: bytes
    weights: dict[str, npt.NDArray[Any]]


def check_packed_form(folder: Path, old: OldFormat, built: str) -> None:
    """Raise EngineError if weights are stored in the packed form alone and this machine's kernels use another packed
    form. `built` is the version of ONNX Runtime that built the engine."""
    if old.is_packed_alone and old.kernel_layout not in file_layouts((folder / PROBE_GRAPH).read_bytes()):
        raise EngineError(
            f"loading the engine {folder}: its weights are packed for the kernels of another CPU or of ONNX Runtime "
            f"{built}, and the kernels of this machine read another layout; build the engine again"
        )


def old_graph(path: Path, old: OldFormat) -> OldGraph:
    """Load the graph at `path` of an engine with packed weights. Raises EngineError as `unpacked_weights` does."""
    logger.warning(
        "%s was built by an earlier moeship: its weights are packed again at every start, into memory of this process; "
        "build the engine again to have them mapped",
        path.parent,
    )
    weights = unpacked_weights(path) if old.is_packed_alone else {}
    with optional_package("onnx", "loading an engine of an earlier format", "cpu"):
        import onnx
    model = onnx.load(str(path), load_external_data=False)
    for tensor in model.graph.initializer:
        kept = [entry for entry in tensor.external_data if not entry.key.startswith(_PACKED_NOTE)]
        if len(kept) != len(tensor.external_data):
            del tensor.external_data[:]
            tensor.external_data.extend(kept)
    return OldGraph(content=model.SerializeToString(), weights=weights)
