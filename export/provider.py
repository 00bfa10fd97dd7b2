"""One record for each of ONNX Runtime's execution providers, with everything in which they differ for moeship.

Facts of 1.31, from its sources and documentation (docs/contrib_ops/cuda/{moe_qmoe,gqa,matmul_nbits}.md):

- On CUDA, GroupQueryAttention, MoE and QMoE take float16; there is no float32 attention. QMoE takes blocks of 64 or
  128 on every GPU since Turing, and scales of the same type as the activations.
- Among experts with equal router logits the CPU kernels choose the highest index in the graph, the CUDA kernels the
  lowest (microsoft/onnxruntime#28980).
- Without zero points, GatherBlockQuantized has not always assumed the same ones on CPU and CUDA (#31692).
- On CUDA a float32 matrix product runs in TF32, which has the 10 fraction bits of float16, unless TF32 is turned off.
- GroupQueryAttention takes `query_seqlens`, different numbers of new tokens in one call, since 1.32. For CUDA there is
  no 1.32 yet.
- The `gelu` of a MoE is the tanh form, which Phi-2 has, on CPU and in CUDA's grouped products of int4, int8 and, on
  GPUs other than Hopper, float16. For float16 on Hopper there is also a kernel with the erf form, and the runtime
  takes whichever it measures as faster.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from export.errors import ExportError, unknown

FLOAT16_MAX = 65504.0
ONNX_RUNTIME, OWN_KERNELS = "onnxruntime", "moeship"  # values of `kernels`: who made the kernels


@dataclass(frozen=True, kw_only=True)
class Provider:
    """What an execution provider computes with, and how its kernels behave.

    `float_type` is the type of the matrices, of the activations between them and of the key/value cache. The residual
    stream, the norms, the router and the logits are float32 on every provider. `block_sizes` lists the block sizes of
    quantised matrices by preference: a matrix gets the first that divides its input features. `accuracy_level` is the
    attribute of the nodes that multiply quantised matrices. `kernels` says whose kernels multiply quantised matrices
    (export/onnx_graph/kernels.py)."""

    name: str
    runtime_name: str  # ONNX Runtime's name of the provider
    float_type: str
    precisions: tuple[str, ...]
    block_sizes: Mapping[str, tuple[int, ...]]  # precision -> allowed block sizes, the preferred one first
    accuracy_level: int
    prefers_highest_place: bool  # whether, among equal router logits, the kernels choose the highest index in the graph
    mixes_lengths: bool  # whether a step of several sequences may take different numbers of tokens of each
    writes_zero_points: bool  # whether the graph states the zero points of the embedding
    experts_take_zero_points: bool  # whether the kernel of the experts is known to compute with zero points
    package: str  # PyPI package that contains this execution provider
    extra: str  # moeship's extra that installs the package
    options: Mapping[str, str] = field(default_factory=dict)  # provider options of a session
    kernels: str = ONNX_RUNTIME

    def expert_order(self, num_experts: int) -> tuple[int, ...]:
        """The expert at each index of the graph's stacked matrices, in such an order that among equal router logits
        the lowest expert number is chosen."""
        places = range(num_experts)
        return tuple(reversed(places)) if self.prefers_highest_place else tuple(places)


PROVIDERS: Mapping[str, Provider] = MappingProxyType(
    {
        "cpu": Provider(
            name="cpu", runtime_name="CPUExecutionProvider", float_type="float32",
            precisions=("fp32", "int8", "int4"), accuracy_level=4,
            # At int4, blocks of 32 instead of 64 would lower the tiny phixtral's perplexity by half a per cent, but
            # decoding would read a fifth more bytes. The kernels round activations to int8 in blocks of the same size,
            # and with int8 weights that error is visible: so int8 takes blocks of 32.
            block_sizes=MappingProxyType({"int8": (32,), "int4": (64, 32)}),
            prefers_highest_place=True, mixes_lengths=True, writes_zero_points=False, experts_take_zero_points=True,
            package="onnxruntime", extra="cpu",
        ),
        "cuda": Provider(
            name="cuda", runtime_name="CUDAExecutionProvider", float_type="float16",
            precisions=("fp16", "int8", "int4"), accuracy_level=0,
            block_sizes=MappingProxyType({"int8": (64,), "int4": (64,)}),
            prefers_highest_place=False, mixes_lengths=False, writes_zero_points=True, experts_take_zero_points=False,
            package="onnxruntime-gpu", extra="cuda",
            options=MappingProxyType({"use_tf32": "0"}),
        ),
    }
)  # fmt: skip

# Name of the kernels -> the providers that they exist for. Moeship's own kernels multiply quantised matrices only, read
# them as they lie in the file, and among equal router logits choose the lowest index.
KERNELS: Mapping[str, Mapping[str, Provider]] = MappingProxyType(
    {
        ONNX_RUNTIME: PROVIDERS,
        OWN_KERNELS: MappingProxyType(
            {
                "cpu": replace(
                    PROVIDERS["cpu"], kernels=OWN_KERNELS, precisions=("int8", "int4"), prefers_highest_place=False
                )
            }
        ),
    }
)  # fmt: skip


def provider_of(name: str, kernels: str = ONNX_RUNTIME) -> Provider:
    """The record of the provider `name` with the kernels `kernels`. Raises ExportError that lists the known names."""
    if name not in PROVIDERS:
        raise ExportError(f"choosing the provider: {unknown(name, PROVIDERS)}")
    if kernels not in KERNELS:
        raise ExportError(f"choosing the kernels: {unknown(kernels, KERNELS)}")
    if name not in KERNELS[kernels]:
        raise ExportError(
            f"choosing the kernels: the kernels of {kernels} are for the provider {', '.join(KERNELS[kernels])}, found "
            f"{name}; leave --kernels out, or build for that provider"
        )
    return KERNELS[kernels][name]


def named_with_kernels(provider: str, kernels: str) -> str:
    """The provider and the kernels of an engine as words of a message."""
    return provider if kernels == ONNX_RUNTIME else f"{provider} with the kernels of {kernels}"
