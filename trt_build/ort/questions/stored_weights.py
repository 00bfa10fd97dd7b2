"""The weights that an engine stores, dequantised, in the checkpoint's own layout.

    stored = open_stored_weights(engine, model)
    stored.load_rows("lm_head.linear.weight", slice(0, 16))      # float32, (code - zero point) * scale
    Reference(dataclasses.replace(model, weights=stored))        # the reference on what the engine stores

Names, shapes, places and layouts come from the engine's scoring graph, and values from its data file. Undone are the
engine's order of experts, the alternation of gate and up, the joining of query, key and value, and the factor that
float16 queries carry. The file is mapped, and a few rows are dequantised at a time.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from export.checkpoint.tensor_table import Join, Role, TensorSpec
from export.errors import QuantizationError
from export.exporter import DATA_FILE, SCORING_GRAPH
from export.families import Model
from export.families.shared.network import Attention
from export.floats import widen
from export.onnx_graph import names
from export.quantize.grid import SEARCH_VERSION, unpack
from export.quantize.layout import GROUP_ROWS, MatrixLayout
from export.quantize.recipe import NEAREST
from trt_build.calibration import checksums_of
from trt_build.comparison.read_back import FloatArray, ReadBack, Recipe
from trt_build.errors import EngineError
from trt_build.ort.engine import Engine
from trt_build.ort.questions.stored_graph import Extent, StoredGraph, StoredMatrix, read_graph

ByteArray = npt.NDArray[np.uint8]

# The two codes of a byte as signed float32 numbers, the lower one first, read as one item of eight bytes: a look-up
# unpacks and converts at once.
_NIBBLES = np.stack([np.arange(256) & 15, np.arange(256) >> 4], axis=1).astype(np.float32) - 8
_SMALLEST_NORMAL = 2.0**-14  # of float16
_PAIRS = np.ascontiguousarray(_NIBBLES).view(np.uint64)[:, 0]


@dataclass(frozen=True, kw_only=True)
class StoredWeights(ReadBack):
    """An engine's weights under our names. `factors`: a row -> how many of its first rows carry which factor.
    `nearest`: the rows that are rounded without a search. `search`: the version of the search that chose the others'
    scales."""

    graph: StoredGraph
    mapped: mmap.mmap
    matrices: Mapping[str, StoredMatrix]
    factors: Mapping[str, tuple[int, float]]
    nearest: frozenset[str] = frozenset()
    search: int = SEARCH_VERSION

    def matrix(self, name: str) -> StoredMatrix | None:
        """The quantised form of a row; None if it is stored as floats, or not at all."""
        return self.matrices.get(f"{name}.codes")

    def keeps_codes(self, name: str) -> bool:
        """Codes with zero points are not kept for the experts on CUDA, whose scales ONNX Runtime takes as float16."""
        grid, matrix = self.grid(name), self.matrix(name)
        if grid is None or matrix is None or not super().keeps_codes(name):
            return False
        on_cuda = matrix.scales.dtype == "float16" and not matrix.grouped
        return not (grid.has_zeros and on_cuda and self.table[name].role is Role.EXPERT)

    def searched_otherwise(self, name: str) -> bool:
        return self.search != SEARCH_VERSION and name not in self.nearest and name not in self.checksums

    def recipe(self, name: str) -> Recipe | None:
        matrix = self.matrix(name)
        if matrix is None:
            return None
        scale_type = matrix.scales.dtype
        late = scale_type == "float16" and not matrix.grouped
        return Recipe(
            bits=matrix.bits, block=matrix.block_size, scale_type=scale_type, late=late, nearest=name in self.nearest
        )

    def row_factor(self, name: str) -> float:
        return min(1.0, self.factors.get(name, (0, 1.0))[1])

    def float_type(self, name: str) -> str | None:
        """The dtype in which a row that is not quantised is stored; None if it is quantised or absent."""
        extent = self.graph.extents.get(name)
        return None if extent is None else extent.dtype

    def misfit(self, name: str) -> str | None:
        spec, matrix = self.table[name], self.matrix(name)
        shape = self._shape(spec)
        if matrix is None:
            extent = self.graph.extents.get(name)
            found = None if extent is None else extent.shape
            return None if found == shape else f"found {_shapes(found)}, expected {_shapes(shape)}"
        try:
            expected = _quantised_shapes(matrix, shape)
        except QuantizationError as error:
            return str(error)
        parts = [extent for extent in (matrix.codes, matrix.scales, matrix.zeros) if extent is not None]
        for extent, one in zip(parts, expected, strict=False):
            if math.prod(extent.shape) != math.prod(one) or extent.shape[: len(shape) - 2] != shape[:-2]:
                return f"{extent.name}: found {_shapes(extent.shape)}, expected as many values as {_shapes(one)}"
        return None

    def part_rows(
        self,
        name: str,
        group: int,
        first: int,
        last: int,
        copy: int = 0,  # noqa: ARG002 - there is one
    ) -> list[FloatArray]:
        spec = self.table[name]
        turns = len(spec.groups[group])
        values = self._rows(spec, self._place(spec, group), turns, self.rows_before(spec, group), first, last)
        return [values[turn::turns] for turn in range(turns)]

    def part_scales(self, name: str, group: int, first: int, last: int) -> list[FloatArray] | None:
        """None for refitted scales, and for scales that were rounded to so small float16 numbers after the codes were
        computed that other codes may be nearer."""
        spec, matrix = self.table[name], self.matrix(name)
        if matrix is None or (self.checkpoint.packed and self.is_packed(name)):
            return None
        turns, before = len(spec.groups[group]), self.rows_before(spec, group)
        start, stop = before + turns * first, before + turns * last
        count = len(self.experts[name]) if spec.stacks_experts else 1
        data = np.frombuffer(self.mapped, dtype=np.uint8)
        scales = _block_scales(matrix, data, spec.shape[-2:], count, self._place(spec, group), start, stop)
        if matrix.scales.dtype == "float16" and not matrix.grouped and (np.abs(scales) < _SMALLEST_NORMAL).any():
            return None
        scaled, factor = self.factors.get(name, (0, 1.0))
        if start < scaled:
            scales[: scaled - start] /= np.float32(factor)
        return [scales[turn::turns] for turn in range(turns)]

    def rounded(self, name: str, group: int, first: int, values: npt.NDArray[Any]) -> FloatArray:
        """The values rounded to the engine's float type, with the factor that they carry there taken back."""
        expected, (scaled, factor) = widen(values).copy(), self.factors.get(name, (0, 1.0))
        if self.float_type(name) == "float16":
            own = max(0, scaled - self.rows_before(self.table[name], group) - first)
            expected[:own] *= np.float32(factor)
            with np.errstate(over="ignore"):
                expected = widen(expected.astype(np.float16))
            expected[:own] /= np.float32(factor)
        return expected

    def _shape(self, spec: TensorSpec) -> tuple[int, ...]:
        """The shape of a row as it is stored, before quantisation."""
        return (len(self.experts[spec.name]), *spec.shape[1:]) if spec.stacks_experts else spec.shape

    def _place(self, spec: TensorSpec, group: int) -> int:
        """The index of an expert's matrix among those that are stored; 0 for a row that stacks none."""
        if not spec.stacks_experts:
            return 0
        if group not in self.experts[spec.name]:
            raise EngineError(
                f"reading {spec.name} of the engine: expert {group} is asked for, and the engine does without it; "
                "build it with --keep-all-experts"
            )
        return self.experts[spec.name].index(group)

    def rows_before(self, spec: TensorSpec, group: int) -> int:
        """The rows of a joined matrix that come before a group's."""
        return sum(parts[0].shape[0] for parts in spec.groups[:group]) if spec.join is Join.CONCATENATE else 0

    def _rows(self, spec: TensorSpec, place: int, turns: int, before: int, first: int, last: int) -> FloatArray:
        """Rows of a matrix or vector as they are stored, with the factor undone. The pages that were read are given
        back, since else the whole file would come to count as this process's memory."""
        start, stop = before + turns * first, before + turns * last
        matrix, data = self.matrix(spec.name), np.frombuffer(self.mapped, dtype=np.uint8)
        if matrix is None:
            stored = self.graph.extents[spec.name].view(data)
            stored = stored[place] if spec.stacks_experts else stored
            if spec.name in self.experts and not spec.stacks_experts:  # a router's rows
                stored = stored[[self.experts[spec.name].index(row) for row in range(start, stop)]]
            else:
                stored = stored[start:stop]
            # A copy, since float32 is not converted and the mapped file must not be written.
            values = widen(stored) if stored.dtype == np.float16 else stored.astype(np.float32)
        else:
            count = len(self.experts[spec.name]) if spec.stacks_experts else 1
            values = _dequantise(matrix, data, spec.shape[-2:], count, place, start, stop)
        self.mapped.madvise(mmap.MADV_DONTNEED)
        scaled, factor = self.factors.get(spec.name, (0, 1.0))
        if start < scaled:
            values[: scaled - start] /= np.float32(factor)
        return values


