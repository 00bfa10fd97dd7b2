"""Records in which a family describes TensorRT-LLM's network of it, and its class in TensorRT-LLM's LLM API."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from export.architecture import Architecture, QueryKeyValue, Router, Scales, SwiGlu
from export.errors import shown


@dataclass(frozen=True, kw_only=True)
class LlmApiModel:
    """A family's class in TensorRT-LLM's PyTorch backend, which loads a checkpoint as it was published. `architecture`
    is the class that config.json must name, and `experts` the module of a layer in which the class looks for experts,
    each with tensors of its own. What it computes is told as in TrtllmNetwork."""

    architecture: str
    experts: str
    routers: tuple[Router, ...] = (Router(),)
    head_norms: bool = False
    shared_expert: bool = False

    def problems(self, facts: Architecture, names: Iterable[str]) -> list[str]:
        """The reasons why the class would not load a checkpoint whose tensors have these names, or would compute it
        differently."""
        found = [
            f"{what}, which TensorRT-LLM's {self.architecture} does not compute; build an ONNX Runtime engine"
            for what in _uncomputed(facts, self.routers, head_norms=self.head_norms, shared_expert=self.shared_expert)
        ]
        if any(name.endswith(".mlp.experts.gate_up_proj") for name in names):
            found.append(
                f"its experts are packed as transformers 5 packs them, and TensorRT-LLM looks for {self.experts}; take "
                "the checkpoint as it was published"
            )
        return found


def _uncomputed(
    facts: Architecture, routers: tuple[Router, ...], *, head_norms: bool, shared_expert: bool
) -> list[str]:
    """The facts of a model, each with its value, that differ from what a network of TensorRT-LLM's computes."""
    computed: dict[str, tuple[Any, ...]] = {
        "scales": (Scales(),), "router": routers, "dense_layers": ((),), "full_layers": ((),),
        "qkv": (QueryKeyValue(norm="head" if head_norms else None),), "swiglu": (SwiGlu(),),
        "shared_ffn_size": (facts.shared_ffn_size,) if shared_expert else (None,),
    }  # fmt: skip
    found = {what: getattr(facts, what) for what in computed}
    return [f"{what} is {shown(value)}" for what, value in found.items() if value not in computed[what]]


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where a network holds one of our modules: its layer (None: outside the layers) and the network's module, without
    the layer's prefix. Of a module that holds the rows of several of ours, this is number `part` of `parts`."""

    layer: int | None
    module: str
    part: int = 0
    parts: int = 1


@dataclass(frozen=True, kw_only=True)
class TrtllmNetwork:
    """A family's network in TensorRT-LLM, and how its modules correspond to ours.

    `architecture` is the network's key in the library's MODEL_MAP. `module` is the file in trt_build/trtllm that
    defines the class; None if the library does. `layer(index)` is our prefix of a layer's names. `top` maps our modules
    outside the layers to the network's, and `modules` those inside a layer, without the prefix. `gated`: the rows of an
    expert's first matrix alternate between gate and up. `pipeline`: the network supports pipeline parallelism.
    `norm_epsilon` is the value that the network uses whatever config.json says; None if it reads config.json.
    `grouped_heads`: several query heads may share a key/value head. `scaled`: the kinds of rotary scaling that the
    network computes. `routers`: the routers that it computes; `head_norms`: it norms each head's queries and keys;
    `shared_expert`: it has an MLP beside the experts.
    `joined` maps a module inside a layer to ours whose rows it holds one after the other. `takes_lone_expert`: a
    mixture of one expert is one to the network. `config(facts)` returns keys of config.json that its class alone has.
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
    routers: tuple[Router, ...] = (Router(),)
    head_norms: bool = False
    shared_expert: bool = False
    joined: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    takes_lone_expert: bool = False
    config: Callable[[Architecture], Mapping[str, Any]] = lambda _: {}

    def places(self, num_layers: int) -> dict[str, Place]:
        """Our module -> its place in the network."""
        found = {ours: Place(layer=None, module=theirs) for ours, theirs in self.top.items()}
        for layer in range(num_layers):
            name = self.layer(layer)
            found |= {f"{name}.{ours}": Place(layer=layer, module=theirs) for ours, theirs in self.modules.items()}
            found |= {
                f"{name}.{ours}": Place(layer=layer, module=theirs, part=part, parts=len(all_of))
                for theirs, all_of in self.joined.items()
                for part, ours in enumerate(all_of)
            }
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
        found += [
            f"{what}, which TensorRT-LLM's {name} does not compute; build for onnxruntime"
            for what in _uncomputed(facts, self.routers, head_norms=self.head_norms, shared_expert=self.shared_expert)
        ]
        if not self.takes_lone_expert and facts.num_experts == 1:
            found.append(
                f"only one expert can be chosen, and TensorRT-LLM's {name} takes a mixture of one for a dense model, "
                "whose tensors have other names; build for onnxruntime"
            )
        return found
