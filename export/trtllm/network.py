"""What TensorRT-LLM calls the modules of a family's network: the record that each family declares of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class TrtllmNetwork:
    """`architecture` is the key of MODEL_MAP, `in_library` whether the library brings its class. `layer(index)` is our
    prefix of a layer; `top` and `modules` map our modules, those in a layer without the prefix, to theirs. `gated` rows
    of an expert's first matrix are gate and up in turn. `pipeline`: the network can be cut between layers."""

    architecture: str
    in_library: bool
    hidden_act: str
    pipeline: bool
    gated: bool
    layer: Callable[[int], str]
    top: Mapping[str, str]
    modules: Mapping[str, str]

    def names(self, num_layers: int) -> dict[str, tuple[int | None, str]]:
        """Our module -> its layer (None: of the whole model) and their module, without their layer's prefix."""
        found: dict[str, tuple[int | None, str]] = {ours: (None, theirs) for ours, theirs in self.top.items()}
        for layer in range(num_layers):
            found |= {f"{self.layer(layer)}.{ours}": (layer, theirs) for ours, theirs in self.modules.items()}
        return found
