"""Whose kernels multiply quantised matrices: the nodes that they are, and the form in which these read their weights.

onnxruntime  MatMulNBits and QMoE, ONNX Runtime's contributed operators (docs/ContribOperators.md)
moeship      BlockLinear and Experts, of the library in trt_build/ort/kernels, over export/quantize/layout.py
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from export.architecture import Router
from export.checkpoint.tensor_table import TensorSpec
from export.errors import ExportError
from export.onnx_graph import names
from export.onnx_graph.initializers import initializer_names, quantized_initializers
from export.onnx_graph.weights import Initializer, Layout, WeightJob
from export.provider import ONNX_RUNTIME, OWN_KERNELS, Provider
from export.quantize.layout import LAYOUT, MatrixLayout


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A planned weight of shape [(E,) N, K]: its initializers, and its bias's name, empty where there is none."""

    job: WeightJob
    initializers: list[str]
    shape: tuple[int, ...]
    bias: str


@dataclass(frozen=True, kw_only=True)
class Operation:
    """A node but for its name and output."""

    operator: str
    domain: str
    inputs: list[str]
    attributes: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Routed:
    """What experts do beside their two products: the `k` best of them are taken, with `activation` between the
    products; `router` names the logits. `normalise`: the softmax is one over these k, else over all experts."""

    router: str
    k: int
    activation: str
    normalise: bool


class Kernels(ABC):
    """One kind of kernels. `accuracy_level` is the recipe's."""

    domain: ClassVar[str]
    layout: ClassVar[Layout]
    normalises: ClassVar[tuple[bool, ...]]  # the values of Router.normalise that the experts' kernel has

    def check_router(self, router: Router, path: str) -> None:
        """Raise ExportError naming what of a router these kernels lack."""
        lacking = {
            "score": (router.score, ("softmax",)),
            "normalise": (router.normalise, self.normalises),
            "groups": (router.groups, (1,)),
            "bias": (router.bias, (False,)),
        }
        for name, (value, known) in lacking.items():
            if value not in known:
                raise ExportError(
                    f"planning {path}: its router's {name} is {value}, and these kernels have only "
                    f"{' and '.join(map(str, known))}; this model cannot be built for them"
                )

    @abstractmethod
    def initializers(self, spec: TensorSpec, bits: int, block: int, provider: Provider) -> tuple[Initializer, ...]:
        """Codes and scales of a weight."""

    @abstractmethod
    def linear(self, x: str, matrix: Matrix, accuracy_level: int) -> Operation:
        """x [..., K] by a matrix [N, K], plus its bias."""

    @abstractmethod
    def experts(self, x: str, routed: Routed, first: Matrix, second: Matrix, accuracy_level: int) -> Operation:
        """x [..., H] through experts of two stacked matrices."""


def mixture_attributes(routed: Routed) -> dict[str, Any]:
    """What ONNX Runtime's MoE and QMoE are both told."""
    attributes: dict[str, Any] = {
        "k": routed.k, "activation_type": routed.activation,
        "normalize_routing_weights": int(routed.normalise), "use_sparse_mixer": 0, "swiglu_fusion": 0,
    }  # fmt: skip
    if routed.activation == "swiglu":  # gate * sigmoid(alpha * gate) * (up + beta), neither of the two clamped
        attributes |= {"swiglu_fusion": 1, "activation_alpha": 1.0, "activation_beta": 0.0, "swiglu_limit": math.inf}
    return attributes


class _OnnxRuntime(Kernels):
    domain = names.MICROSOFT_DOMAIN
    layout = Layout.BLOCKS
    normalises = (True, False)

    def initializers(self, spec: TensorSpec, bits: int, block: int, provider: Provider) -> tuple[Initializer, ...]:
        return quantized_initializers(spec, bits, block, provider)

    def linear(self, x: str, matrix: Matrix, accuracy_level: int) -> Operation:
        rows, columns = matrix.shape
        inputs = [x, *matrix.initializers, *(("", "", matrix.bias) if matrix.bias else ())]
        attributes = {
            "N": rows, "K": columns, "bits": matrix.job.bits, "block_size": matrix.job.block_size,
            "accuracy_level": accuracy_level, "weight_prepacked": 0,
        }  # fmt: skip
        return Operation(operator="MatMulNBits", domain=self.domain, inputs=inputs, attributes=attributes)

    def experts(self, x: str, routed: Routed, first: Matrix, second: Matrix, accuracy_level: int) -> Operation:
        inputs = [x, routed.router, *first.initializers, first.bias, *second.initializers, second.bias]
        attributes = {
            **mixture_attributes(routed), "expert_weight_bits": first.job.bits, "block_size": first.job.block_size,
            "quant_type": "int", "weights_prepacked": 0, "accuracy_level": accuracy_level,
        }  # fmt: skip
        return Operation(operator="QMoE", domain=self.domain, inputs=inputs, attributes=attributes)


class _Moeship(Kernels):
    domain = names.MOESHIP_DOMAIN
    layout = Layout.GROUPS
    normalises = (True,)

    def initializers(self, spec: TensorSpec, bits: int, block: int, provider: Provider) -> tuple[Initializer, ...]:  # noqa: ARG002 - the layout is one for all
        *stack, rows, features = spec.shape
        matrix = MatrixLayout(rows=rows, features=features, bits=bits, block_size=block)
        of_codes, of_scales = initializer_names(spec.name)
        return (
            Initializer(name=of_codes, dtype="uint8", shape=(*stack, *matrix.codes_shape)),
            Initializer(name=of_scales, dtype="float16", shape=(*stack, *matrix.scales_shape)),
        )

    def linear(self, x: str, matrix: Matrix, accuracy_level: int) -> Operation:
        rows, columns = matrix.shape
        attributes = self._common(matrix, accuracy_level) | {"in_features": columns, "out_features": rows}
        inputs = [x, *matrix.initializers, *(("", matrix.bias) if matrix.bias else ())]
        return Operation(operator="BlockLinear", domain=self.domain, inputs=inputs, attributes=attributes)

    def experts(self, x: str, routed: Routed, first: Matrix, second: Matrix, accuracy_level: int) -> Operation:
        experts, hidden, width = second.shape
        attributes = self._common(first, accuracy_level) | {
            "hidden_size": hidden, "expert_size": width, "experts": experts, "k": routed.k,
            "activation": routed.activation,
            # gate * sigmoid(alpha * gate) * (up + beta), neither of the two clamped
            "activation_alpha": 1.0, "activation_beta": 0.0, "activation_limit": math.inf,
        }  # fmt: skip
        inputs = [x, routed.router, *first.initializers, "", first.bias, *second.initializers]
        inputs += ["", second.bias] if second.bias else []
        return Operation(operator="Experts", domain=self.domain, inputs=inputs, attributes=attributes)

    def _common(self, matrix: Matrix, accuracy_level: int) -> dict[str, Any]:
        return {
            "layout": LAYOUT, "bits": matrix.job.bits, "block_size": matrix.job.block_size,
            "activations": "int8" if accuracy_level == 4 else "float32",
        }  # fmt: skip


BY_NAME: Mapping[str, Kernels] = MappingProxyType({ONNX_RUNTIME: _OnnxRuntime(), OWN_KERNELS: _Moeship()})
