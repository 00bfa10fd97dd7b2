"""Plans how each weight of a graph is stored: its precision, its initializers and the order of its experts."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from export.checkpoint.tensor_table import Role, TensorSpec
from export.errors import ExportError
from export.formats.view import Grid
from export.onnx_graph.kernels import BY_NAME
from export.onnx_graph.weights import Initializer, Layout, WeightJob
from export.provider import ONNX_RUNTIME, Provider
from export.quantize.grid import block_size
from export.quantize.recipe import QuantPlan


class WeightPlanner:
    """Makes the jobs of the weights that a graph asks for, in the order in which it asks. `expert_order` has all
    experts; `left_out`: name of a gate or of a row that stacks experts -> experts that this mixture does without.
    `grids`: name of a row -> the uniform grid on which the checkpoint stores it."""

    def __init__(
        self,
        table: Mapping[str, TensorSpec],
        plan: QuantPlan,
        provider: Provider,
        expert_order: Sequence[int],
        left_out: Mapping[str, Collection[int]],
        grids: Mapping[str, Grid],
    ) -> None:
        self.jobs: list[WeightJob] = []
        self._plan = plan
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

    def matrix(
        self,
        name: str,
        together: Sequence[str] = (),
        **scaled: Any,  # noqa: ANN401 - WeightJob's fields
    ) -> tuple[list[str], WeightJob]:
        """Plan a matrix in the precision of its role; returns the names of its initializers, and its job. `together`
        names all matrices that must have the same block size (empty: this one alone).

        A matrix that the checkpoint stores on a grid keeps its codes if they have room in the role's bits and a block
        size divides the groups. A larger block than the preferred one is never taken for it.
        """
        spec = self.table[name]
        bits = self._plan.bits_of(spec.role)
        order = self.kept(name) if spec.role is Role.EXPERT else None
        if bits is None:
            output = Initializer(name=name, dtype=self._provider.float_type, shape=spec.shape)
            job = WeightJob(
                source=name, role=spec.role, layout=Layout.PLAIN, outputs=(output,), expert_order=order, **scaled
            )
            self.jobs.append(job)
            return [name], job
        block = self._block_size(name, together or [name])
        kernels = BY_NAME[ONNX_RUNTIME] if spec.role is Role.EMBEDDING else BY_NAME[self._provider.kernels]
        grid = self._grids.get(name)
        if grid is not None and (grid.bits > bits or grid.group_size % block or not self._states(grid, spec.role)):
            grid = None
        initializers = kernels.initializers(
            spec, bits, block, self._provider, zeros=grid is not None and grid.has_zeros
        )
        job = WeightJob(
            source=name, role=spec.role, layout=kernels.layout, bits=bits, block_size=block, expert_order=order,
            outputs=initializers, grid=grid, **scaled,
        )  # fmt: skip
        self.jobs.append(job)
        return [initializer.name for initializer in initializers], job

    def _states(self, grid: Grid, role: Role) -> bool:
        """Whether the kernels of a role compute with the zero points of a grid."""
        return not grid.has_zeros or role is not Role.EXPERT or self._provider.experts_take_zero_points

    def _block_size(self, name: str, together: Sequence[str]) -> int:
        """The first block size that divides the input features of all matrices `together` and the groups of those that
        are on a grid; if none does, the first that divides the input features."""
        features = [self.table[other].shape[-1] for other in together]
        groups = [self._grids[other].group_size for other in together if other in self._grids]
        fitting = [size for size in self._plan.block_sizes if not any(number % size for number in [*features, *groups])]
        return fitting[0] if fitting else block_size(name, features, self._plan.block_sizes)

    def plain(self, name: str, float_type: str = "float32", **scaled: Any) -> str:  # noqa: ANN401 - WeightJob's fields
        """Plan a tensor that is never quantised (a norm or bias); returns its name. Biases of experts are stored in the
        engine's expert order."""
        spec = self.table[name]
        if self._plan.bits_of(spec.role) is not None:
            raise ExportError(f"planning {name}: the recipe lists the role {spec.role}, which is never quantised")
        order = self.kept(name) if spec.stacks_experts else None
        output = Initializer(name=name, dtype=float_type, shape=spec.shape)
        self.jobs.append(
            WeightJob(source=name, role=spec.role, layout=Layout.PLAIN, outputs=(output,), expert_order=order, **scaled)
        )
        return name

    def bias(self, path: str, **scaled: Any) -> str:  # noqa: ANN401 - WeightJob's fields
        """Plan path.bias; returns its name, or "" if the table has no such row: ONNX's notation for an absent input."""
        return self.plain(f"{path}.bias", self._provider.float_type, **scaled) if f"{path}.bias" in self.table else ""

    def router(self, gate: str) -> str:
        """Plan the float32 matrix of a router, with the rows of all experts; returns its name."""
        output = Initializer(name=gate, dtype="float32", shape=self.table[gate].shape)
        self.jobs.append(
            WeightJob(
                source=gate, role=Role.ROUTER, layout=Layout.PLAIN, expert_order=self._expert_order, outputs=(output,)
            )
        )
        return gate
