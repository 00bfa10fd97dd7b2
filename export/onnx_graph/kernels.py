"""The two kinds of kernels that multiply quantised matrices: their nodes, and the shapes of their weights.

onnxruntime  MatMulNBits, QMoE and GatherBlockQuantized, ONNX Runtime's contributed operators (docs/ContribOperators.md)
moeship      BlockLinear, Experts and Embedding, of the library in trt_build/ort/kernels, over export/quantize/layout.py
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from export.architecture import Router, SwiGlu
from export.checkpoint.tensor_table import TensorSpec
from export.errors import KernelsError
from export.onnx_graph import names
from export.onnx_graph.initializers import initializer_names, quantized_initializers, zero_points_name
from export.onnx_graph.weights import Initializer, Layout, WeightJob
from export.provider import ONNX_RUNTIME, OWN_KERNELS, Provider
from export.quantize.layout import LAYOUT, MatrixLayout


@dataclass(frozen=True, kw_only=True)
class Matrix:
    """A planned weight of shape [(E,) N, K]: its job, the names of its initializers, and of its bias ("": none)."""

    job: WeightJob
    initializers: list[str]
    shape: tuple[int, ...]
    bias: str

    @property
    def codes_and_scales(self) -> list[str]:
        """The names of the initializers of codes and scales."""
        return self.initializers[:2]

    @property
    def zeros(self) -> str:
        """The name of the zero points' initializer, or "" if every zero point is 2^(bits-1)."""
        return self.initializers[2] if len(self.initializers) > 2 else ""


@dataclass(frozen=True, kw_only=True)
class Operation:
    """A node of the graph without its name and output."""

    operator: str
    domain: str
    inputs: list[str]
    attributes: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Routed:
    """How a mixture is routed: the value `router` holds the logits, and the `k` experts with the largest are chosen.
    With `normalise` the softmax is over these k, else over all experts. `activation` is applied between the two matrix
    products of an expert; `swiglu` says more of it if it is "swiglu"."""

    router: str
    k: int
    activation: str
    normalise: bool
    swiglu: SwiGlu


class Kernels(ABC):
    """One kind of kernels. The argument `accuracy_level` is that of the recipe."""

    domain: ClassVar[str]
    layout: ClassVar[Layout]
    activations: ClassVar[tuple[str, ...]]  # activations that the kernel of the experts supports
    one_storage: ClassVar[bool]  # whether both matrices of the experts have the same bits and block size

    def check_mixture(self, router: Router, activation: str, path: str) -> None:
        """Raise KernelsError that names what of a mixture's router and activation these kernels do not support."""
        needed = {
            "router's score": (router.score, ("softmax", "sparse_mixer")),  # the graph computes the second
            "router's groups": (router.groups, (1,)),
            "router's bias": (router.bias, (False,)),
            "experts' activation": (activation, self.activations),
        }
        for name, (value, known) in needed.items():
            if value not in known:
                raise KernelsError(
                    f"planning {path}: its {name} is {value}, and these kernels have only "
                    f"{' and '.join(map(str, known))}; this model cannot be built for them"
                )

    @abstractmethod
    def initializers(
        self, spec: TensorSpec, bits: int, block: int, provider: Provider, *, zeros: bool
    ) -> tuple[Initializer, ...]:
        """The initializers of a quantised weight: codes, scales and, with `zeros`, zero points."""

    @abstractmethod
    def embedding(self, ids: str, matrix: Matrix) -> Operation:
        """The node that looks up rows of a matrix [N, K]: int64 [...] to float32 [..., K]."""

    @abstractmethod
    def linear(self, x: str, matrix: Matrix, accuracy_level: int) -> Operation:
        """The node that multiplies x [..., K] by a matrix [N, K] and adds its bias."""

    @abstractmethod
    def experts(self, x: str, routed: Routed, first: Matrix, second: Matrix, accuracy_level: int) -> Operation:
        """The node that computes a mixture on x [..., H]; `first` and `second` stack the matrices of all experts."""


def without_absent_end(inputs: list[str]) -> list[str]:
    """The inputs up to the last that is present."""
    while not inputs[-1]:
        inputs = inputs[:-1]
    return inputs


def mixture_attributes(routed: Routed) -> dict[str, Any]:
    """The attributes that ONNX Runtime's MoE and QMoE have in common."""
    attributes: dict[str, Any] = {
        "k": routed.k, "activation_type": routed.activation,
        "normalize_routing_weights": int(routed.normalise), "use_sparse_mixer": 0, "swiglu_fusion": 0,
    }  # fmt: skip
    if routed.activation == "swiglu":
        attributes |= {"swiglu_fusion": 1, "swiglu_limit": routed.swiglu.finite_limit, **_alpha_and_beta(routed.swiglu)}
    return attributes


def _alpha_and_beta(swiglu: SwiGlu) -> dict[str, Any]:
    return {"activation_alpha": swiglu.alpha, "activation_beta": swiglu.beta}


