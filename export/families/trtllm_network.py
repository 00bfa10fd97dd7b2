"""What TensorRT-LLM has of a family: the records that a family may declare of its network, and of its LLM API."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from export.architecture import Architecture, Router, Scales
from export.errors import shown


@dataclass(frozen=True, kw_only=True)
class LlmApiModel:
    """A family's class in TensorRT-LLM's PyTorch backend, which loads a checkpoint as it was published. `architecture`
    is what config.json must name; `problems` tells from the names of a checkpoint's tensors what it would not load."""

    architecture: str
    problems: Callable[[Iterable[str]], list[str]]


@dataclass(frozen=True, kw_only=True)
class TrtllmNetwork:
    """`architecture` is the key of MODEL_MAP; `module` the file in trt_build/trtllm that has its class, None where the
    library does. `layer(index)` is our prefix of a layer; `top` and `modules` map our modules, those in a layer without
    the prefix, to theirs. `gated` rows of an expert's first matrix are gate and up in turn. `pipeline`: the network can
    be cut between layers. `norm_epsilon`: the one that the network has whatever config.json says; None where it reads
    it. `grouped_heads`: several query heads may share a key/value head."""

    architecture: str
    hidden_act: str
    pipeline: bool
    gated: bool
    layer: Callable[[int], str]
    top: Mapping[str, str]
    modules: Mapping[str, str]
    norm_epsilon: float | None = None
    grouped_heads: bool = True
    module: str | None = None

    def names(self, num_layers: int) -> dict[str, tuple[int | None, str]]:
        """Our module -> its layer (None: of the whole model) and their module, without their layer's prefix."""
        found: dict[str, tuple[int | None, str]] = {ours: (None, theirs) for ours, theirs in self.top.items()}
        for layer in range(num_layers):
            found |= {f"{self.layer(layer)}.{ours}": (layer, theirs) for ours, theirs in self.modules.items()}
        return found

    def problems(self, facts: Architecture) -> list[str]:
        """What of a model the network would compute otherwise, or not at all."""
        found, name = [], self.architecture
        if self.norm_epsilon not in (None, facts.norm_epsilon):
            found.append(
                f"norms add {facts.norm_epsilon} to the variance, and TensorRT-LLM's {name} adds {self.norm_epsilon} "
                "whatever config.json says; build for onnxruntime"
            )
        if not self.grouped_heads and facts.num_kv_heads != facts.num_heads:
            found.append(
                f"{facts.num_kv_heads} key/value heads serve {facts.num_heads} attention heads, and TensorRT-LLM's "
                f"{name} wants one for each; build for onnxruntime"
            )
        for what, plain in (("scales", Scales()), ("router", Router()), ("dense_layers", ())):
            if getattr(facts, what) != plain:
                found.append(
                    f"{what} is {shown(getattr(facts, what))}, which TensorRT-LLM's {name} does not compute; build for "
                    "onnxruntime"
                )
        if self.module is None and facts.num_experts == 1:
            found.append(
                f"one expert can be chosen, and TensorRT-LLM's {name} takes a mixture of one for a dense model, whose "
                "tensors have other names; build for onnxruntime"
            )
        return found
