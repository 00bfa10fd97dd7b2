"""Plans how each weight of a graph is stored: its precision, its initializers and the order of its experts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any

from export.checkpoint.tensor_table import Role, TensorSpec
from export.errors import KernelsError
from export.formats.view import Grid
from export.onnx_graph.kernels import BY_NAME
from export.onnx_graph.weights import Initializer, Layout, WeightJob
from export.provider import Provider
from export.quantize.recipe import Recipe, no_block_size


class WeightPlanner:
    """Makes the jobs of the weights that a graph asks for, in the order in which it asks. `expert_order` has all
    experts; `left_out`: name of a gate or of a row that stacks experts -> experts that this mixture does without.
    `grids`: name of a row -> the uniform grid on which the checkpoint stores it."""

    def __init__(
        self,
        table: Mapping[str, TensorSpec],
        recipe: Recipe,
        provider: Provider,
        expert_order: Sequence[int],
        left_out: Mapping[str, Collection[int]],
        grids: Mapping[str, Grid],
    ) -> None:
        self.jobs: list[WeightJob] = []
        self._recipe = recipe.for_model(table.values())
        self._provider = provider
        self._expert_order = tuple(expert_order)
        self._left_out = left_out
        self._grids = grids
        self.table = {
            name: spec.with_experts(len(self.kept(name))) if spec.stacks_experts else spec
            for name, spec in table.items()
        }

    def kept(self, name: str) -> tuple[int, ...]:
        """The experts of a gate or of a row that stacks experts, in the engine's expert order, without those that are
        left out."""
        left_out = self._left_out.get(name, ())
        return tuple(expert for expert in self._expert_order if expert not in left_out)

    def is_quantised(self, name: str) -> bool:
        """Whether the recipe quantises a row of the table."""
        return self._recipe.choice(self.table[name]) is not None

    def matrix(
        self,
        name: str,
        together: Sequence[str] = (),
        **scaled: Any,  # noqa: ANN401 - WeightJob's fields
    ) -> tuple[list[str], WeightJob]:
        """Plan a matrix as the recipe says; returns the names of its initializers, and its job. `together` names all
        matrices that must have the same block size (empty: this one alone).

        A matrix that the checkpoint stores on a grid keeps its codes if they have room in the recipe's bits and a block
        size divides the groups. A larger block than the preferred one is never taken for it. Such a matrix has the
        grid's bits, if the kernels have them for all matrices `together`: more bits would hold the same values.
        """
        spec = self.table[name]
        storage = self._recipe.storage(spec)
        order = self.kept(name) if spec.role is Role.EXPERT else None
        if storage is None:
            output = Initializer(name=name, dtype=self._provider.float_type, shape=spec.shape)
            job = WeightJob(
                source=name, role=spec.role, layout=Layout.PLAIN, outputs=(output,), expert_order=order, **scaled
            )
            self.jobs.append(job)
            return [name], job
        bits, block = storage.bits, self._block_size(name, together or [name])
        kernels = BY_NAME[self._provider.kernels]
        grid = self._grids.get(name)
        if grid is not None and (grid.bits > bits or grid.group_size % block or not self._states(grid, spec.role)):
            grid = None
        if grid is not None and self._has_bits(grid, together, spec.role):
            bits = grid.bits
        initializers = kernels.initializers(
            spec, bits, block, self._provider, zeros=grid is not None and grid.has_zeros
        )
        job = WeightJob(
            source=name, role=spec.role, layout=kernels.layout, storage=replace(storage, bits=bits, block_size=block),
            expert_order=order, outputs=initializers, grid=grid, **scaled,
        )  # fmt: skip
        self.jobs.append(job)
        return [initializer.name for initializer in initializers], job

    def _has_bits(self, grid: Grid, together: Sequence[str], role: Role) -> bool:
        """Whether kernels have a grid's bits, and all matrices `together` lie on grids like it."""
        grids = [self._grids.get(other) for other in together]
        alike = all(
            other is not None and (other.bits, other.group_size, other.has_zeros)
            == (grid.bits, grid.group_size, grid.has_zeros)
            for other in grids
        )  # fmt: skip
        return alike and grid.bits in self._provider.offers(role).bits

    def _states(self, grid: Grid, role: Role) -> bool:
        """Whether the kernels of a role compute with the zero points of a grid."""
        return not grid.has_zeros or self._provider.offers(role).zero_points

    def _block_size(self, name: str, together: Sequence[str]) -> int:
        """The first block size that all matrices `together` may have and that divides the groups of those that are on a
        grid; if none does, the first that they may have."""
        specs = [self.table[other] for other in together]
        allowed = [self._recipe.block_sizes(spec) for spec in specs]
        common = [size for size in allowed[0] if all(size in others for others in allowed)]
        groups = [self._grids[other].group_size for other in together if other in self._grids]
        fitting = [size for size in common if not any(number % size for number in groups)]
        if not common and all(allowed):
            found = " and ".join(str(sizes[0]) for sizes in allowed)
            raise KernelsError(
                f"planning {name}: the kernel of {specs[0].role} weights has one block size for "
                f"{' and '.join(together)}, found {found}; give both the same"
            )
        if not common:
            features = [spec.shape[-1] for spec in specs]
            raise no_block_size(name, features, self._provider.offers(specs[0].role).block_sizes)
        return (fitting or common)[0]

    def plain(self, name: str, float_type: str = "float32", **scaled: Any) -> str:  # noqa: ANN401 - WeightJob's fields
        """Plan a tensor that is never quantised (a norm or bias); returns its name. Biases of experts are stored in the
        engine's expert order."""
        spec = self.table[name]
        order = self.kept(name) if spec.stacks_experts else None
        output = Initializer(name=name, dtype=float_type, shape=spec.shape)
        self.jobs.append(
            WeightJob(source=name, role=spec.role, layout=Layout.PLAIN, outputs=(output,), expert_order=order, **scaled)
        )
        return name

    def bias(self, path: str, **scaled: Any) -> str:  # noqa: ANN401 - WeightJob's fields
        """Plan path.bias; returns its name, or "" if the table has no such row: ONNX's notation for an absent input."""
        return self.plain(f"{path}.bias", self._provider.float_type, **scaled) if f"{path}.bias" in self.table else ""

    def sinks(self, path: str) -> str:
        """Plan path.sinks; returns its name, or "" if the table has no such row."""
        name = f"{path}.sinks"
        return self.plain(name, self._provider.float_type) if name in self.table else ""

    def router(self, gate: str) -> str:
        """Plan the float32 matrix of a router, or its bias, with the rows of all experts; returns its name."""
        output = Initializer(name=gate, dtype="float32", shape=self.table[gate].shape)
        self.jobs.append(
            WeightJob(
                source=gate, role=Role.ROUTER, layout=Layout.PLAIN, expert_order=self._expert_order, outputs=(output,)
            )
        )
        return gate

    def router_bias(self, gate: str) -> str:
        """Plan the bias of the router whose matrix is `gate`; returns its name, or "" if the table has no such row."""
        bias = f"{gate.removesuffix('weight')}bias"
        return self.router(bias) if bias in self.table else ""