class _OnnxRuntime(Kernels):
    domain = names.MICROSOFT_DOMAIN
    layout = Layout.BLOCKS
    activations = ("relu", "gelu", "silu", "swiglu", "identity")
    one_storage = True

    def initializers(
        self, spec: TensorSpec, bits: int, block: int, provider: Provider, *, zeros: bool
    ) -> tuple[Initializer, ...]:
        return quantized_initializers(spec, bits, block, provider, zeros=zeros)

    def embedding(self, ids: str, matrix: Matrix) -> Operation:
        codes, scales = matrix.codes_and_scales
        inputs = without_absent_end([codes, ids, scales, matrix.zeros])
        attributes = {
            "bits": matrix.job.bits, "block_size": matrix.job.block_size, "gather_axis": 0, "quantize_axis": 1,
        }  # fmt: skip
        return Operation(operator="GatherBlockQuantized", domain=self.domain, inputs=inputs, attributes=attributes)

    def linear(self, x: str, matrix: Matrix, accuracy_level: int) -> Operation:
        rows, columns = matrix.shape
        inputs = [x, *matrix.codes_and_scales, matrix.zeros, "", matrix.bias]
        attributes = {
            "N": rows, "K": columns, "bits": matrix.job.bits, "block_size": matrix.job.block_size,
            "accuracy_level": accuracy_level, "weight_prepacked": 0,
        }  # fmt: skip
        return Operation(
            operator="MatMulNBits", domain=self.domain, inputs=without_absent_end(inputs), attributes=attributes
        )

    def experts(self, x: str, routed: Routed, first: Matrix, second: Matrix, accuracy_level: int) -> Operation:
        stored = [(matrix.job.bits, matrix.job.block_size) for matrix in (first, second)]
        if stored[0] != stored[1]:
            (bits, block), (second_bits, second_block) = stored
            raise KernelsError(
                f"planning {second.job.source}: ONNX Runtime's QMoE has one storage for both matrices of an expert, "
                f"found {second_bits} bits in blocks of {second_block} beside {bits} bits in blocks of {block} for "
                f"{first.job.source}; give both the same, or build for moeship's kernels"
            )
        inputs = [x, routed.router, *first.codes_and_scales, first.bias, *second.codes_and_scales, second.bias]
        if first.zeros or second.zeros:
            inputs += ["", "", "", first.zeros, second.zeros]
            inputs = without_absent_end(inputs)
        attributes = {
            **mixture_attributes(routed), "expert_weight_bits": first.job.bits, "block_size": first.job.block_size,
            "quant_type": "int", "weights_prepacked": 0, "accuracy_level": accuracy_level,
        }  # fmt: skip
        return Operation(operator="QMoE", domain=self.domain, inputs=inputs, attributes=attributes)


class _Moeship(Kernels):
    domain = names.MOESHIP_DOMAIN
    layout = Layout.GROUPS
    activations = ("gelu", "silu", "swiglu")
    one_storage = False

    def initializers(
        self,
        spec: TensorSpec,
        bits: int,
        block: int,
        provider: Provider,  # noqa: ARG002 - the layout is one for all
        *,
        zeros: bool,
    ) -> tuple[Initializer, ...]:
        *stack, rows, features = spec.shape
        matrix = MatrixLayout(rows=rows, features=features, bits=bits, block_size=block)
        of_codes, of_scales = initializer_names(spec.name)
        scales_shape = (*stack, *matrix.scales_shape)
        found = [
            Initializer(name=of_codes, dtype="uint8", shape=(*stack, *matrix.codes_shape)),
            Initializer(name=of_scales, dtype="float16", shape=scales_shape),
        ]
        if zeros:
            found.append(Initializer(name=zero_points_name(spec.name), dtype="uint8", shape=scales_shape))
        return tuple(found)

    def embedding(self, ids: str, matrix: Matrix) -> Operation:
        rows, columns = matrix.shape
        attributes = self._storage(matrix) | {"features": columns, "rows": rows}
        inputs = without_absent_end([ids, *matrix.codes_and_scales, matrix.zeros])
        return Operation(operator="Embedding", domain=self.domain, inputs=inputs, attributes=attributes)

    def linear(self, x: str, matrix: Matrix, accuracy_level: int) -> Operation:
        rows, columns = matrix.shape
        attributes = self._common(matrix, accuracy_level) | {"in_features": columns, "out_features": rows}
        inputs = without_absent_end([x, *matrix.codes_and_scales, matrix.zeros, matrix.bias])
        return Operation(operator="BlockLinear", domain=self.domain, inputs=inputs, attributes=attributes)

    def experts(self, x: str, routed: Routed, first: Matrix, second: Matrix, accuracy_level: int) -> Operation:
        experts, hidden, width = second.shape
        attributes = self._common(first, accuracy_level) | {
            "second_bits": second.job.bits, "second_block_size": second.job.block_size,
            "hidden_size": hidden, "expert_size": width, "experts": experts, "k": routed.k,
            "activation": routed.activation,
            "activation_limit": routed.swiglu.finite_limit, **_alpha_and_beta(routed.swiglu),
        }  # fmt: skip
        inputs = [x, routed.router, *first.codes_and_scales, first.zeros, first.bias]
        inputs = without_absent_end([*inputs, *second.codes_and_scales, second.zeros, second.bias])
        return Operation(operator="Experts", domain=self.domain, inputs=inputs, attributes=attributes)

    def _common(self, matrix: Matrix, accuracy_level: int) -> dict[str, Any]:
        return self._storage(matrix) | {"activations": "int8" if accuracy_level == 4 else "float32"}

    def _storage(self, matrix: Matrix) -> dict[str, Any]:
        return {"layout": LAYOUT, "bits": matrix.job.bits, "block_size": matrix.job.block_size}


BY_NAME: Mapping[str, Kernels] = MappingProxyType({ONNX_RUNTIME: _OnnxRuntime(), OWN_KERNELS: _Moeship()})
