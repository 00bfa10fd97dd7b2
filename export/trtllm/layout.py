"""Plans the tensors of a TensorRT-LLM checkpoint: for every rank their names, dtypes, shapes and source values.

Shapes on one rank, whose share of a matrix has N outputs (rows) and K inputs (columns). A weight of experts has one
more axis in front.

| form         | weight                          | side tensors                                                   |
|--------------|---------------------------------|----------------------------------------------------------------|
| floats       | [N, K]                          |                                                                |
| W8A16, W4A16 | [K, N * bits / 8] int8, packed  | per_channel_scale [N]                                          |
| W4A16_GPTQ   | [K, N / 4] as floats, packed    | weights_scaling_factor and zero [K / g, N]                     |
| W4A16_AWQ    | [N / 2, K] int8, two rows each  | weights_scaling_factor [N, K / g], prequant_scaling_factor [K] |

How a tensor is shared among the ranks:

- q, k and v are each cut along their heads, and a rank's three pieces are joined. If there are fewer key/value heads
  than ranks, several ranks get the same head.
- attention.dense and mlp.proj are cut along their inputs. Every rank has the whole bias, since the library adds it
  once. With W4A16_GPTQ, however, every rank adds the bias of a matrix outside the experts, so it is zero on all ranks
  except the first.
- mlp.fc is cut along its outputs. If it is gated, up and gate are cut separately and joined, up first. So is
  mlp.shared_expert.fc, whose up and gate are two rows of the table; mlp.shared_expert.proj is cut along its inputs.
- Expert parallelism gives each rank a block of whole experts.
- Every rank has the whole router, in float32.
- lm_head is cut along the vocabulary, which is padded with zeros to a multiple of tp_size.

Sources: tensorrt_llm/models/{phi,llama,qwen}/{model,convert}.py, layers/{moe,linear,attention}.py,
models/modeling_utils.py, quantization/layers.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum

from export.architecture import Architecture
from export.checkpoint.safetensors_header import FLOAT_LABELS
from export.checkpoint.shard_writer import PlannedTensor
from export.checkpoint.tensor_table import Join, TensorSpec
from export.families import Model
from export.families.shared.trtllm_network import Place
from export.trtllm.packing import interleaves_columns
from export.trtllm.parallel import Parallelism
from export.trtllm.precision import TrtllmPrecision

ROUTER, HEAD, QKV, DENSE = "mlp.router", "lm_head", "attention.qkv", "attention.dense"
SHARED_FC, SHARED_PROJ = "mlp.shared_expert.fc", "mlp.shared_expert.proj"
QUANTISED = (QKV, DENSE, "mlp.fc", "mlp.proj", SHARED_FC, SHARED_PROJ)
CUT_ALONG_INPUT = (DENSE, "mlp.proj", SHARED_PROJ)
CUT_ALONG_OUTPUT = ("mlp.fc", SHARED_FC, HEAD)
FIRST_STAGE, LAST_STAGE = ("transformer.vocab_embedding",), ("transformer.ln_f", HEAD)


class Form(StrEnum):
    """How a weight is stored in a rank file."""

    FLOAT = "float"
    CHANNELS = "channels"  # packed, one scale a row
    GROUPS = "groups"  # packed, one scale and zero a group
    PAIRS = "pairs"  # two rows a byte, one scale a group

    @property
    def is_packed(self) -> bool:
        """Whether the bytes have the order in which a GPU's kernels read them. For the other forms TensorRT-LLM makes
        that order when it loads the checkpoint."""
        return self in (Form.CHANNELS, Form.GROUPS)


@dataclass(frozen=True, kw_only=True)
class Slice:
    """The values that one rank takes of one part of a table row.

    `group` is the index of the part or of the expert; `turn` is the part's index in a pair of gate and up, else 0. The
    slice holds the part's rows `first` to `last` (exclusive) in the columns `columns`. They become rows of the rank's
    tensor from `row` on, where the rows of all experts of the rank are counted together.
    """

    rank: int
    group: int
    turn: int
    first: int
    last: int
    columns: tuple[int, int]
    row: int


@dataclass(frozen=True, kw_only=True)
class RankTensor:
    """One tensor of a rank's file. `rows` and `width` are the shape of the weight before packing, with the rows of all
    experts counted together; a side tensor has those of its weight."""

    rank: int
    planned: PlannedTensor
    rows: int
    width: int


@dataclass(frozen=True, kw_only=True)
class TensorJob:
    """The job of writing one row of the tensor table: `tensors` has one tensor for each rank that has a share of it.

    `sides` has the side tensors, such as scales: ending of the name -> rank -> tensor. If `mask_from` is set, values
    from that row on become MASKED_LOGIT. Jobs of a tensor that joins several rows of the table have the same `tensors`
    and `sides`, and slices that do not overlap.
    """

    source: str
    form: Form
    bits: int
    group_size: int
    interleave: bool
    slices: tuple[Slice, ...]
    tensors: dict[int, RankTensor]
    sides: dict[str, dict[int, RankTensor]] = field(default_factory=dict)
    mask_from: int | None = None
    fills: bool = field(default=True, repr=False)  # whether the tensors hold no row of the table but this one

    @property
    def side_tensors(self) -> list[tuple[str, RankTensor]]:
        """All side tensors, each with the ending of its name."""
        return [(ending, side) for ending, ranks in self.sides.items() for side in ranks.values()]

    @property
    def all_tensors(self) -> list[RankTensor]:
        return [*self.tensors.values(), *(side for _, side in self.side_tensors)]


@dataclass(frozen=True, kw_only=True)
class Layout:
    """All jobs of a TensorRT-LLM checkpoint."""

    jobs: tuple[TensorJob, ...]

    @property
    def is_packed(self) -> bool:
        """Whether any weight is in an order that depends on the GPU."""
        return any(job.form.is_packed for job in self.jobs)

    def tensors(self, rank: int) -> list[PlannedTensor]:
        """A rank's tensors in the order of its file."""
        found = (tensor.planned for job in self.jobs for tensor in job.all_tensors if tensor.rank == rank)
        return list(dict.fromkeys(found))  # several jobs may write one tensor