def open_stored_weights(engine: Engine, model: Model) -> StoredWeights:
    """Open the weights that an engine of `model` stores. Raises EngineError for a graph that cannot be read, and for an
    engine of an earlier format, which stores them as its kernels read them."""
    if engine.old:
        raise EngineError(
            f"reading the weights of {engine.folder}: it has format {engine.manifest.format_version}, whose weights "
            "may be packed for the kernels of one machine; build the engine again"
        )
    graph = read_graph(engine.folder, SCORING_GRAPH)
    return StoredWeights(
        checkpoint=model.weights.checkpoint,
        table=model.weights.table,
        graph=graph,
        mapped=_map(engine.folder / DATA_FILE),
        matrices=graph.matrices(),
        experts=_stored_experts(engine, model),
        factors=_query_factors(graph, model),
        checksums=checksums_of(engine.manifest.calibration),
        nearest=_rounded_rows(engine, model),
        search=engine.manifest.precision.search,
    )


def _rounded_rows(engine: Engine, model: Model) -> frozenset[str]:
    """The rows whose codes the engine's recipe rounds without a search."""
    table = model.weights.table
    recipe = engine.manifest.recipe().for_model(table.values())
    choices = {name: recipe.choice(spec) for name, spec in table.items()}
    return frozenset(name for name, choice in choices.items() if choice is not None and choice.method == NEAREST)


