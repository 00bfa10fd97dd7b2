"""The pass over a calibration text: each matrix is solved for the inputs that reach it, layer by layer.

    solver = Solver(model, wanted, experts)
    state = solver.begin(windows)
    for index in range(solver.num_layers):
        state, solved = solver.layer(index, state)     # the state that leaves the layer with its codes
    solved = solver.head(state)

The tokens of all windows go through a layer together, as in the reference. A matrix is solved before what it feeds is
computed: query, key and value for the layer's input, attention's output for the heads, an expert's first matrix for the
tokens that are routed to it, its second for what the first makes of them. So a later matrix sees the errors of all
earlier ones. The router stays as it is.

Memory beside the reference's own: 4*K*K bytes for one matrix's H, 3*4*2048*K for rows that are solved, and the codes of
the layer, a byte each. K is F for an expert's second matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from export.calibration.overlay import Overlay
from export.checkpoint.digests import RecordedCheckpoint, Run, recorded
from export.checkpoint.tensor_table import Weights
from export.families import Model
from export.families.network import Mlp, Network
from export.quantize.gptq import Codes, Factor, Hessian, asymmetric, solve, symmetric
from export.reference.attention import Projections
from export.reference.mixture import BLOCK_TOKENS, Expert, route
from export.reference.model import Windows, bounds_of, embedding_rows, normalise
from export.reference.operations import FloatArray
from export.reference.reader import Reader

# Tokens of an expert, as a part of its matrix's input features, below which it falls back. From here on GPTQ is better
# than a search on other text (docs/calibration.md).
FEWEST_TOKENS = 1 / 32
_ROWS = 2048  # rows of a matrix that are read and solved at a time


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """How a row of the table is to be solved. `experts` are those whose matrices are wanted, of a row that stacks
    them. The scales of the first `scaled_rows` rows are stored multiplied by `row_factor`, a power of two."""

    bits: int
    block_size: int
    symmetric: bool = True
    experts: tuple[int, ...] = (0,)
    scaled_rows: int = 0
    row_factor: float = 1.0


@dataclass(frozen=True, kw_only=True)
class SolvedRow:
    """The codes of a row of the table: of each wanted expert, or of the place 0. `tokens` and `fallen_back` are as
    export/quantize/solved.py describes them."""

    codes: Mapping[int, Codes]
    tokens: Mapping[int, int]
    fallen_back: tuple[int, ...]
    sources: Mapping[str, tuple[Run, ...]]


class _Row:
    """A row of the table while it is solved."""

    def __init__(self, model: Model, name: str, wanted: Wanted, count: Callable[[int], None]) -> None:
        self.name, self.wanted = name, wanted
        self.spec = model.weights.table[name]
        starts = model.weights.run_starts(name)
        self._checkpoint: RecordedCheckpoint = recorded(model.weights.checkpoint, count, starts)
        self._weights = Weights(checkpoint=self._checkpoint, table=model.weights.table)
        self.codes: dict[int, Codes] = {}
        self.tokens: dict[int, int] = {}
        self.fallen_back: list[int] = []

    def solve(self, place: int, factor: Factor | None, num_tokens: int) -> None:
        """Solve the matrix at `place`; without a factor it falls back."""
        wanted, parts = self.wanted, []
        grids, solved = symmetric if wanted.symmetric else asymmetric, 0
        for held in self._rows(place):
            scaled = min(max(0, wanted.scaled_rows - solved), len(held))
            solved += len(held)
            for rows, row_factor in ((held[:scaled], wanted.row_factor), (held[scaled:], 1.0)):
                if len(rows):
                    choose = grids(wanted.bits, row_factor)
                    parts.append(solve(self.label(place), rows, factor, wanted.block_size, wanted.bits, choose))
        self.codes[place] = Codes(
            codes=np.concatenate([part.codes for part in parts]),
            scales=np.concatenate([part.scales for part in parts]),
            zeros=np.concatenate([part.zeros for part in parts]),
        )
        self.tokens[place] = num_tokens
        self.fallen_back += [place] if factor is None else []

    def label(self, place: int) -> str:
        return f"{self.name}, expert {place}" if self.spec.stacks_experts else self.name

    def finish(self) -> SolvedRow:
        """Read the experts that are not wanted, since their bytes count in the digests, and give what was solved."""
        if self.spec.stacks_experts:
            for _ in self._weights.placed_chunks(self.name, sorted(set(range(self.spec.shape[0])) - set(self.codes))):
                pass
        return SolvedRow(
            codes=self.codes, tokens=self.tokens, fallen_back=tuple(self.fallen_back), sources=self._checkpoint.runs()
        )

    def _rows(self, place: int) -> Iterator[FloatArray]:
        """The rows of a matrix as an engine stores them, _ROWS or more at a time."""
        held: list[FloatArray] = []
        for chunk in self._weights.chunks(self.name, [place] if self.spec.stacks_experts else None):
            held.append(chunk)
            if sum(map(len, held)) >= _ROWS:
                yield np.concatenate(held)
                held = []
        if held:
            yield np.concatenate(held)


@dataclass(frozen=True, kw_only=True)
class Solver:
    """Solves the rows `wanted` of a model, by name. `fewest_tokens` is FEWEST_TOKENS. `count` is called with the
    number of bytes of each read."""

    model: Model
    wanted: Mapping[str, Wanted]
    fewest_tokens: float = FEWEST_TOKENS
    count: Callable[[int], None] = lambda _: None

    @property
    def num_layers(self) -> int:
        return len(self._network.layers)

    @property
    def _network(self) -> Network:
        return self.model.family.network(self.model.weights.checkpoint.config)

    def begin(self, windows: Windows) -> FloatArray:
        """The states [T, H] that enter the first layer. Raises CheckpointError for a token id that the embedding does
        not have."""
        rows = embedding_rows(self.model, [token for window in windows for token in window])
        return rows * np.float32(self._network.embedding_factor)

    def layer(self, index: int, state: FloatArray, windows: Windows) -> tuple[FloatArray, dict[str, SolvedRow]]:
        """The states [T, H] that leave a layer with its codes, and these. Raises QuantizationError for inputs that
        cannot be used, and CheckpointError for weights that cannot be read."""
        layer, own, done = self._network.layers[index], self.model.weights, {}
        codes: dict[str, Mapping[int, Codes]] = {}
        reader = Reader(Overlay(checkpoint=own.checkpoint, table=own.table, solved=codes))

        def keep(rows: Sequence[_Row]) -> None:
            for row in rows:
                done[row.name] = row.finish()

        inputs = normalise(state, layer.norm, own)
        keep(self._solve_alone(layer.attention.inputs, inputs, codes))
        projections = Projections(layer.attention, reader)
        heads = projections.heads(inputs, bounds_of(windows))
        keep(self._solve_alone([layer.attention.output], heads, codes))
        state = state + projections.output(heads) * np.float32(layer.factor)
        del projections, heads
        if layer.mlp_norm is not None:
            inputs = normalise(state, layer.mlp_norm, own)
        outputs, rows = self._mixture(layer.mlp, inputs, reader, codes)
        keep(rows)
        outputs *= np.float32(layer.factor)
        state += outputs
        return state, done

    def head(self, state: FloatArray) -> dict[str, SolvedRow]:
        """The codes of the head, if they are wanted."""
        rows = self._solve_alone([self._network.head], normalise(state, self._network.norm, self.model.weights), {})
        return {row.name: row.finish() for row in rows}

    def _open(self, modules: Sequence[str]) -> list[_Row]:
        names = [f"{module}.weight" for module in modules]
        return [_Row(self.model, name, self.wanted[name], self.count) for name in names if name in self.wanted]

    def _solve_alone(
        self, modules: Sequence[str], inputs: FloatArray, codes: dict[str, Mapping[int, Codes]]
    ) -> list[_Row]:
        """Solve the rows of modules that have the same inputs [T, K] and stack no experts."""
        rows = self._open(modules)
        if rows:
            hessian = Hessian(inputs.shape[1])
            for start in range(0, len(inputs), BLOCK_TOKENS):
                hessian.add(inputs[start : start + BLOCK_TOKENS])
            self._solve_all(rows, 0, hessian, codes)
        return rows

    def _solve_all(
        self, rows: Sequence[_Row], place: int, hessian: Hessian, codes: dict[str, Mapping[int, Codes]]
    ) -> None:
        few = hessian.num_tokens < self.fewest_tokens * hessian.features
        factor = None if few else hessian.factor(rows[0].label(place))
        for row in rows:
            row.solve(place, factor, hessian.num_tokens)
            codes[row.name] = row.codes

    def _mixture(
        self, mlp: Mlp, inputs: FloatArray, reader: Reader, codes: dict[str, Mapping[int, Codes]]
    ) -> tuple[FloatArray, list[_Row]]:
        """The outputs [T, H] of a layer's MLP or mixture for [T, H], and its rows, solved."""
        result = np.zeros_like(inputs)
        first = self._open([mlp.first, *([] if mlp.up is None else [mlp.up])])
        second = self._open([mlp.second])
        chosen, shares, num_experts = np.zeros((len(inputs), 1), dtype=np.int64), None, 1
        if mlp.gate is not None:
            logits = inputs @ self.model.weights.load(f"{mlp.gate}.weight").T
            chosen, shares = route(logits, mlp.router, self.model.architecture.experts_per_token)
            num_experts = logits.shape[1]
        for expert in range(num_experts):
            tokens, places = np.nonzero(chosen == expert)
            own = None if shares is None else shares[tokens, places, None]
            blocks = [slice(start, start + BLOCK_TOKENS) for start in range(0, len(tokens), BLOCK_TOKENS)]
            wanted = [row for row in first if expert in row.wanted.experts]
            if wanted:
                hessian = Hessian(inputs.shape[1])
                for block in blocks:
                    hessian.add(inputs[tokens[block]])
                self._solve_all(wanted, expert, hessian, codes)
                del hessian
            found = Expert(mlp, reader, expert) if len(tokens) else None
            wanted = [row for row in second if expert in row.wanted.experts]
            if wanted:
                hessian = Hessian(reader.weights.table[second[0].name].shape[-1])
                for block in blocks:
                    assert found is not None
                    hessian.add(found.inner(inputs[tokens[block]]))
                self._solve_all(wanted, expert, hessian, codes)
                del hessian
            for block in blocks:
                assert found is not None
                outputs = found.output(found.inner(inputs[tokens[block]]))
                result[tokens[block]] += outputs if own is None else outputs * own[block]
        return result, [*first, *second]
