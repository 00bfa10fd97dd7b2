"""GPTQ: codes of a matrix that disturb its products with given inputs least, each error fed back into what follows.

With inputs X [T, K] and H = X^T X, the error of storing Q for W [n, K] is tr(E H E^T), E = W - Q. Let H = U D U^T with
U unit upper triangular and D diagonal. The error is then the sum over k of D_k |e_k + sum_{j<k} e_j U_jk|^2. So column
k is rounded to the grid from w_k + sum_{j<k} e_j U_jk, one after the other. That is GPTQ (Frantar et al., 2022) in the
form that needs no inverse of H, whose equality Chee et al., QuIP, 2023, prove as "LDLQ". All rows are independent.

The products need not be those of W with X. Where the codes of earlier matrices have changed the inputs, X W^T lacks
something of the outputs Y that are wanted, the shortfall L = Y - X W^T [T, n]. The weights that make the best of X are
W + L^T X H^-1, and with the factors of H the error is that of column k from w_k + A_k + sum_{j<k} e_j U_jk, where
A = L^T X U^-T D^-1: a number is added to each weight, and H^-1 is not needed either. That such weights are better to
quantise than W is the finding of GPTAQ (Li et al., 2025), which takes Y from inputs without errors.

The scale of a block of columns is chosen when the block begins, for the weights as GPTQ has them there: those that are
best for all columns from there on, given the errors before. They are W + S U_bb^-1, where S is A_b and the sum of e_j
U_j over the columns before.

Memory for a matrix [n, K]: 4 * K * K bytes for H, which is factorised in place, 4 * n * K for A, 4 * 2048 * K for the
errors of as many rows, and n * K for the codes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from export.checkpoint.safetensors_header import numpy_dtype
from export.errors import QuantizationError
from export.provider import FLOAT16_MAX
from export.quantize.grid import ByteArray, FloatArray

# What is added to H's diagonal, as a part of its mean: features over tokens, as few tokens say little of how features
# depend on each other, and at least 1 %, as Frantar et al. add. docs/calibration.md has the measurement.
LEAST_DAMPING = 0.01
_MOST_DAMPING = 1e6
_PANEL = 256  # columns that are factorised together
_ROWS = 2048  # output rows that are solved together, so that a block's errors stay in a core's cache
# Parts of the scale that fits a block's largest value, tried in turn at up to 4 bits. With more bits a value that is
# clipped costs more than a finer scale gains, whatever the estimate when the block begins.
STRETCHES: tuple[float, ...] = (1.0, 1.05, *(round(0.96 - 0.04 * step, 2) for step in range(15)))
_MOST_BITS_TRIED = 4

Grid = tuple[FloatArray, FloatArray]  # scales and zero points, float32 [n]
ChooseGrid = Callable[[FloatArray, FloatArray], Grid]  # of the current weights [B, n] and the columns' weights [B]


@dataclass(frozen=True, kw_only=True)
class Codes:
    """Codes uint8 [n, K], and for each block of columns scales float32 [n, blocks], which float16 holds exactly, and
    zero points uint8 [n, blocks]: value = (code - zero point) * scale."""

    codes: ByteArray
    scales: FloatArray
    zeros: ByteArray

    def part(self, first: int, last: int) -> Codes:
        """Some of the rows."""
        own = slice(first, last)
        return Codes(codes=self.codes[own], scales=self.scales[own], zeros=self.zeros[own])

    def values(self) -> FloatArray:
        """The dequantised matrix, float32 [n, K]."""
        blocks = self.codes.reshape(*self.scales.shape, -1).astype(np.float32)
        blocks -= self.zeros[..., None].astype(np.float32)
        blocks *= self.scales[..., None]
        return blocks.reshape(self.codes.shape)


class Hessian:
    """H = X^T X of the inputs of a matrix, float32 [K, K], summed up as they come."""

    def __init__(self, features: int) -> None:
        self.num_tokens, self.features = 0, features
        self._sums = np.zeros((features, features), dtype=np.float32)

    def add(self, inputs: FloatArray) -> None:
        """Add inputs [T, K]. Only the upper part is summed, in strips."""
        self.num_tokens += len(inputs)
        for start in range(0, self.features, _PANEL):
            stop = min(start + _PANEL, self.features)
            self._sums[:stop, start:stop] += inputs[:, :stop].T @ inputs[:, start:stop]

    def factor(self, name: str, damping: float | None = None) -> Factor:
        """Factorise H in place; this object is used up. `damping` None is that of LEAST_DAMPING's comment.

        Columns without any input are rounded to the nearest, since no error of theirs is fed back. Raises
        QuantizationError, which names the matrix `name`, if a value is not finite, and if there was no input but
        zeros."""
        sums = self._sums
        diagonal = sums.diagonal().astype(np.float64)
        mean = float(diagonal.mean())
        if damping is None:
            damping = max(LEAST_DAMPING, self.features / max(1, self.num_tokens))
        panels = [slice(start, start + _PANEL) for start in range(0, len(sums), _PANEL)]
        if not all(np.isfinite(sums[: panel.stop, panel].sum()) for panel in panels):
            raise QuantizationError(
                f"quantising {name} by GPTQ: its inputs over the calibration text, or their squares, are beyond "
                "float32; the checkpoint is damaged, or its activations grow without bound: build with --method search"
            )
        if mean == 0:
            raise QuantizationError(
                f"quantising {name} by GPTQ: its inputs over the calibration text are all zero; build with --method "
                "search"
            )
        squares = [sums[panel, panel].copy() for panel in panels]
        for panel in panels:  # beside the squares the lower part keeps H for another attempt
            sums[panel, : panel.start] = sums[: panel.start, panel].T
        while True:
            np.fill_diagonal(sums, diagonal + damping * mean)
            try:
                return _factorised(sums)
            except np.linalg.LinAlgError:
                damping *= 10
                if not damping < _MOST_DAMPING:
                    raise QuantizationError(
                        f"quantising {name} by GPTQ: the products of its inputs are not positive definite, whatever is "
                        "added to them; build with --method search"
                    ) from None
            for panel, square in zip(panels, squares, strict=True):
                sums[: panel.start, panel] = sums[panel, : panel.start].T
                sums[panel, panel] = square


@dataclass(frozen=True, kw_only=True)
class Factor:
    """H = U D U^T: above the diagonal of `unit` [K, K] is U, whose diagonal is ones; `pivots` [K] are D. What lies
    below the diagonal of `unit` means nothing."""

    unit: FloatArray
    pivots: FloatArray

    def shares(self, lacking: FloatArray) -> FloatArray:
        """A = L^T X U^-T D^-1 of this module's first lines, [n, K], in the place of `lacking`, which is L^T X."""
        features = len(self.unit)
        for start in reversed(range(0, features, _PANEL)):
            stop = min(start + _PANEL, features)
            own = lacking[:, start:stop]
            own -= lacking[:, stop:] @ self.unit[start:stop, stop:].T
            square = np.triu(self.unit[start:stop, start:stop], 1) + np.eye(stop - start, dtype=np.float32)
            own[...] = own @ np.linalg.inv(square).T
        lacking /= self.pivots
        return lacking