def _map(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)


def attention_factor(graph: StoredGraph, layer: int, attention: Attention, head_size: int) -> float:
    """The power of two that the queries of a layer carry: what the node's scale lacks of the model's. 1.0 if the graph
    has no such node, or a scale that is not positive."""
    for node in graph.nodes:
        if node.operator == "GroupQueryAttention" and node.input(3) == names.past_key(layer):
            scale = float(node.attributes.get("scale", 0.0))
            return 2.0 ** round(math.log2(attention_scale(attention, head_size) / scale)) if scale > 0 else 1.0
    return 1.0


def attention_scale(attention: Attention, head_size: int) -> float:
    """The factor by which the products of query and key are multiplied."""
    return 1 / math.sqrt(head_size) if attention.factor is None else attention.factor


def _query_factors(graph: StoredGraph, model: Model) -> dict[str, tuple[int, float]]:
    found = {}
    for layer, record in enumerate(model.family.network(model.weights.checkpoint.config).layers):
        rows = model.weights.table[f"{record.attention.output}.weight"].shape[-1]  # of all query heads
        factor = attention_factor(graph, layer, record.attention, rows // record.attention.num_heads)
        for kind in ("weight", "bias"):
            found[f"{record.attention.inputs[0]}.{kind}"] = rows, factor
    return {name: value for name, value in found.items() if value[1] != 1.0}


def _stored_experts(engine: Engine, model: Model) -> dict[str, tuple[int, ...]]:
    """A row that stacks experts -> the experts that are stored; a router's row -> all of them; in the engine's
    order."""
    order, found = engine.manifest.expert_order, {}
    for layer in model.architecture.mixture_layers:
        left_out = engine.manifest.left_out_experts.get(str(layer), ())
        for name in model.mixture_rows(layer):
            stacks = model.weights.table[name].stacks_experts
            found[name] = tuple(expert for expert in order if not (stacks and expert in left_out))
    return found


def _shapes(shape: Sequence[int] | None) -> str:
    return "nothing" if shape is None else str(list(shape))


def _layout(matrix: StoredMatrix, rows: int, features: int) -> MatrixLayout:
    return MatrixLayout(rows=rows, features=features, bits=matrix.bits, block_size=matrix.block_size)


def _quantised_shapes(matrix: StoredMatrix, shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    """The shapes of codes, scales and zero points of a weight [..., N, K]. Raises QuantizationError for bits and block
    sizes that there are none of."""
    *stack, rows, features = shape
    if matrix.grouped:
        layout = _layout(matrix, rows, features)
        return [(*stack, *layout.codes_shape), (*stack, *layout.scales_shape), (*stack, *layout.scales_shape)]
    bits, block = matrix.bits, matrix.block_size
    if bits not in (4, 8) or block < 1 or features % block:
        raise QuantizationError(f"found {bits} bits in blocks of {block} for {features} input features")
    blocks = features // block
    return [(*stack, rows, features * bits // 8), (*stack, rows, blocks), (*stack, rows, -(-blocks * bits // 8))]


def _block_scales(
    matrix: StoredMatrix, data: ByteArray, shape: Sequence[int], count: int, place: int, first: int, last: int
) -> FloatArray:
    """The scales [last - first, P] of what `_dequantise` gives."""
    rows, features = shape
    if not matrix.grouped:
        return widen(matrix.scales.view(data).reshape(count, rows, -1)[place, first:last]).copy()
    layout = _layout(matrix, rows, features)
    start = first // GROUP_ROWS
    own = slice(first - start * GROUP_ROWS, last - start * GROUP_ROWS)
    groups = matrix.scales.view(data).reshape(count, layout.groups, -1)[place, start : -(-last // GROUP_ROWS)]
    by_row = groups.reshape(-1, layout.blocks, GROUP_ROWS).transpose(0, 2, 1)
    return widen(by_row).reshape(-1, layout.blocks)[own].copy()


def _dequantise(
    matrix: StoredMatrix, data: ByteArray, shape: Sequence[int], count: int, place: int, first: int, last: int
) -> FloatArray:
    """Rows `first` to `last` of the matrix [N, K] at `place` of `count` stacked ones, float32."""
    rows, features = shape
    half = np.float32(1 << (matrix.bits - 1))
    if matrix.grouped:
        layout = _layout(matrix, rows, features)
        groups = slice(first // GROUP_ROWS, -(-last // GROUP_ROWS))

        def by_group(extent: Extent) -> npt.NDArray[Any]:
            return extent.view(data).reshape(count, layout.groups, -1)[place, groups]

        def by_row(extent: Extent) -> npt.NDArray[Any]:
            return by_group(extent).reshape(-1, layout.blocks, GROUP_ROWS).transpose(0, 2, 1)

        values = _signed_of_groups(by_group(matrix.codes), layout)
        zeros = None if matrix.zeros is None else by_row(matrix.zeros)
        result = _scaled(values, widen(by_row(matrix.scales)), zeros, half)
        own = slice(first - groups.start * GROUP_ROWS, last - groups.start * GROUP_ROWS)
        return result.reshape(-1, layout.blocks * layout.block_size)[own, :features]
    blocks = features // matrix.block_size

    def part(extent: Extent) -> npt.NDArray[Any]:
        return extent.view(data).reshape(count, rows, -1)[place, first:last]

    values = _signed(part(matrix.codes), matrix.bits).reshape(last - first, blocks, matrix.block_size)
    zeros = None if matrix.zeros is None else unpack(part(matrix.zeros), matrix.bits)[:, :blocks]
    return _scaled(values, widen(part(matrix.scales)), zeros, half).reshape(last - first, features)


def _signed(packed: ByteArray, bits: int) -> FloatArray:
    """Bytes [..., n] to codes less 2^(bits-1), float32 [..., n * 8 / bits]."""
    if bits == 4:
        return np.take(_PAIRS, packed).view(np.float32)
    values = packed.astype(np.float32)
    values -= np.float32(1 << (bits - 1))
    return values


def _signed_of_groups(packed: ByteArray, layout: MatrixLayout) -> FloatArray:
    """Like `_signed`, for groups [g, bytes] of sixteen rows: float32 [g, 16, P, B]."""
    values = layout.unpack_groups(packed).astype(np.float32)
    values -= np.float32(1 << (layout.bits - 1))
    return values.reshape(len(packed), GROUP_ROWS, layout.blocks, layout.block_size)


def _scaled(values: FloatArray, scales: FloatArray, zeros: ByteArray | None, half: np.float32) -> FloatArray:
    """Multiply codes less 2^(bits-1) [..., P, B] by scales [..., P] in place. Zero points [..., P] other than `half`,
    which is 2^(bits-1), are subtracted in its place."""
    if zeros is not None:
        values -= (zeros.astype(np.float32) - half)[..., None]
    values *= scales[..., None]
    return values
