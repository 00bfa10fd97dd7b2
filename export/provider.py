"""What differs between ONNX Runtime's execution providers: one record a provider, read by export, session and package.

Facts of 1.31, from its sources and documentation (docs/contrib_ops/cuda/{moe_qmoe,gqa,matmul_nbits}.md):

- CUDA's GroupQueryAttention, MoE and QMoE take float16; there is no float32 attention. Its QMoE takes blocks of 64 or
  128 on every GPU since Turing, and of the matrices' scales the type of the activations.
- Of equal router logits the CPU kernels choose the highest place, the CUDA kernels the lowest
  (microsoft/onnxruntime#28980).
- Where zero points are left out, GatherBlockQuantized has not always taken the same on both (#31692).
- A float32 product runs in TF32 on CUDA, with the 10 bits of a float16's fraction, unless that is turned off.
- A MoE's `gelu` is the tanh form, Phi-2's, on CPU and in CUDA's grouped products of int4, int8 and, but for Hopper,
  float16; Hopper's float16 product has the erf form beside it, and the runtime takes whichever measures faster.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType

from export.errors import ExportError, unknown

FLOAT16_MAX = 65504.0
ONNX_RUNTIME, OWN_KERNELS = "onnxruntime", "moeship"  # whose kernels


@dataclass(frozen=True, kw_only=True)
class Provider:
    """`float_type` is that of matrices, of the activations between them and of the key/value cache; the residual
    stream, the norms, the router and the logits are float32 on every provider. `block_sizes` lists what
    quantised matrices may take, the first that divides their input features; `accuracy_level` is theirs, `kernels`
    says whose kernels multiply them (export/onnx_graph/kernels.py)."""

    name: str
    runtime_name: str  # ONNX Runtime's
    float_type: str
    precisions: tuple[str, ...]
    block_sizes: Mapping[str, tuple[int, ...]]  # by precision
    accuracy_level: int
    prefers_highest_place: bool  # of equal router logits
    writes_zero_points: bool  # of the embedding
    package: str  # that has it
    extra: str  # of moeship, that brings the package
    options: Mapping[str, str] = field(default_factory=dict)  # of a session
    kernels: str = ONNX_RUNTIME

    def expert_order(self, num_experts: int) -> tuple[int, ...]:
        """Which expert stands at each place, so that of equal router logits the lowest expert index wins."""
        places = range(num_experts)
        return tuple(reversed(places)) if self.prefers_highest_place else tuple(places)


PROVIDERS: Mapping[str, Provider] = MappingProxyType(
    {
        "cpu": Provider(
            name="cpu", runtime_name="CPUExecutionProvider", float_type="float32",
            precisions=("fp32", "int8", "int4"), accuracy_level=4,
            # Blocks of 32 would cost the tiny phixtral half a per cent of perplexity less at int4, and decoding a fifth
            # more bytes.
            # The kernels round activations to int8 in the same blocks, which int8 feels.
            block_sizes=MappingProxyType({"int8": (32,), "int4": (64, 32)}),
            prefers_highest_place=True, writes_zero_points=False, package="onnxruntime", extra="cpu",
        ),
        "cuda": Provider(
            name="cuda", runtime_name="CUDAExecutionProvider", float_type="float16",
            precisions=("fp16", "int8", "int4"), accuracy_level=0,
            block_sizes=MappingProxyType({"int8": (64,), "int4": (64,)}),
            prefers_highest_place=False, writes_zero_points=True, package="onnxruntime-gpu",
            extra="cuda",
            options=MappingProxyType({"use_tf32": "0"}),
        ),
    }
)  # fmt: skip

# By whose kernels, the providers that have them. Moeship's own multiply quantised matrices alone, read them as they lie
# in the file, and of equal router logits choose the lowest place.
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
    """The record of a provider's name with the kernels of that name. Raises ExportError that lists what exists."""
    if name not in PROVIDERS:
        raise ExportError(f"choosing the provider: {unknown(name, PROVIDERS)}")
    if kernels not in KERNELS:
        raise ExportError(f"choosing the kernels: {unknown(kernels, KERNELS)}")
    if name not in KERNELS[kernels]:
        raise ExportError(
            f"choosing the kernels: those of {kernels} are for the provider {', '.join(KERNELS[kernels])}, found "
            f"{name}; leave --kernels out, or build for that provider"
        )
    return KERNELS[kernels][name]


def named_with_kernels(provider: str, kernels: str) -> str:
    """What an engine runs on, for people."""
    return provider if kernels == ONNX_RUNTIME else f"{provider} with the kernels of {kernels}"
