"""A decoder graph in two halves that run one after the other, so that they can be loaded side by side.

ONNX Runtime prepares a graph's weights on one core: it packs and hashes every one before it finds the packed form that
the engine holds. Two graphs of half the bytes are ready in half the time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from export.onnx_graph import names

if TYPE_CHECKING:
    import onnx


def halves(model: onnx.ModelProto) -> tuple[onnx.ModelProto, ...]:
    """The model as two, cut where one value alone goes on and the weights' bytes are parted most evenly; as itself
    where there is no such place.

    What follows from the attention mask alone is worked out in both. The second half takes the value that goes on under
    its own name, as the first gives it.
    """
    nodes = list(model.graph.node)
    facts = _sequence_facts(model)
    network = [node for node in nodes if node.output[0] not in facts]
    sizes = {tensor.name: _num_bytes(tensor) for tensor in model.graph.initializer}
    cut = _best_cut(network, sizes)
    if cut is None:
        return (model,)
    index, value = cut
    shared = [node for node in nodes if node.output[0] in facts]
    first = _part(model, [*shared, *network[:index]], gives=value)
    return first, _part(model, [*shared, *network[index:]], takes=value)


def _sequence_facts(model: onnx.ModelProto) -> set[str]:
    """Values for which nothing but the attention mask and constants inside the graph is needed."""
    known = {tensor.name for tensor in model.graph.initializer if not tensor.external_data} | {names.ATTENTION_MASK}
    facts: set[str] = set()
    for node in model.graph.node:
        if known.issuperset(node.input):
            facts.update(node.output)
            known.update(node.output)
    return facts


def _best_cut(network: Sequence[onnx.NodeProto], sizes: Mapping[str, int]) -> tuple[int, str] | None:
    """Before which node to cut, and the value that goes on: a sum, as the residual stream is."""
    last_use = {name: index for index, node in enumerate(network) for name in node.input}
    weights = [sum(sizes.get(name, 0) for name in node.input) for node in network]
    total, before = sum(weights), 0
    alive: set[str] = set()
    sums = {node.output[0] for node in network if node.op_type == "Add"}
    found: tuple[int, int, str] | None = None
    for index, node in enumerate(network):
        if len(alive) == 1 and alive <= sums:
            unevenness = abs(total - 2 * before)
            if found is None or unevenness < found[0]:
                found = unevenness, index, next(iter(alive))
        before += weights[index]
        alive.update(name for name in node.output if last_use.get(name, -1) > index)
        alive.difference_update([name for name in alive if last_use[name] <= index])
    return found[1:] if found else None


def _part(
    model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], takes: str | None = None, gives: str | None = None
) -> onnx.ModelProto:
    """The nodes as a model, with what of the whole's inputs, outputs and initializers they use."""
    from onnx import TensorProto, helper

    used = {name for node in nodes for name in node.input}
    made = {name for node in nodes for name in node.output}
    hidden = [names.BATCH, names.SEQUENCE, names.HIDDEN]
    inputs = [value for value in model.graph.input if value.name in used]
    outputs = [value for value in model.graph.output if value.name in made]
    if takes:
        inputs.insert(0, helper.make_tensor_value_info(takes, TensorProto.FLOAT, hidden))
    if gives:
        outputs.insert(0, helper.make_tensor_value_info(gives, TensorProto.FLOAT, hidden))
    initializers = [tensor for tensor in model.graph.initializer if tensor.name in used]
    graph = helper.make_graph(nodes, model.graph.name, inputs, outputs, initializers)
    return helper.make_model(
        graph, opset_imports=model.opset_import, ir_version=model.ir_version, producer_name=model.producer_name
    )


def _num_bytes(tensor: onnx.TensorProto) -> int:
    lengths = [int(entry.value) for entry in tensor.external_data if entry.key == "length"]
    return lengths[0] if lengths else len(tensor.raw_data)
