"""Records in which a family describes TensorRT-LLM's network of it, and its class in TensorRT-LLM's LLM API."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from export.architecture import Architecture, QueryKeyValue, Router, Scales, SwiGlu
from export.errors import shown


@dataclass(frozen=True, kw_only=True)
class LlmApiModel:
    """A family's class in TensorRT-LLM's PyTorch backend, which loads a checkpoint as it was published. `architecture`
    is the class that config.json must name. `problems(names)` returns the reasons why the class would not load a
    checkpoint whose tensors have these names."""

    architecture: str
    problems: Callable[[Iterable[str]], list[str]]


@dataclass(frozen=True, kw_only=True)
class TrtllmNetwork:
    """A family's network in TensorRT-LLM, and how its modules correspond to ours.

    `architecture` is the network's key in the library's MODEL_MAP. `module` is the file in trt_build/trtllm that
    defines the class; None if the library does. `layer(index)` is our prefix of a layer's names. `top` maps our modules
    outside the layers to the network's, and `modules` those inside a layer, without the prefix. `gated`: the rows of an
    expert's first matrix alternate between gate and up. `pipeline`: the network supports pipeline parallelism.
    `norm_epsilon` is the value that the network uses whatever config.json says; None if it reads config.json.
    `grouped_heads`: several query heads may share a key/value head. `scaled`: the kinds of rotary scaling that the
    network computes.
    """

    architecture: str
    hidden_act: str
    pipeline: bool
    gated: bool
    layer: Callable[[int], str]
    top: Mapping[str, str]
    modules: Mapping[str, str]
    norm_epsilon: float | None = None
    grouped_heads: bool = True
    scaled: tuple[str, ...] = ()
    module: str | None = None

    def names(self, num_layers: int) -> dict[str, tuple[int | None, str]]:
        """Our module -> its layer (None: outside the layers) and the network's module, without the layer's prefix."""
        found: dict[str, tuple[int | None, str]] = {ours: (None, theirs) for ours, theirs in self.top.items()}
        for layer in range(num_layers):
            found |= {f"{self.layer(layer)}.{ours}": (layer, theirs) for ours, theirs in self.modules.items()}
        return found

    def problems(self, facts: Architecture) -> list[str]:
        """The facts of a model that the network would compute differently or not at all; empty if there are none."""
        found, name = [], self.architecture
        if self.norm_epsilon not in (None, facts.norm_epsilon):
            found.append(
                f"norms add {facts.norm_epsilon} to the variance, and TensorRT-LLM's {name} adds {self.norm_epsilon} "
                "whatever config.json says; build for onnxruntime"
            )
        if not self.grouped_heads and facts.num_kv_heads != facts.num_heads:
            found.append(
                f"{facts.num_kv_heads} key/value heads serve {facts.num_heads} attention heads, and TensorRT-LLM's "
                f"{name} needs one for each; build for onnxruntime"
            )
        if facts.rotary_scaling is not None and facts.rotary_scaling.kind not in self.scaled:
            some = f"scales by {' or '.join(self.scaled)} alone" if self.scaled else "does not scale it"
            found.append(
                f"the rotary embedding is scaled ({facts.rotary_scaling.described}), and TensorRT-LLM's {name} {some}; "
                "build for onnxruntime"
            )
        plain_facts = {
            "scales": Scales(), "router": Router(), "dense_layers": (), "full_layers": (), "qkv": QueryKeyValue(),
            "swiglu": SwiGlu(), "shared_ffn_size": None,
        }  # fmt: skip
        for what, plain in plain_facts.items():
            if getattr(facts, what) != plain:
                found.append(
                    f"{what} is {shown(getattr(facts, what))}, which TensorRT-LLM's {name} does not compute; build for "
                    "onnxruntime"
                )
        if self.module is None and facts.num_experts == 1:
            found.append(
                f"only one expert can be chosen, and TensorRT-LLM's {name} takes a mixture of one for a dense model, "
                "whose "
                "tensors have other names; build for onnxruntime"
            )
        return found
