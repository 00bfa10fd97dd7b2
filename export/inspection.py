"""Describes an opened checkpoint: family, sizes, bytes by role, and a diagnosis of its routers.

Of the weights, only the headers and the gates are read.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from export import routing
from export.architecture import Architecture
from export.checkpoint.folder import Checkpoint
from export.checkpoint.tensor_table import Part, Role, TensorSpec
from export.families import read_model


@dataclass(frozen=True, kw_only=True)
class RoleSize:
    """Number of values in all tensors of one role, and their bytes as stored."""

    num_parameters: int
    num_bytes: int


@dataclass(frozen=True, kw_only=True)
class CheckpointReport:
    """Sizes of a checkpoint. `active_parameters` counts what one token uses: K of E experts and everything else."""

    location: str
    architecture: Architecture
    total_parameters: int
    active_parameters: int
    num_tensors: int
    num_bytes: int
    dtype_bytes: Mapping[str, int]  # safetensors label -> bytes
    shard_bytes: Mapping[str, int]  # file name -> bytes of the file
    roles: Mapping[Role, RoleSize]
    routing: routing.RoutingReport | None  # None for a dense model

    def to_json(self) -> dict[str, Any]:
        """The report as plain JSON values."""
        roles = {role.value: asdict(size) for role, size in self.roles.items()}
        return {
            "location": self.location,
            "family": self.architecture.family,
            "architecture": asdict(self.architecture),
            "total_parameters": self.total_parameters,
            "active_parameters": self.active_parameters,
            "num_tensors": self.num_tensors,
            "num_bytes": self.num_bytes,
            "dtype_bytes": dict(self.dtype_bytes),
            "shard_bytes": dict(self.shard_bytes),
            "roles": roles,
            "routing": self.routing.to_json() if self.routing else None,
            "warnings": routing.warnings(self.routing) if self.routing else [],
        }


def describe(checkpoint: Checkpoint, experts_per_token: int | None = None) -> CheckpointReport:
    """Describe a checkpoint; `experts_per_token` replaces the config's K. Raises ConfigError and CheckpointError."""
    model = read_model(checkpoint, experts_per_token)
    checkpoint = model.weights.checkpoint
    dtype_bytes: dict[str, int] = {}
    roles: dict[Role, RoleSize] = {}
    specs = _stored_once(model.weights.table.values())
    for spec in specs:
        so_far = roles.get(spec.role, RoleSize(num_parameters=0, num_bytes=0))
        num_bytes = 0
        for part in spec.parts:
            tensor = checkpoint.tensors[part.name]
            part_bytes = tensor.num_bytes * part.num_elements // math.prod(part.whole_shape)
            packed = part.packed_in(checkpoint)
            label = tensor.dtype if packed is None else packed.label
            dtype_bytes[label] = dtype_bytes.get(label, 0) + part_bytes
            num_bytes += part_bytes
        roles[spec.role] = RoleSize(
            num_parameters=so_far.num_parameters + spec.num_elements, num_bytes=so_far.num_bytes + num_bytes
        )
    return CheckpointReport(
        location=checkpoint.identity,
        architecture=model.architecture,
        total_parameters=sum(spec.num_elements for spec in specs),
        active_parameters=sum(_active_elements(spec, model.architecture) for spec in specs),
        num_tensors=len({part.name for spec in specs for part in spec.parts}),
        num_bytes=sum(size.num_bytes for size in roles.values()),
        dtype_bytes=dtype_bytes,
        shard_bytes={shard.name: shard.stat().st_size for shard in checkpoint.shards},
        roles=roles,
        routing=model.routing_report(),
    )


def _stored_once(table: Iterable[TensorSpec]) -> list[TensorSpec]:
    """The rows of the table without those that repeat the tensor of an earlier row, as a tied head does."""
    rows: dict[tuple[Part, ...], TensorSpec] = {}
    for spec in table:
        rows.setdefault(spec.parts, spec)
    return list(rows.values())


def _active_elements(spec: TensorSpec, architecture: Architecture) -> int:
    """Number of a tensor's values that one token uses: the share K/E of an expert tensor [E, ...], all of any other."""
    if not spec.stacks_experts:
        return spec.num_elements
    return spec.num_elements // architecture.num_experts * architecture.experts_per_token
