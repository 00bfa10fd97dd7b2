"""Families: how each kind of model is configured, stored and computed. Each family is one file.

A module of this folder or of a folder in it with a `FAMILY` record is a family. Nothing else lists the families, so
adding one adds a file and changes no other. Families without experts are in `dense`.
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
from export.families.shared.network import Network
from export.families.shared.trtllm_network import LlmApiModel, TrtllmNetwork
from export.routing import RoutingReport, diagnose

if TYPE_CHECKING:
    from export.onnx_graph.graph import GraphBuilder

MAX_ALL_EXPERTS = 1 << 18  # limit on the experts of all layers together: six times those of the largest published model


@dataclass(frozen=True, kw_only=True)
class Family:
    """Everything that moeship must know about a model family.

    - `matches(config)`: whether a raw config.json is of this family.
    - `read_config(config)`: its Architecture; raises ConfigError.
    - `tensors(architecture, names)`: the rows of the tensor table. `names` are the names of the checkpoint's tensors,
      which show the spelling that it uses.
    - `decoder(graph, architecture)`: adds the network from token ids to the last layer's output; returns that output.
    - `head(graph, architecture, x)`: adds the network from the last layer's output to logits.
    - `layer(index)`: the prefix of a layer's rows in the table.
    - `network(config)`: what the reference computes, read from a raw config.json that `read_config` has accepted.
    - `tokenizers`: model_type -> tokenizer class, if transformers has registered one (TOKENIZER_MAPPING_NAMES in
      models/auto/tokenization_auto.py).
    - `tokenizer_holds`: whether transformers takes that class whatever class tokenizer_config.json asks for
      (MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS there).
    - `harmless_tensors`: endings of the names of tensors that are ignored.
    - `base_modules`: module at the top of the model without its head -> the name that the whole model has for it.
    - `trtllm`: TensorRT-LLM's network; `llm_api`: the class in TensorRT-LLM's LLM API. None if there is none.
    """

    name: str
    matches: Callable[[Mapping[str, Any]], bool]
    read_config: Callable[[Mapping[str, Any]], Architecture]
    tensors: Callable[[Architecture, Sequence[str]], list[TensorSpec]]
    decoder: Callable[[GraphBuilder, Architecture], str]
    head: Callable[[GraphBuilder, Architecture, str], str]
    layer: Callable[[int], str]
    network: Callable[[Mapping[str, Any]], Network]
    tokenizers: Mapping[str, str] = field(default_factory=dict)
    tokenizer_holds: bool = False
    trtllm: TrtllmNetwork | None = None
    llm_api: LlmApiModel | None = None
    harmless_tensors: tuple[str, ...] = ()
    base_modules: Mapping[str, str] = field(default_factory=dict)

    def trtllm_network(self) -> TrtllmNetwork:
        """TensorRT-LLM's network of this family. Raises ExportError if there is none."""
        if self.trtllm is None:
            having = ", ".join(family.name for family in families() if family.trtllm)
            raise ExportError(
                f"planning a TensorRT-LLM engine: moeship builds TensorRT-LLM engines of {having}, not of {self.name}; "
                "build for onnxruntime"
            )
        return self.trtllm


@dataclass(frozen=True, kw_only=True)
class Model:
    """A checkpoint with its family, its Architecture, and its weights under our names."""

    family: Family
    architecture: Architecture
    weights: Weights

    def gates(self) -> dict[int, npt.NDArray[np.float32]]:
        """Layer -> matrix of its router, float32 [E, H], for layers that have experts; empty for a dense model. A
        router with a bias has it as one more column, [E, H+1], as if its inputs ended with a 1."""
        table = self.weights.table
        names = [spec.name for spec in table.values() if spec.role is Role.ROUTER and len(spec.shape) == 2]
        layers = {self.family.layer(layer): layer for layer in range(self.architecture.num_layers)}
        found = {}
        for name in names:
            gate, bias = self.weights.load(name), f"{name.removesuffix('weight')}bias"
            columns = [gate, self.weights.load(bias)[:, None]] if bias in table else [gate]
            found[_layer_of(name, layers)] = np.concatenate(columns, axis=1)
        return found

    def mixture_rows(self, layer: int) -> list[str]:
        """The names of a layer's gate, of its bias, and of the layer's rows that stack experts."""
        prefix = f"{self.family.layer(layer)}."
        rows = [row for row in self.weights.table.values() if row.role is Role.ROUTER or row.stacks_experts]
        return [row.name for row in rows if row.name.startswith(prefix)]

    def routing_report(self) -> RoutingReport | None:
        """The diagnosis of the gates, which are read for it; None for a dense model."""
        if not self.architecture.is_moe:
            return None
        return diagnose(self.gates(), self.architecture.experts_per_token)


def _layer_of(name: str, layers: Mapping[str, int]) -> int:
    """The layer that a row's name belongs to. `layers`: prefix of a layer's names -> layer."""
    return next(layers[stem] for stem in accumulate(name.split("."), "{}.{}".format) if stem in layers)


@cache
def families() -> tuple[Family, ...]:
    """All families, in the order of their names."""
    modules = [importlib.import_module(found.name) for found in pkgutil.walk_packages(__path__, f"{__name__}.")]
    records = [module.FAMILY for module in modules if hasattr(module, "FAMILY")]
    return tuple(sorted(records, key=lambda family: family.name))


