"""One file a family: config.json to facts, checkpoint names to a tensor table, one decoder layer as a graph.

A family is a module here with a `FAMILY` record. Adding one adds a file and its name to `_MODULES`.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from export.architecture import Architecture
from export.checkpoint import Checkpoint
from export.errors import CheckpointError, ConfigError, named, shown
from export.settings import read_token_ids
from export.tensor_table import Role, TensorSpec, Weights, open_weights
from export.trtllm.network import TrtllmNetwork

if TYPE_CHECKING:
    from export.onnx_graph.graph import GraphBuilder

MAX_ALL_EXPERTS = 1 << 18  # of all layers together: six times the largest model published

_MODULES = ("phi", "phixtral", "mixtral")


@dataclass(frozen=True, kw_only=True)
class Family:
    """What moeship must know of a model family.

    `matches(config)` tells whether a raw config.json is of this family; `read_config` turns it into facts or raises
    ConfigError; `tensors(architecture, names)` is the table for the spelling that the checkpoint's names use;
    `decoder(graph, architecture)` adds the network from token ids to the normed hidden state; `trtllm` names the
    modules of TensorRT-LLM's network.
    """

    name: str
    matches: Callable[[Mapping[str, Any]], bool]
    read_config: Callable[[Mapping[str, Any]], Architecture]
    tensors: Callable[[Architecture, Sequence[str]], list[TensorSpec]]
    decoder: Callable[[GraphBuilder, Architecture], str]
    head: Callable[[GraphBuilder, Architecture, str], str]
    trtllm: TrtllmNetwork
    harmless_tensors: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Model:
    """A checkpoint understood: its family, its facts, its weights under our names."""

    family: Family
    architecture: Architecture
    weights: Weights

    def gates(self) -> dict[int, npt.NDArray[np.float32]]:
        """Layer -> the router's matrix [E, H]; empty for a dense model."""
        names = [spec.name for spec in self.weights.table.values() if spec.role is Role.ROUTER]
        return {layer: self.weights.load(name) for layer, name in enumerate(names)}


def families() -> list[Family]:
    """Every family that moeship knows."""
    return [importlib.import_module(f"export.families.{name}").FAMILY for name in _MODULES]


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
    if layers > found or layers * experts > min(room, MAX_ALL_EXPERTS):
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