def _factorised(sums: FloatArray) -> Factor:
    """Factorise the upper part of `sums` in place, panel by panel from the last on, into V V^T with V upper triangular;
    then U is V with its columns divided by its diagonal. A panel's square is factorised in float64."""
    features = len(sums)
    for start in reversed(range(0, features, _PANEL)):
        stop = min(start + _PANEL, features)
        upper = np.triu(sums[start:stop, start:stop]).astype(np.float64)
        square = upper + np.triu(upper, 1).T
        own = np.linalg.cholesky(square[::-1, ::-1])[::-1, ::-1]
        panel = sums[:start, start:stop] @ np.linalg.inv(own).T.astype(np.float32)
        sums[:start, start:stop] = panel
        places = np.triu_indices(stop - start)
        sums[start:stop, start:stop][places] = own[places]
        for first in range(0, start, _PANEL):
            last = min(first + _PANEL, start)
            sums[:last, first:last] -= panel[:last] @ panel[first:last].T
    diagonal = sums.diagonal().copy()
    if not np.isfinite(diagonal).all() or not (diagonal > 0).all():
        raise np.linalg.LinAlgError
    for start in range(0, features, _PANEL):
        stop = min(start + _PANEL, features)
        sums[:stop, start:stop] /= diagonal[start:stop]
    return Factor(unit=sums, pivots=diagonal * diagonal)


