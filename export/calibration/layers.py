"""The pass over a calibration text: each matrix is solved for the inputs that reach it, layer by layer.

    solver = Solver(model, wanted, experts)
    states = solver.begin(windows)
    for index in range(solver.num_layers):
        states, solved = solver.layer(index, states)   # those that leave the layer with its codes, and without
    solved = solver.head(states)

The tokens of all windows go through a layer together, as in the reference. A matrix is solved before what it feeds is
computed: query, key and value for the layer's input, attention's output for the heads, an expert's first matrix for the
tokens that are routed to it, its second for what the first makes of them. So a later matrix sees the errors of all
earlier ones. The router stays as it is.

A later matrix also mends some of them. Beside the states with codes go those of the checkpoint itself, and the outputs
that are wanted of a matrix are those of the checkpoint's inputs. The matrices whose outputs are added to the states
(attention's output, an expert's second) are asked for REPAIR of what the states lack before, too. Where a norm lies
between these matrices and the states, the matrices are asked for the checkpoint's outputs alone.

Memory beside the reference's own: 4*K*K bytes for one matrix's H, 4*4*2048*K for rows that are solved, the inputs of a
matrix twice, 2*4*T*K for its T tokens, and the codes of the layer, a byte each. K is F for an expert's second matrix.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from export.calibration.overlay import Overlay
from export.checkpoint.digests import RecordedCheckpoint, Run, recorded
from export.checkpoint.tensor_table import Weights
from export.families import Model
from export.families.shared.network import Mlp, Network, Norm
from export.quantize.gptq import Codes, Factor, Hessian, asymmetric, solve, symmetric
from export.reference.attention import Projections
from export.reference.mixture import BLOCK_TOKENS, Expert, route, router_logits, run_mlp, share_of_shared
from export.reference.model import Windows, bounds_of, embedding_rows
from export.reference.operations import FloatArray, normalise
from export.reference.reader import Reader

# Tokens of an expert, as a part of its matrix's input features, below which it falls back. From here on GPTQ is better
# than a search on other text (docs/calibration.md).
FEWEST_TOKENS = 1 / 32
# The part of what the states lack that is asked of the matrices which add to them. Mean KL of the small phixtral's
# int4 over 6,144 tokens of verify's text, and of the GPL: 0.0097 and 0.0088 without, 0.0096 and 0.0087 with a half,
# 0.0094 and 0.0089 with all.
REPAIR = 0.5
# Rows that would have to mend errors which are much larger than their own bits make would be far from the checkpoint's:
# those of a head of 6 bits behind experts of 2, or rows of very small weights. PARTS of what is asked of them are tried
# in turn, until the stored values of all rows together are at most MOST_MOVED * 2^-bits away, relative to their size,
# and those of each row at most MOST_OF_A_ROW. Of rows that mend nothing these are 2.3 and 4.2.
PARTS = (1.0, 0.5, 0.25, 0.0)
MOST_MOVED, MOST_OF_A_ROW = 4.0, 9.0
_ROWS = 2048  # rows of a matrix that are read and solved at a time


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """How a row of the table is to be solved. `experts` are those whose matrices are wanted, of a row that stacks
    them. The scales of the first `scaled_rows` rows are stored multiplied by `row_factor`, a power of two.
    `scale_type`, float16 or bfloat16, is how the engine stores scales."""

    bits: int
    block_size: int
    symmetric: bool = True
    experts: tuple[int, ...] = (0,)
    scaled_rows: int = 0
    row_factor: float = 1.0
    scale_type: str = "float16"


@dataclass(frozen=True, kw_only=True)
class SolvedRow:
    """The codes of a row of the table: of each wanted expert, or of the place 0. `tokens` and `fallen_back` are as
    export/quantize/solved.py describes them."""

    codes: Mapping[int, Codes]
    tokens: Mapping[int, int]
    fallen_back: tuple[int, ...]
    sources: Mapping[str, tuple[Run, ...]]


@dataclass(frozen=True, kw_only=True)
class _Reached:
    """What reaches a matrix: its inputs [T, K] with codes before it, and the checkpoint's own, `exact`. `missing`
    [T, n] is what its outputs are to add beside."""

    inputs: FloatArray
    exact: FloatArray
    missing: FloatArray | None = None

    def blocks(self) -> Iterator[slice]:
        for start in range(0, len(self.inputs), BLOCK_TOKENS):
            yield slice(start, start + BLOCK_TOKENS)

    def hessian(self) -> Hessian:
        hessian = Hessian(self.inputs.shape[1])
        for block in self.blocks():
            hessian.add(self.inputs[block])
        return hessian

    def lacking(self, weights: FloatArray, first: int) -> FloatArray:
        """L^T X (export/quantize/gptq.py), [n, K], of weights [n, K] that are the rows from `first` on."""
        found = np.zeros_like(weights)
        for block in self.blocks():
            short = (self.exact[block] - self.inputs[block]) @ weights.T
            if self.missing is not None:
                short += self.missing[block, first : first + len(weights)]
            found += short.T @ self.inputs[block]
        return found


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

    def solve(self, place: int, factor: Factor | None, reached: _Reached) -> None:
        """Solve the matrix at `place` for what reaches it; without a factor it falls back."""
        parts, before = list[Codes](), 0
        for held in self._rows(place):
            shares = None if factor is None else factor.shares(reached.lacking(held, before))
            parts.append(self._solve_rows(place, held, before, factor, shares))
            before += len(held)
        self.codes[place] = Codes(
            codes=np.concatenate([part.codes for part in parts]),
            scales=np.concatenate([part.scales for part in parts]),
            zeros=np.concatenate([part.zeros for part in parts]),
        )
        self.tokens[place] = len(reached.inputs)
        self.fallen_back += [place] if factor is None else []

    def _solve_rows(
        self, place: int, held: FloatArray, before: int, factor: Factor | None, shares: FloatArray | None
    ) -> Codes:
        """The codes of the rows `held`, which follow `before` others."""
        wanted, count = self.wanted, len(held)
        found = Codes(
            codes=np.empty(held.shape, dtype=np.uint8),
            scales=np.empty((count, held.shape[1] // wanted.block_size), dtype=np.float32),
            zeros=np.empty((count, held.shape[1] // wanted.block_size), dtype=np.uint8),
        )
        grids, scaled = symmetric if wanted.symmetric else asymmetric, np.arange(count) < wanted.scaled_rows - before
        step, sizes, errors = 2.0**-wanted.bits, np.linalg.norm(held, axis=1), np.zeros(count, dtype=np.float32)
        left = np.arange(count)
        for part in PARTS if shares is not None else PARTS[-1:]:
            for own, row_factor in ((left[scaled[left]], wanted.row_factor), (left[~scaled[left]], 1.0)):
                if len(own):
                    asked = None if shares is None or not part else shares[own] * np.float32(part)
                    some = solve(
                        self.label(place), held[own], factor, wanted.block_size, wanted.bits,
                        grids(wanted.bits, row_factor, wanted.scale_type), asked,
                    )  # fmt: skip
                    found.codes[own], found.scales[own], found.zeros[own] = some.codes, some.scales, some.zeros
                    errors[own] = np.linalg.norm(held[own] - some.values(), axis=1)
            all_rows = np.linalg.norm(errors) > MOST_MOVED * step * np.linalg.norm(sizes)
            left = np.flatnonzero((errors > MOST_OF_A_ROW * step * sizes) | all_rows)
            if not len(left):
                break
        return found

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
        """The states [2, T, H] that enter the first layer: those with codes, and the checkpoint's own, which are the
        same here. Raises CheckpointError for a token id that the embedding does not have."""
        rows = embedding_rows(self.model, [token for window in windows for token in window])
        rows *= np.float32(self._network.embedding_factor)
        return np.stack([rows, rows])

    def layer(self, index: int, states: FloatArray, windows: Windows) -> tuple[FloatArray, dict[str, SolvedRow]]:
        """The states [2, T, H] that leave a layer with its codes and without, and these. Raises QuantizationError for
        inputs that cannot be used, and CheckpointError for weights that cannot be read."""
        layer, own, done = self._network.layers[index], self.model.weights, {}
        codes: dict[str, Mapping[int, Codes]] = {}
        reader = Reader(Overlay(checkpoint=own.checkpoint, table=own.table, solved=codes))
        exact_reader, factor, states = Reader(own), np.float32(layer.factor), states.copy()

        def keep(rows: Sequence[_Row]) -> None:
            for row in rows:
                done[row.name] = row.finish()

        def missing(output_norm: Norm | None) -> FloatArray | None:
            return None if output_norm else (states[1] - states[0]) * (np.float32(REPAIR) / factor)

        inputs, exact = (normalise(state, layer.norm, own) for state in states)
        keep(self._solve_alone(layer.attention.inputs, _Reached(inputs=inputs, exact=exact), codes))
        projections, exact_ones = Projections(layer.attention, reader), Projections(layer.attention, exact_reader)
        heads, exact_heads = projections.heads(inputs, bounds_of(windows)), exact_ones.heads(exact, bounds_of(windows))
        after = layer.attention_output_norm
        reached = _Reached(inputs=heads, exact=exact_heads, missing=missing(after))
        keep(self._solve_alone([layer.attention.output], reached, codes))
        states[0] += normalise(projections.output(heads), after, own) * factor
        states[1] += normalise(exact_ones.output(exact_heads), after, own) * factor
        del projections, exact_ones, heads, exact_heads, reached
        if not layer.parallel:
            inputs, exact = (normalise(state, layer.mlp_norm, own) for state in states)
        reached = _Reached(inputs=inputs, exact=exact, missing=missing(layer.mlp_output_norm))
        outputs, rows = self._mixture(layer.mlp, reached, reader, exact_reader, codes)
        keep(rows)
        states[0] += normalise(outputs, layer.mlp_output_norm, own) * factor
        outputs, _ = run_mlp(exact, layer.mlp, exact_reader, self.model.architecture.experts_per_token)
        states[1] += normalise(outputs, layer.mlp_output_norm, own) * factor
        return states, done

    def head(self, states: FloatArray) -> dict[str, SolvedRow]:
        """The codes of the head, if they are wanted."""
        inputs, exact = (normalise(state, self._network.norm, self.model.weights) for state in states)
        rows = self._solve_alone([self._network.head], _Reached(inputs=inputs, exact=exact), {})
        return {row.name: row.finish() for row in rows}

    def _open(self, modules: Sequence[str]) -> list[_Row]:
        names = [f"{module}.weight" for module in modules]
        return [_Row(self.model, name, self.wanted[name], self.count) for name in names if name in self.wanted]

    def _solve_alone(
        self, modules: Sequence[str], reached: _Reached, codes: dict[str, Mapping[int, Codes]]
    ) -> list[_Row]:
        """Solve the rows of modules that the same reaches and that stack no experts."""
        rows = self._open(modules)
        self._solve_all(rows, 0, reached, codes)
        return rows

    def _solve_all(
        self, rows: Sequence[_Row], place: int, reached: _Reached, codes: dict[str, Mapping[int, Codes]]
    ) -> None:
        if not rows:
            return
        few = len(reached.inputs) < self.fewest_tokens * reached.inputs.shape[1]
        says_nothing = few or not reached.inputs.any()
        factor = None if says_nothing else reached.hessian().factor(rows[0].label(place))
        for row in rows:
            row.solve(place, factor, reached)
            codes[row.name] = row.codes

    def _mixture(
        self, mlp: Mlp, reached: _Reached, reader: Reader, exact_reader: Reader, codes: dict[str, Mapping[int, Codes]]
    ) -> tuple[FloatArray, list[_Row]]:
        """The outputs [T, H] of a layer's MLP or mixture with codes for what reaches it, and its rows, solved."""
        inputs, missing = reached.inputs, reached.missing
        result = np.zeros_like(inputs)
        first = self._open([mlp.first, *([] if mlp.up is None else [mlp.up])])
        second = self._open([mlp.second])
        chosen, shares, num_experts = np.zeros((len(inputs), 1), dtype=np.int64), None, 1
        if mlp.gate is not None:
            logits = router_logits(inputs, mlp.gate, self.model.weights)
            chosen, shares = route(logits, mlp.router, self.model.architecture.experts_per_token)
            num_experts = logits.shape[1]
        for expert in range(num_experts):
            tokens, places = np.nonzero(chosen == expert)
            own = _Reached(inputs=inputs[tokens], exact=reached.exact[tokens])
            self._solve_all([row for row in first if expert in row.wanted.experts], expert, own, codes)
            wanted = [row for row in second if expert in row.wanted.experts]
            if not len(tokens) and not wanted:
                continue
            found = Expert(mlp, reader, expert)
            inner, exact = self._inner(found, own.inputs), np.empty(0, dtype=np.float32)
            if wanted:
                exact = self._inner(Expert(mlp, exact_reader, expert), own.exact)
                lacking = None if missing is None else missing[tokens]
                self._solve_all(wanted, expert, _Reached(inputs=inner, exact=exact, missing=lacking), codes)
            outputs = found.output(inner)
            result[tokens] += outputs if shares is None else outputs * shares[tokens, places, None]
        rows = [*first, *second]
        if mlp.shared is not None:  # the experts mend what the states lack
            alone = _Reached(inputs=inputs, exact=reached.exact)
            outputs, more = self._mixture(mlp.shared, alone, reader, exact_reader, codes)
            result += outputs * share_of_shared(inputs, mlp, self.model.weights)
            rows += more
        return result, rows

    @staticmethod
    def _inner(expert: Expert, inputs: FloatArray) -> FloatArray:
        """What enters an expert's second matrix, [T, F], for inputs [T, H]."""
        blocks = range(0, max(1, len(inputs)), BLOCK_TOKENS)
        return np.concatenate([expert.inner(inputs[start : start + BLOCK_TOKENS]).copy() for start in blocks])