@dataclass(frozen=True, kw_only=True)
class LayoutOptions:
    """Everything but the model that decides a layout. `dtype` is the dtype of tensors that are not quantised. `sm` is
    the compute capability of the GPU that packed matrices are for. With `plain` the checkpoint holds floats, and
    TensorRT-LLM quantises them. Token ids from `mask_from` on stand for no text: the head's bias, if it has one, keeps
    them from being sampled."""

    precision: TrtllmPrecision
    dtype: str
    parallel: Parallelism
    group_size: int
    sm: int
    plain: bool
    mask_from: int | None
    experts: tuple[int, ...]  # experts that are written, in the order of the file; empty for a dense model


def plan_layout(model: Model, options: LayoutOptions) -> Layout:
    """Plan every tensor of every rank. The caller has checked that the parallelism fits the model."""
    network = model.family.trtllm_network()
    places = network.places(model.architecture.num_layers)
    jobs = []
    for spec in model.weights.table.values():
        stem, _, kind = spec.name.rpartition(".")
        jobs.append(_Row(spec, places[stem], kind, model.architecture, options).job())
    return Layout(jobs=tuple(jobs))


def matrix_shapes(layout: Layout) -> Iterator[tuple[str, int, int]]:
    """Module, rows and columns of a rank's quantised matrices; matrices of the same kind are yielded once."""
    seen = set()
    for job in layout.jobs:
        for tensor in job.tensors.values():
            module = tensor.planned.name.removesuffix(".weight").split(".", 3)[-1]
            experts = (
                len({piece.group for piece in job.slices if piece.rank == tensor.rank}) if _is_expert(module) else 1
            )
            shape = (module, tensor.rows // experts, tensor.width)
            if tensor.planned.name.endswith(".weight") and module in QUANTISED and shape not in seen:
                seen.add(shape)
                yield shape


def _is_expert(module: str) -> bool:
    return module in ("mlp.fc", "mlp.proj")


class _Row:
    """Makes the job of one row of the tensor table."""

    def __init__(
        self,
        spec: TensorSpec,
        place: Place,
        kind: str,
        facts: Architecture,
        options: LayoutOptions,
    ) -> None:
        self.spec, self.layer, self.module, self.kind = spec, place.layer, place.module, kind
        self.part, self.parts = place.part, place.parts
        self.facts, self.options, self.parallel = facts, options, options.parallel
        self.experts = len(options.experts) if spec.stacks_experts else 0
        self.quantised = self.module in QUANTISED and kind == "weight" and options.precision.bits > 0

    def job(self) -> TensorJob:
        slices: list[Slice] = []
        tensors: dict[int, RankTensor] = {}
        sides: dict[str, dict[int, RankTensor]] = {}
        form = self._form()
        for pp_rank in self._stages():
            for tp_rank in range(self.parallel.tp_size):
                rank = self.parallel.rank(pp_rank, tp_rank)
                shares = list(self._shares(rank, tp_rank))
                width = shares[0].columns[1] - shares[0].columns[0]
                rows = max(piece.row + piece.last - piece.first for piece in shares)
                slices += [replace(piece, row=piece.row + self.part * rows) for piece in shares]
                rows *= self.parts
                if self.module == HEAD:
                    rows = self._padded_vocab() // self.parallel.tp_size
                elif self._is_added_on_every_rank():
                    rows = self.spec.shape[0]
                groups = len({piece.group for piece in shares}) if self.experts else 0
                name = self._name(pp_rank)
                tensors[rank] = self._tensor(rank, name, form, rows, width, groups)
                for ending, shape, dtype in self._side_shapes(form, rows, width, groups):
                    planned = PlannedTensor(name=f"{name.rpartition('.')[0]}.{ending}", dtype=dtype, shape=shape)
                    sides.setdefault(ending, {})[rank] = RankTensor(rank=rank, planned=planned, rows=rows, width=width)
        options = self.options
        return TensorJob(
            source=self.spec.name,
            form=form,
            bits=options.precision.bits if form is not Form.FLOAT else 0,
            group_size=options.group_size if form in (Form.GROUPS, Form.PAIRS) else 0,
            interleave=form.is_packed and interleaves_columns(options.sm, experts=bool(self.experts)),
            slices=tuple(slices),
            tensors=tensors,
            sides=sides,
            mask_from=options.mask_from if (self.module, self.kind) == (HEAD, "bias") else None,
            fills=self.parts == 1,
        )

    def _form(self) -> Form:
        if not self.quantised or self.options.plain:
            return Form.FLOAT
        if not self.options.precision.grouped:
            return Form.CHANNELS
        return Form.GROUPS if self.options.precision.quant_algo == "W4A16_GPTQ" else Form.PAIRS

    def _stages(self) -> Sequence[int]:
        """The pipeline ranks that have a share of the row."""
        parallel = self.parallel
        if self.layer is not None:
            return (parallel.pp_rank_of(self.layer, self.facts.num_layers),)
        return (0,) if self.module in FIRST_STAGE else (parallel.pp_size - 1,)

    def _name(self, pp_rank: int) -> str:
        """The tensor's name in the file of a pipeline rank, which numbers its own layers from 0."""
        if self.layer is None:
            return f"{self.module}.{self.kind}"
        first = self.parallel.layers(pp_rank, self.facts.num_layers).start
        return f"transformer.layers.{self.layer - first}.{self.module}.{self.kind}"

    def _tensor(self, rank: int, name: str, form: Form, rows: int, width: int, groups: int) -> RankTensor:
        lead, each = ((groups,), rows // groups) if groups else ((), rows)
        dtype = FLOAT_LABELS["float32" if self.module == ROUTER else self.options.dtype]
        shape: tuple[int, ...] = (*lead, each, width)
        if form is Form.CHANNELS:
            shape, dtype = (*lead, width, each * self.options.precision.bits // 8), "I8"
        elif form is Form.GROUPS:
            shape = (*lead, width, each // 4)
        elif form is Form.PAIRS:
            shape, dtype = (*lead, each // 2, width), "I8"
        elif len(self.spec.parts[0].shape) == 1:
            shape = (*lead, each)
        return RankTensor(rank=rank, planned=PlannedTensor(name=name, dtype=dtype, shape=shape), rows=rows, width=width)

    def _side_shapes(self, form: Form, rows: int, width: int, groups: int) -> list[tuple[str, tuple[int, ...], str]]:
        """Ending of the name, shape and dtype of each side tensor of a weight."""
        lead, each = ((groups,), rows // groups) if groups else ((), rows)
        dtype = FLOAT_LABELS[self.options.dtype]
        if form is Form.CHANNELS:
            return [("per_channel_scale", (*lead, each), dtype)]
        if form is Form.GROUPS:
            shape = (*lead, width // self.options.group_size, each)
            return [("weights_scaling_factor", shape, dtype), ("zero", shape, dtype)]
        if form is Form.PAIRS:
            shape = (*lead, each, width // self.options.group_size)
            return [("weights_scaling_factor", shape, dtype), ("prequant_scaling_factor", (width,), dtype)]
        return []

    def _is_added_on_every_rank(self) -> bool:
        """Whether the library adds this bias on every rank before it sums over the ranks (quantization/layers.py).

        With W4A16_GPTQ it does. With W4A16_AWQ it clears the bias on all ranks but one when it loads the checkpoint.
        For experts the MoE plugin adds the bias once.
        """
        is_output_bias = self.module in CUT_ALONG_INPUT and self.kind == "bias" and not self.experts
        return is_output_bias and self.options.precision.quant_algo == "W4A16_GPTQ"

    def _padded_vocab(self) -> int:
        return -(-self.facts.vocab_size // self.parallel.tp_size) * self.parallel.tp_size

    def _shares(self, rank: int, tp_rank: int) -> Iterator[Slice]:
        """The slices that a rank takes of the row's parts."""
        shape = self.spec.parts[0].shape
        width = shape[1] if len(shape) > 1 else 1
        if self.experts:
            yield from self._expert_shares(rank, tp_rank, width)
            return
        row = 0
        for first, last, columns in self._dense_shares(tp_rank, width):
            group, start = self._part_of(first)
            yield Slice(
                rank=rank, group=group, turn=0, first=first - start, last=last - start, columns=columns, row=row
            )
            row += last - first

    def _dense_shares(self, tp_rank: int, width: int) -> Iterator[tuple[int, int, tuple[int, int]]]:
        """First and last row (exclusive) and columns that a rank takes, counted in the whole table row."""
        tp, rows = self.parallel.tp_size, self.spec.shape[0]
        if self.module == ROUTER:
            for expert in self.options.experts:
                yield expert, expert + 1, (0, width)
        elif self.module == QKV:
            for first, last in self._heads(tp_rank):
                yield first, last, (0, width)
        elif self.module == HEAD:
            each = self._padded_vocab() // tp
            yield min(rows, tp_rank * each), min(rows, (tp_rank + 1) * each), (0, width)
        elif self.module in CUT_ALONG_OUTPUT:
            yield tp_rank * (rows // tp), (tp_rank + 1) * (rows // tp), (0, width)
        elif tp_rank and self._is_added_on_every_rank():
            yield 0, 0, (0, width)
        elif self.module in CUT_ALONG_INPUT and self.kind == "weight":
            yield 0, rows, (tp_rank * (width // tp), (tp_rank + 1) * (width // tp))
        else:
            yield 0, rows, (0, width)

    def _heads(self, tp_rank: int) -> Iterator[tuple[int, int]]:
        """Rows of q, of k and of v that a rank takes. If there are fewer key/value heads than ranks, several ranks take
        the same head."""
        facts, tp, size = self.facts, self.parallel.tp_size, self.facts.head_size
        queries, keys = facts.num_heads, facts.num_kv_heads
        yield tp_rank * (queries // tp) * size, (tp_rank + 1) * (queries // tp) * size
        each = max(1, keys // tp)
        first = tp_rank * each if keys >= tp else tp_rank * keys // tp
        for start in (queries, queries + keys):
            yield (start + first) * size, (start + first + each) * size

    def _expert_shares(self, rank: int, tp_rank: int, width: int) -> Iterator[Slice]:
        parallel, rows = self.parallel, self.spec.parts[0].shape[0]
        moe_tp_rank, moe_ep_rank = divmod(tp_rank, parallel.moe_ep)
        block = self.experts // parallel.moe_ep
        held = self.options.experts[moe_ep_rank * block : (moe_ep_rank + 1) * block]
        columns, first, last = (0, width), 0, rows
        if self.module in CUT_ALONG_OUTPUT:
            first, last = moe_tp_rank * (rows // parallel.moe_tp), (moe_tp_rank + 1) * (rows // parallel.moe_tp)
        elif self.kind == "weight":
            columns = moe_tp_rank * (width // parallel.moe_tp), (moe_tp_rank + 1) * (width // parallel.moe_tp)
        turns = (1, 0) if self.spec.join is Join.INTERLEAVE else (0,)  # up before gate
        row = 0
        for expert in held:
            for turn in turns:
                yield Slice(rank=rank, group=expert, turn=turn, first=first, last=last, columns=columns, row=row)
                row += last - first

    def _part_of(self, row: int) -> tuple[int, int]:
        """The index of the part that holds a row of the whole table row, and the first row of that part."""
        start = 0
        for group, part in enumerate(self.spec.parts):
            if row < start + part.shape[0] or group == len(self.spec.parts) - 1:
                return group, start
            start += part.shape[0]
        raise AssertionError(f"{self.spec.name} has no parts")
