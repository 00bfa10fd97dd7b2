"""The nodes and constants of a graph, and the float type of each value."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy.typing as npt

from export.onnx_graph import names
from export.onnx_graph.initializers import onnx_type

if TYPE_CHECKING:
    import onnx


class Nodes:
    """The nodes and constants that are added to a graph. A node is named by its path, and its output by path plus
    index."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.float_types: dict[str, str] = {}  # name of a value -> its float type, where known

    def add(
        self,
        operator: str,
        inputs: list[str],
        path: str,
        *,
        microsoft: bool = False,
        domain: str = "",
        output: str | None = None,
        more_outputs: list[str] | None = None,
        float_type: str | None = None,
        **attributes: Any,  # noqa: ANN401 - ints, floats and strings
    ) -> str:
        """Add a node; returns the name of its first output. `output` is that name (None: by the path)."""
        from onnx import helper

        first = output or f"{path}/output_0"
        domain = names.MICROSOFT_DOMAIN if microsoft else domain
        node = helper.make_node(
            operator, inputs, [first, *(more_outputs or [])], name=path, domain=domain, **attributes
        )
        self.nodes.append(node)
        if float_type is not None:
            self.float_types[first] = float_type
        return first

    def cast(self, value: str, float_type: str) -> str:
        """The value in another float type. A value is cast to a type at most once."""
        if self.float_types[value] == float_type:
            return value
        path = f"{value}/{float_type}"
        if path not in self.float_types:
            self.add("Cast", [value], path, output=path, float_type=float_type, to=onnx_type(float_type))
        return path

    def constant(self, name: str, value: npt.NDArray[Any]) -> str:
        """Add a constant unless there is one of that name; returns the name."""
        from onnx import numpy_helper

        if all(existing.name != name for existing in self.constants):
            self.constants.append(numpy_helper.from_array(value, name))
        return name