def family_named(name: str) -> Family:
    """The family of this name. Raises ConfigError that lists the known names."""
    found = [family for family in families() if family.name == name]
    if not found:
        known = ", ".join(family.name for family in families())
        raise ConfigError(f"looking for the family {shown(name, 40)}: there are {known}; update moeship")
    return found[0]


def registered_tokenizer(config: Mapping[str, Any]) -> tuple[str | None, bool]:
    """The tokenizer class that transformers has registered for the model_type of a config.json, None if no family names
    one, and whether transformers takes it whatever class tokenizer_config.json asks for."""
    model_type = str(config.get("model_type"))
    found = next((family for family in families() if model_type in family.tokenizers), None)
    return (None, False) if found is None else (found.tokenizers[model_type], found.tokenizer_holds)


def detect(config: Mapping[str, Any], where: str) -> Family:
    """Find the family of a raw config.json. Raises ConfigError that names the model_type and the known families."""
    found = [family for family in families() if family.matches(config)]
    if len(found) == 1:
        return found[0]
    known = ", ".join(family.name for family in families())
    raise ConfigError(
        f"reading config.json of {named(where)}: model_type {shown(config.get('model_type'))} is not among those that "
        f"moeship builds ({known}); check that this is the checkpoint you meant"
    )


def read_model(checkpoint: Checkpoint, experts_per_token: int | None = None) -> Model:
    """Make a Model of a checkpoint: detect its family, read its config, check every tensor against the table.

    `experts_per_token` overrides the config's K. Raises ConfigError and CheckpointError.
    """
    family = detect(checkpoint.config, str(checkpoint.folder))
    ids = read_token_ids(checkpoint.folder, checkpoint.config)
    architecture = replace(family.read_config(checkpoint.config), bos_token_id=ids.bos, eos_token_ids=ids.eos)
    if experts_per_token is not None:
        architecture = _with_experts_per_token(architecture, experts_per_token)
    checkpoint = with_whole_names(checkpoint)
    _check_counts(checkpoint, architecture)
    specs = family.tensors(architecture, list(checkpoint.tensors))
    weights = open_weights(checkpoint, specs, family.harmless_tensors)
    if architecture.tied_head and not _shares_one_tensor(specs):
        architecture = replace(architecture, tied_head=False)
    return Model(family=family, architecture=architecture, weights=weights)


def _shares_one_tensor(specs: Sequence[TensorSpec]) -> bool:
    """Whether embedding and head are one tensor of the checkpoint."""
    matrices = [spec.parts for spec in specs if spec.role in (Role.EMBEDDING, Role.HEAD)]
    return len(matrices) == 2 and matrices[0] == matrices[1]


def with_whole_names(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the names that tensors have in the whole model. A file of the model without its head lacks
    the base model's prefix, and some tools put it before the head too; transformers reads both
    (core_model_loading.py: rename_source_key). Raises ConfigError for a family that is not known."""
    family = detect(checkpoint.config, str(checkpoint.folder))
    renamed: dict[str, str] = {}
    for name in checkpoint.tensors:
        first, _, rest = name.partition(".")
        if first in family.base_modules:
            renamed[name] = f"{family.base_modules[first]}.{name}"
        elif first in family.base_modules.values() and rest.startswith("lm_head."):
            renamed[name] = rest
    renamed = {old: new for old, new in renamed.items() if new not in checkpoint.tensors}
    if not renamed:
        return checkpoint
    tensors = {
        renamed.get(name, name): replace(stored, name=renamed.get(stored.name, stored.name))
        for name, stored in checkpoint.tensors.items()
    }
    packed = {renamed.get(name, name): tensor for name, tensor in checkpoint.packed.items()}
    return replace(checkpoint, tensors=tensors, packed=packed)


def _check_counts(checkpoint: Checkpoint, architecture: Architecture) -> None:
    """Raise CheckpointError if the checkpoint has too few tensors for its layers and experts. The check comes before
    the tensor table, which could otherwise become too large for memory."""
    found, layers, experts = len(checkpoint.tensors), architecture.num_layers, architecture.num_experts
    packed = [stored.shape[0] for stored in checkpoint.tensors.values() if len(stored.shape) == 3]
    room = sum(packed) if packed else found  # each expert has its own tensors, or a tensor with three axes stacks all
    if layers > found or architecture.num_mixtures * experts > min(room, MAX_ALL_EXPERTS):
        said = f"{layers} layers" + (f" of {experts} experts" if experts else "")
        raise CheckpointError(
            f"reading {named(checkpoint.folder)}: config.json says {said}, but the files hold {found} tensors, too few "
            "for so many; is the config from another checkpoint?"
        )


def _with_experts_per_token(architecture: Architecture, experts_per_token: int) -> Architecture:
    if not architecture.is_moe:
        raise ConfigError(
            f"overriding num_experts_per_tok: {architecture.family} is dense and has no experts to choose; leave it out"
        )
    if not 1 <= experts_per_token <= architecture.num_experts:
        raise ConfigError(
            f"overriding num_experts_per_tok: found {experts_per_token}, expected 1 to {architecture.num_experts}, "
            "the number of experts"
        )
    if architecture.router.jitter is not None and experts_per_token != 2:
        raise ConfigError(
            f"overriding num_experts_per_tok: found {experts_per_token}, expected 2, the number of experts that the "
            f"sparse mixer of {architecture.family} chooses"
        )
    return replace(architecture, experts_per_token=experts_per_token)
