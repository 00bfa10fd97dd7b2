"""The graph for onnxruntime-genai beside the scoring graph: does the same flow from node to node?

The second question runs the scoring graph and the fourth the serving graph. The generating graph is the scoring graph
with logits of the last position alone, so it need not be run: but for the slice that takes this position, and the
outputs for router logits, both have the same nodes with the same operands, attributes and constants.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from trt_build.ort.questions.stored_graph import Node, StoredGraph

_MOST_SHOWN = 4


def flow_failures(generating: StoredGraph, scoring: StoredGraph) -> list[str]:
    """What of the generating graph is not as in the scoring graph, one sentence a failure."""
    found = [
        f"{generating.file}: the constant {name} is not that of {scoring.file}"
        for name in sorted(generating.constants.keys() & scoring.constants.keys())
        if not name.startswith("rotary/")  # which config.json says
        and not _equal(generating.constants[name], scoring.constants[name])
    ]
    last = next((node for node in generating.nodes if _takes_last_position(node, generating)), None)
    if last is None:
        found.append(f"{generating.file}: no node takes the last position alone")
    renamed = {last.outputs[0]: last.inputs[0]} if last else {}
    ours = {node.outputs: node for node in generating.nodes if node is not last}
    theirs = {node.outputs: node for node in scoring.nodes if not _shows_router(node)}
    different = sorted(
        outputs
        for outputs in ours.keys() | theirs.keys()
        if outputs not in ours or outputs not in theirs or _facts(ours[outputs], renamed) != _facts(theirs[outputs], {})
    )
    for outputs in different[:_MOST_SHOWN]:
        here, there = (_words(nodes.get(outputs)) for nodes in (ours, theirs))
        found.append(f"{generating.file}: {outputs[0]} is {here}, in {scoring.file} {there}")
    if len(different) > _MOST_SHOWN:
        found.append(f"{generating.file}: {len(different) - _MOST_SHOWN} more nodes are not as in {scoring.file}")
    return found


def _equal(one: Any, other: Any) -> bool:  # noqa: ANN401 - arrays of any dtype
    return one.dtype == other.dtype and np.array_equal(one, other)


def _shows_router(node: Node) -> bool:
    """Whether a node only gives router logits out."""
    return node.operator == "Identity" and node.outputs[0].startswith("router_logits.")


def _takes_last_position(node: Node, graph: StoredGraph) -> bool:
    if node.operator != "Slice" or len(node.inputs) != 4:
        return False
    values = [graph.constants.get(name) for name in node.inputs[1:]]
    if any(value is None or value.shape != (1,) for value in values):
        return False
    start, end, axis = (int(value[0]) for value in values if value is not None)
    return start == -1 and end == np.iinfo(np.int64).max and axis == 1


def _facts(node: Node, renamed: Mapping[str, str]) -> tuple[str, tuple[str, ...], Mapping[str, Any]]:
    return node.operator, tuple(renamed.get(name, name) for name in node.inputs), node.attributes


def _words(node: Node | None) -> str:
    if node is None:
        return "absent"
    return f"{node.operator} of {', '.join(name for name in node.inputs if name)}"
