"""One file a family: config.json to facts, checkpoint names to a tensor table, one decoder layer as a graph.

A family is a module of this folder with a `FAMILY` record, and is found by that: adding one adds a file and changes
none.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from export.architecture import Architecture
from export.checkpoint.folder import Checkpoint
from export.checkpoint.tensor_table import Role, TensorSpec, Weights, open_weights
from export.checkpoint.token_ids import read_token_ids
from export.errors import CheckpointError, ConfigError, ExportError, named, shown
from export.families.reference import Reference
from export.families.trtllm_network import LlmApiModel, TrtllmNetwork

if TYPE_CHECKING:
    from export.onnx_graph.graph import GraphBuilder

MAX_ALL_EXPERTS = 1 << 18  # of all layers together: six times the largest model published


@dataclass(frozen=True, kw_only=True)
class Family:
    """What moeship must know of a model family.

    `matches(config)` tells whether a raw config.json is of this family; `read_config` turns it into facts or raises
    ConfigError; `tensors(architecture, names)` is the table for the spelling that the checkpoint's names use;
    `decoder(graph, architecture)` adds the network from token ids to the last layer's output, `head` what makes logits
    of it; `layer(index)` is the prefix of a layer's rows in the table; `reference` says which of transformers' models
    it is. `tokenizers`: model_type -> the class of its tokenizer, where transformers has one registered
    (TOKENIZER_MAPPING_NAMES in models/auto/tokenization_auto.py). `trtllm` names the modules of TensorRT-LLM's network
    and `llm_api` the class of its LLM API, of families that have them.
    """

    name: str
    matches: Callable[[Mapping[str, Any]], bool]
    read_config: Callable[[Mapping[str, Any]], Architecture]
    tensors: Callable[[Architecture, Sequence[str]], list[TensorSpec]]
    decoder: Callable[[GraphBuilder, Architecture], str]
    head: Callable[[GraphBuilder, Architecture, str], str]
    layer: Callable[[int], str]
    reference: Reference
    tokenizers: Mapping[str, str] = field(default_factory=dict)
    trtllm: TrtllmNetwork | None = None
    llm_api: LlmApiModel | None = None
    harmless_tensors: tuple[str, ...] = ()

    def trtllm_network(self) -> TrtllmNetwork:
        """TensorRT-LLM's network of this family. Raises ExportError where there is none."""
        if self.trtllm is None:
            having = ", ".join(family.name for family in families() if family.trtllm)
            raise ExportError(
                f"planning a TensorRT-LLM engine: moeship has no network of TensorRT-LLM's for the family {self.name}, "
                f"only for {having}; build for onnxruntime"
            )
        return self.trtllm


@dataclass(frozen=True, kw_only=True)
class Model:
    """A checkpoint understood: its family, its facts, its weights under our names."""

    family: Family
    architecture: Architecture
    weights: Weights

    def gates(self) -> dict[int, npt.NDArray[np.float32]]:
        """Layer -> the router's matrix [E, H], of the layers that have one; empty for a dense model."""
        names = [spec.name for spec in self.weights.table.values() if spec.role is Role.ROUTER]
        layers = {self.family.layer(layer): layer for layer in range(self.architecture.num_layers)}
        return {_layer_of(name, layers): self.weights.load(name) for name in names}


def _layer_of(name: str, layers: Mapping[str, int]) -> int:
    """The layer of a row's name; `layers` has the prefix of each."""
    return next(layers[stem] for stem in accumulate(name.split("."), "{}.{}".format) if stem in layers)


@cache
def families() -> tuple[Family, ...]:
    """Every family that moeship knows, in the order of their files' names."""
    names = sorted(module.name for module in pkgutil.iter_modules(__path__))
    modules = [importlib.import_module(f"{__name__}.{name}") for name in names]
    return tuple(module.FAMILY for module in modules if hasattr(module, "FAMILY"))


def family_named(name: str) -> Family:
    """The family of an engine or plan that names it. Raises ConfigError."""
    found = [family for family in families() if family.name == name]
    if not found:
        known = ", ".join(family.name for family in families())
        raise ConfigError(f"looking for the family {shown(name, 40)}: there are {known}; update moeship")
    return found[0]


def registered_tokenizer(config: Mapping[str, Any]) -> str | None:
    """The class of tokenizer that transformers has for the model_type of a config.json, where a family says so."""
    model_type = str(config.get("model_type"))
    found = [family.tokenizers[model_type] for family in families() if model_type in family.tokenizers]
    return found[0] if found else None


def detect(config: Mapping[str, Any], where: str) -> Family:
    """The family of a raw config.json. Raises ConfigError naming the model type and what exists."""
    found = [family for family in families() if family.matches(config)]
    if len(found) == 1:
        return found[0]
    known = ", ".join(family.name for family in families())
    raise ConfigError(
        f"reading config.json of {named(where)}: model_type {shown(config.get('model_type'))} is none that moeship "
        f"builds ({known}); is this the checkpoint you meant?"
    )


def read_model(checkpoint: Checkpoint, experts_per_token: int | None = None) -> Model:
    """Understand a checkpoint: detect its family, read its config, check every tensor against the table.

    `experts_per_token` overrides the config's K. Raises ConfigError and CheckpointError.
    """
    family = detect(checkpoint.config, str(checkpoint.folder))
    ids = read_token_ids(checkpoint.folder, checkpoint.config)
    architecture = replace(family.read_config(checkpoint.config), bos_token_id=ids.bos, eos_token_ids=ids.eos)
    if experts_per_token is not None:
        architecture = _with_experts_per_token(architecture, experts_per_token)
    _check_counts(checkpoint, architecture)
    specs = family.tensors(architecture, list(checkpoint.tensors))
    weights = open_weights(checkpoint, specs, family.harmless_tensors)
    return Model(family=family, architecture=architecture, weights=weights)


def _check_counts(checkpoint: Checkpoint, architecture: Architecture) -> None:
    """Raise CheckpointError where the files cannot hold so many layers and experts, before a table of them is made."""
    found, layers, experts = len(checkpoint.tensors), architecture.num_layers, architecture.num_experts
    packed = [stored.shape[0] for stored in checkpoint.tensors.values() if len(stored.shape) == 3]
    room = sum(packed) if packed else found  # experts lie in a tensor each, or one after the other in one of three axes
    if layers > found or architecture.num_mixtures * experts > min(room, MAX_ALL_EXPERTS):
        said = f"{layers} layers" + (f" of {experts} experts" if experts else "")
        raise CheckpointError(
            f"reading {named(checkpoint.folder)}: config.json says {said}, but the files hold {found} tensors, too few "
            "for so many; is the config from another checkpoint?"
        )


def _with_experts_per_token(architecture: Architecture, experts_per_token: int) -> Architecture:
    if not architecture.is_moe:
        raise ConfigError(f"overriding num_experts_per_tok: {architecture.family} is dense and routes nothing")
    if not 1 <= experts_per_token <= architecture.num_experts:
        raise ConfigError(
            f"overriding num_experts_per_tok: found {experts_per_token}, expected 1 to {architecture.num_experts}, "
            "the number of experts"
        )
    return replace(architecture, experts_per_token=experts_per_token)
