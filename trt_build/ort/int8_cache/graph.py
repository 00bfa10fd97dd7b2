"""Is the graph with int8 caches the serving graph but for its caches? Then what is asked of the serving graph holds."""

from __future__ import annotations

from typing import TYPE_CHECKING

from export.exporter import INT8_CACHE_GRAPH, SERVING_GRAPH
from export.onnx_graph import names
from export.onnx_graph.kv_records import LAYOUT, record_bytes
from export.onnx_graph.kv_scales import QUANTISATION, key_scale, scale_initializers, value_scale
from export.optional import optional_package
from export.provider import PER_POSITION
from trt_build.ort.engine import Engine

if TYPE_CHECKING:
    import onnx

_SINKS, _SCALE_INPUTS = 11, (12, 13)  # inputs of GroupQueryAttention


def graph_failures(engine: Engine) -> list[str]:
    """What of the graph with int8 caches is not as in the serving graph, one sentence a failure."""
    with optional_package("onnx", "reading an engine's graph", "cpu"):
        import onnx
    serving, found = (
        onnx.load(str(engine.folder / file), load_external_data=False).graph
        for file in (SERVING_GRAPH, INT8_CACHE_GRAPH)
    )
    _with_int8_caches(serving, engine)
    failures = []
    for kind in ("node", "initializer", "input", "output"):
        ours, theirs = ({one.name: one for one in getattr(graph, kind)} for graph in (found, serving))
        different = [name for name in {**theirs, **ours} if ours.get(name) != theirs.get(name)]
        if different:
            more = f" and {len(different) - 1} more are" if len(different) > 1 else " is"
            failures.append(f"{INT8_CACHE_GRAPH}: the {kind} {different[0]}{more} not that of {SERVING_GRAPH}")
    return failures


def _with_int8_caches(graph: onnx.GraphProto, engine: Engine) -> None:
    """Change a serving graph into one with int8 caches."""
    from onnx import TensorProto

    facts, has_records = engine.manifest.architecture, engine.manifest.cache_scales == PER_POSITION
    layers = {names.past_key(layer): layer for layer in range(facts.num_layers)}
    for node in graph.node:
        if node.op_type == "GroupQueryAttention":
            if has_records:
                _attend_over_records(node, engine)
            else:
                _attend_over_codes(node, layers[node.input[3]])
    for value in (*graph.input, *graph.output):
        if value.name.startswith((names.PAST_PREFIX, names.PRESENT_PREFIX)):
            value.type.tensor_type.elem_type = TensorProto.INT8
            if has_records:
                value.type.tensor_type.shape.dim[3].dim_value = record_bytes(facts.head_size)
    if not has_records:
        graph.initializer.extend(scale_initializers(facts))


def _attend_over_codes(node: onnx.NodeProto, layer: int) -> None:
    """Change a node into one that has the scales of a layer."""
    from onnx import helper

    attributes = {"k_quant_type": QUANTISATION, "v_quant_type": QUANTISATION, "kv_cache_bit_width": 8}
    for place, name in zip(_SCALE_INPUTS, (key_scale(layer), value_scale(layer)), strict=True):
        node.input[place] = name
    node.attribute.extend(helper.make_attribute(name, value) for name, value in attributes.items())
    node.attribute.sort(key=lambda entry: entry.name)


def _attend_over_records(node: onnx.NodeProto, engine: Engine) -> None:
    """Change a node into one of moeship's own attention."""
    from onnx import helper

    facts = engine.manifest.architecture
    given = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
    attributes = {
        "layout": LAYOUT, "num_heads": given["num_heads"], "kv_num_heads": given["kv_num_heads"],
        "head_size": facts.head_size, "rotary_dim": facts.rotary_dim, "positions": engine.manifest.max_sequence,
        "scale": given["scale"], "window": max(0, given["local_window_size"]),
    }  # fmt: skip
    sinks = node.input[_SINKS]
    inputs = [*node.input[:5], names.LAST_POSITIONS, names.NEW_LENGTHS, *node.input[7:9], *([sinks] if sinks else [])]
    changed = helper.make_node(
        "Attention", inputs, list(node.output), name=node.name, domain=names.MOESHIP_DOMAIN, **attributes
    )
    node.CopyFrom(changed)
