"""What ONNX Runtime's CUDA kernels are registered for, and a graph held against it by the operators' own schemas."""

from __future__ import annotations

import onnx
import onnxruntime

# Types that CUDA kernels of 1.31 are registered for, by the type variables of the operators' schemas. Source:
# docs/OperatorKernels.md and the registrations in onnxruntime/{core/providers,contrib_ops}/cuda.
KERNELS = {
    "GroupQueryAttention": {"T": {"float16", "bfloat16"}, "T_CACHE": {"float16", "bfloat16", "int8"}, "M": {"int32"}},
    "MoE": {"T": {"float", "float16", "bfloat16"}},
    "QMoE": {"T": {"float16", "bfloat16"}, "T1": {"uint8"}, "T2": {"float16", "bfloat16"}},
    "MatMulNBits": {"T1": {"float", "float16", "bfloat16"}, "T2": {"uint8"}},
    "GatherBlockQuantized": {
        "T1": {"uint8", "uint4", "int4"}, "T2": {"float", "float16", "bfloat16"}, "Tind": {"int32", "int64"},
    },
    "FusedMatMul": {"T": {"float", "float16", "bfloat16", "double"}},
    "SimplifiedLayerNormalization": {"T": {"float", "float16", "bfloat16", "double"}, "V": {"float", "float16"}},
    "LayerNormalization": {"T": {"float", "float16", "bfloat16", "double"}},
    "Gelu": {"T": {"float", "float16", "double"}},
    **{
        name: {"T": {"float", "float16", "double"}}
        for name in ("Abs", "Equal", "Exp", "Greater", "Log", "Max", "Reciprocal", "Where")
    },
    "Sigmoid": {"T": {"float", "float16", "bfloat16", "double"}},
    "TopK": {"T": {"float", "float16", "double", "int32", "int64"}},
    "Gather": {"T": {"float", "float16", "int64"}, "Tind": {"int32", "int64"}},
    "Add": {"T": {"float", "float16", "bfloat16", "double", "int32", "int64"}},
    "Sub": {"T": {"float", "float16", "bfloat16", "double", "int32", "int64"}},
    "Mul": {"T": {"float", "float16", "bfloat16", "double", "int32", "int64"}},
    "Div": {"T": {"float", "float16", "bfloat16", "double", "int32", "int64"}},
    "ReduceSum": {"T": {"float", "float16", "double", "int32", "int64"}},
    "Cast": {"T1": {"float", "float16", "int64", "int32"}, "T2": {"float", "float16", "int64", "int32"}},
    "Reshape": {"T": {"float", "float16"}},
    "Softmax": {"T": {"float", "float16", "double", "bfloat16"}},
    "Split": {"T": {"float", "float16", "bfloat16", "double", "int32", "int64"}},
    "Clip": {"T": {"float", "float16", "double", "int64"}},
    "Slice": {"T": {"float"}, "Tind": {"int64"}},
    "Shape": {"T": {"float", "float16", "int64"}, "T1": {"int64"}},
    "Identity": {"T": {"float"}, "V": {"float"}},
}  # fmt: skip


def written_types(model):
    """Value -> element type's name, of what the graph is given; computed values are added by `check_types`."""
    names = {number: name.lower() for name, number in onnx.TensorProto.DataType.items()}
    types = {tensor.name: names[tensor.data_type] for tensor in model.graph.initializer}
    return types | {value.name: names[value.type.tensor_type.elem_type] for value in model.graph.input}


def check_types(model):
    """What of a graph has no CUDA kernel, or contradicts its schema; also every operator that the graph has."""
    names = {number: name.lower() for name, number in onnx.TensorProto.DataType.items()}
    schemas = {}
    for schema in onnxruntime.capi.onnxruntime_pybind11_state.get_all_operator_schema():
        key = (schema.domain, schema.name)
        opset = 21 if schema.domain == "" else 1
        if schema.since_version <= opset and schema.since_version > getattr(schemas.get(key), "since_version", 0):
            schemas[key] = schema
    types, problems = written_types(model), []
    for node in model.graph.node:
        schema, bound = schemas[node.domain, node.op_type], {}
        for value, formal in zip(node.input, schema.inputs, strict=False):
            if value and bound.setdefault(formal.typeStr, types[value]) != types[value]:
                problems.append(f"{node.name}: {formal.name} is {types[value]}, {formal.typeStr} {bound}")
        attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        if node.op_type == "Cast":
            bound["T2"] = names[attributes["to"]]
        if node.op_type == "Shape":
            bound["T1"] = "int64"
        for value, formal in zip(node.output, schema.outputs, strict=False):
            types[value] = bound.get(formal.typeStr) or formal.typeStr.removeprefix("tensor(").removesuffix(")")
        if node.op_type == "Split":  # whose one formal output stands for any number
            types |= dict.fromkeys(node.output, bound["T"])
        problems += [
            f"{node.name}: {variable} is {bound[variable]}"
            for variable, allowed in KERNELS[node.op_type].items()
            if variable in bound and bound[variable] not in allowed
        ]
    for value in model.graph.output:
        declared = names[value.type.tensor_type.elem_type]
        if types[value.name] != declared:
            problems.append(f"{value.name} is declared {declared}, computed {types[value.name]}")
    return problems, {node.op_type for node in model.graph.node}