def solve(
    name: str,
    weights: FloatArray,
    factor: Factor | None,
    block_size: int,
    bits: int,
    choose: ChooseGrid,
    shares: FloatArray | None = None,
) -> Codes:
    """The codes of weights [n, K] by GPTQ, with a grid of `choose` for every `block_size` columns of a row. `shares`
    [n, K] is what `Factor.shares` gives of the shortfall of the products. Without a factor all inputs count the same
    and nothing is fed back: each weight gets the nearest code. Raises QuantizationError, which names the matrix `name`,
    for scales that float16 does not hold."""
    rows, features = weights.shape
    found = Codes(
        codes=np.empty((rows, features), dtype=np.uint8),
        scales=np.empty((rows, features // block_size), dtype=np.float32),
        zeros=np.empty((rows, features // block_size), dtype=np.uint8),
    )
    for start in range(0, rows, _ROWS):
        own, part = slice(start, start + _ROWS), found.part(start, start + _ROWS)
        try:
            _solve_rows(weights[own], factor, block_size, bits, choose, part, None if shares is None else shares[own])
        except OverflowError as error:
            raise QuantizationError(
                f"quantising {name} by GPTQ: a scale is beyond float16's {FLOAT16_MAX:.0f}; build with --method search "
                "and --kernels onnxruntime, whose scales are float32"
            ) from error
    return found


def _solve_rows(
    weights: FloatArray,
    factor: Factor | None,
    block_size: int,
    bits: int,
    choose: ChooseGrid,
    found: Codes,
    shares: FloatArray | None,
) -> None:
    """Solve rows [n, K] into `found`. Raises OverflowError for a scale beyond float16. The rows are held transposed, so
    that a column lies in one piece. Column by column the errors take the place of the weights."""
    features, most = weights.shape[1], np.float32((1 << bits) - 1)
    errors = np.array(weights.T, order="C")
    codes = np.empty((block_size, len(weights)), dtype=np.float32)
    for start in range(0, features, block_size):
        stop = start + block_size
        current, pivots = errors[start:stop], np.ones(block_size, dtype=np.float32)
        fed, square = np.zeros_like(current), np.zeros((block_size, block_size), dtype=np.float32)
        if factor is not None:
            fed, pivots = factor.unit[:start, start:stop].T @ errors[:start], factor.pivots[start:stop]  # fed [B, n]
            if shares is not None:
                fed += shares[:, start:stop].T
            square = np.triu(factor.unit[start:stop, start:stop], 1)
            current = np.linalg.inv(square + np.eye(block_size, dtype=np.float32)).T @ fed + current
        scales, zeros = choose(current, pivots)
        inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)
        for column in range(block_size):
            own = errors[start + column]
            wanted = square[:column, column] @ errors[start : start + column]
            wanted += fed[column]
            wanted += own
            wanted *= inverse
            wanted += zeros
            np.rint(wanted, out=wanted)
            np.clip(wanted, np.float32(0), most, out=wanted)
            codes[column] = wanted
            wanted -= zeros
            wanted *= scales
            own -= wanted
        found.codes[:, start:stop] = codes.T
        found.scales[:, start // block_size] = scales
        found.zeros[:, start // block_size] = zeros


def symmetric(bits: int, factor: float = 1.0, scale_type: str = "float16") -> ChooseGrid:
    """Grids whose zero point is 2^(bits-1): of the scales that float16 has nearest to STRETCHES times the one that
    maps the largest value onto -2^(bits-1), the one with the least squared error, weighted by column. float16 also has
    the scales times `factor`, a power of two of at most 1, which an engine may store in their place. With the
    `scale_type` bfloat16, which an engine may store too, they are the nearest that both types have."""
    half, stretches = np.float32(1 << (bits - 1)), _stretches(bits)

    def choose(current: FloatArray, pivots: FloatArray) -> Grid:
        low, high = current.min(axis=0), current.max(axis=0)
        unit = np.where(-low >= high, low, high) / -half + np.float32(0)
        zeros = np.full_like(unit, half)
        tried = [(_as_stored(unit * np.float32(part), factor, scale_type), zeros) for part in stretches]
        return _best(current, pivots, bits, tried)

    return choose


def asymmetric(bits: int, factor: float = 1.0, scale_type: str = "float16") -> ChooseGrid:
    """Grids with a zero point of their own: of those that span STRETCHES of the values and zero the one with the least
    squared error, weighted by column. `factor` and `scale_type` are as in `symmetric`."""
    most, stretches = np.float32((1 << bits) - 1), _stretches(bits)

    def choose(current: FloatArray, pivots: FloatArray) -> Grid:
        low, high = np.minimum(current.min(axis=0), 0), np.maximum(current.max(axis=0), 0)
        tried = []
        for part in stretches:
            scales = _as_stored((high - low) / most * np.float32(part), factor, scale_type)
            zeros = np.divide(-low * np.float32(part), scales, out=np.zeros_like(scales), where=scales != 0)
            tried.append((scales, np.clip(np.rint(zeros), 0, most)))
        return _best(current, pivots, bits, tried)

    return choose


def _stretches(bits: int) -> Sequence[float]:
    return STRETCHES if bits <= _MOST_BITS_TRIED else STRETCHES[:1]


def _as_stored(scales: FloatArray, factor: float, scale_type: str) -> FloatArray:
    """Rounded so that float16 has them times `factor`, a power of two of at most 1. It then has them too: such a factor
    only takes digits away. With the `scale_type` bfloat16 that type has them as well: they are rounded to its 8 digits,
    which float16 has from 2^-17 on; below, float16 has fewer digits than bfloat16. Raises OverflowError beyond
    float16's range."""
    if scale_type == "bfloat16":
        scales = scales.astype(numpy_dtype("BF16")).astype(np.float32)
    if not np.abs(scales).max(initial=0) <= FLOAT16_MAX:
        raise OverflowError
    return (scales * np.float32(factor)).astype(np.float16).astype(np.float32) / np.float32(factor)


def _best(current: FloatArray, pivots: FloatArray, bits: int, tried: Sequence[Grid]) -> Grid:
    """Of several grids [n] the one with the least sum over the columns of `pivots` times the squared error of current
    [B, n]."""
    most = np.float32((1 << bits) - 1)
    best_scales, best_zeros = (array.copy() for array in tried[0])
    least, rounded = None, np.empty_like(current)
    for scales, zeros in tried:
        inverse = np.divide(np.float32(1), scales, out=np.zeros_like(scales), where=scales != 0)
        np.multiply(current, inverse, out=rounded)
        rounded += zeros
        np.rint(rounded, out=rounded)
        np.clip(rounded, np.float32(0), most, out=rounded)
        rounded -= zeros
        rounded *= scales
        rounded -= current
        np.square(rounded, out=rounded)
        error = pivots @ rounded
        if least is None:
            least = error
            continue
        better = error < least
        np.copyto(least, error, where=better)
        np.copyto(best_scales, scales, where=better)
        np.copyto(best_zeros, zeros, where=better)
    return best_scales, best_zeros


def objective(weights: FloatArray, values: FloatArray, inputs: FloatArray) -> float:
    """tr(E H E^T) of storing `values` for weights [n, K] over inputs [T, K]: the squared error of the products."""
    return float(np.square((inputs @ (weights - values).T).astype(np.float64)).sum())
