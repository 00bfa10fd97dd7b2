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
- On the CPU GroupQueryAttention of 1.32 takes keys and values in int8, with a scale for each channel, together with
  `query_seqlens` (tests/trt_build/int8_cache compare it with numpy). On CUDA int8 was not tried.
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

INT8, FLOAT = "int8", "float"  # dtypes of keys and values as commands name them; "float" is the provider's float type
KV_CACHES = (FLOAT, INT8)
PER_CHANNEL, PER_POSITION = "per channel", "per position"  # what a scale of keys and values in int8 is for


@dataclass(frozen=True, kw_only=True)
class Offer:
    """The forms in which the kernel of an operation takes quantised matrices: bits of a code, input features that share
    a scale, whether it is known to compute with zero points, and the dtype of the scales."""

    bits: tuple[int, ...] = (4, 8)
    block_sizes: tuple[int, ...] = (32, 64, 128)
    zero_points: bool = True
    scales: str = "float16"


@dataclass(frozen=True, kw_only=True)
class Provider:
    """What an execution provider computes with, and how its kernels behave.

    `float_type` is the type of the matrices, of the activations between them and of the key/value cache. The residual
    stream, the norms, the router and the logits are float32 on every provider. `linear`, `experts` and `embedding` say
    in which forms the kernels of these operations take quantised matrices. `accuracy_level` is the attribute of the
    nodes that multiply quantised matrices. `kernels` says whose kernels multiply quantised matrices
    (export/onnx_graph/kernels.py)."""

    name: str
    runtime_name: str  # ONNX Runtime's name of the provider
    float_type: str
    precisions: tuple[str, ...]
    linear: Offer
    experts: Offer
    embedding: Offer
    accuracy_level: int
    prefers_highest_place: bool  # whether, among equal router logits, the kernels choose the highest index in the graph
    mixes_lengths: bool  # whether a step of several sequences may take different numbers of tokens of each
    writes_zero_points: bool  # whether the graph states the zero points of the embedding
    package: str  # PyPI package that contains this execution provider
    extra: str  # moeship's extra that installs the package
    options: Mapping[str, str] = field(default_factory=dict)  # provider options of a session
    int8_cache: bool = False  # whether a serving graph may keep keys and values in int8
    cache_scales: str = PER_CHANNEL  # what their scales are for: export/onnx_graph/kv_scales.py, kv_records.py
    kernels: str = ONNX_RUNTIME

    def offers(self, role: str) -> Offer:
        """What the kernel that takes the matrices of a role has."""
        return {"embedding": self.embedding, "expert": self.experts}.get(role, self.linear)

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
            linear=Offer(scales="float32"), experts=Offer(scales="float32"), embedding=Offer(scales="float32"),
            prefers_highest_place=True, mixes_lengths=True, writes_zero_points=False,
            package="onnxruntime", extra="cpu", int8_cache=True,
        ),
        "cuda": Provider(
            name="cuda", runtime_name="CUDAExecutionProvider", float_type="float16",
            precisions=("fp16", "int8", "int4"), accuracy_level=0,
            linear=Offer(block_sizes=(64, 128)), experts=Offer(block_sizes=(64, 128), zero_points=False),
            embedding=Offer(block_sizes=(64, 128), scales="float32"),
            prefers_highest_place=False, mixes_lengths=False, writes_zero_points=True,
            package="onnxruntime-gpu", extra="cuda",
            options=MappingProxyType({"use_tf32": "0"}),
        ),
    }
)  # fmt: skip

OWN = Offer(bits=(2, 3, 4, 5, 6, 8))  # of every operation of moeship's kernels (export/quantize/layout.py)

# Name of the kernels -> the providers that they exist for. Moeship's own kernels multiply quantised matrices only, read
# them as they lie in the file, and among equal router logits choose the lowest index.
KERNELS: Mapping[str, Mapping[str, Provider]] = MappingProxyType(
    {
        ONNX_RUNTIME: PROVIDERS,
        OWN_KERNELS: MappingProxyType(
            {
                "cpu": replace(
                    PROVIDERS["cpu"], kernels=OWN_KERNELS, prefers_highest_place=False,
                    precisions=("int8", "int4", "int2", "q2", "q3", "q4", "q5", "q6", "q8"),
                    linear=OWN, experts=OWN, embedding=OWN, cache_scales=PER_POSITION,
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
