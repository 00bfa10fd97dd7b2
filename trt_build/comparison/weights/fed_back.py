"""First question about codes of a method that feeds errors back: a code need not be the nearest to its weight.

What is left to compare with the checkpoint's weights w are sums over each matrix and row of stored values q: the factor
<q, w> / <q, q>, and |q - w| / |w|. Their limits are measured (`LIMITS`). They catch another matrix, zeros and factors,
and not a single code. That is what checksums are for: engine.json has one of the values that were solved, for every
matrix, and the values that are read back must have it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from export.quantize.solved import checksum_text, row_checksums

FloatArray = npt.NDArray[np.float32]

# In steps of 2^-bits. Measured over both trained examples, 2 to 8 bits, blocks of 32 to 128, 1,024 and 4,096 tokens:
# docs/quality.md, "Calibration".
MATRIX, ROW = 5.0, 12.0
FACTOR = 2.0  # of the squared relative error, and FACTOR_LEAST beside it
FACTOR_LEAST = 0.002
# Weights that lie on a grid of their own, as those that were quantised before, have errors of one sign: all that are
# alike are stored too large or too small by the same part. Measured in steps of 2^-bits: 1.1 for weights of two and of
# three values, 0.3 for weights of 3 and 4 bits in blocks of 32.
FACTOR_ON_GRID = 1.5


@dataclass
class FedBack:
    """Sums over one matrix of stored values q and the checkpoint's w."""

    squares: float = 0.0  # <q, q>
    products: float = 0.0  # <q, w>
    weights: float = 0.0  # <w, w>
    errors: float = 0.0
    row: float = 0.0  # the largest |q - w| / |w| of a row
    checksum: int = 0
    rows: list[tuple[int, float]] = field(default_factory=list)  # rows past the limit

    def add_rows(self, found: FloatArray, wanted: FloatArray, first: int, bits: int, halved: float) -> None:
        """Add rows [n, K], which are the matrix's from `first` on. `halved` is what a value may be off besides where
        its scale is too small for float16."""
        error = found - wanted
        weights, errors = (np.einsum("ij,ij->i", one, one).astype(np.float64) for one in (wanted, error))
        self.squares += float(np.einsum("ij,ij->", found, found))
        self.products += float(np.einsum("ij,ij->", found, wanted))
        self.weights += float(weights.sum())
        self.errors += float(errors.sum())
        nothing = np.where(errors > 0, np.inf, 0.0)
        relative = np.sqrt(np.divide(errors, weights, out=nothing, where=weights > 0))
        self.row = float(np.maximum(self.row, relative.max()))
        allowed = row_limit(bits) * np.sqrt(weights) + halved * math.sqrt(found.shape[1])
        wrong = np.flatnonzero(~(np.sqrt(errors) <= allowed))
        self.rows += [(first + row, float(relative[row])) for row in wrong.tolist()]
        self.checksum += row_checksums(found, first)

    def add(self, other: FedBack) -> None:
        for name in ("squares", "products", "weights", "errors", "checksum"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.row = float(np.maximum(self.row, other.row))
        self.rows += other.rows

    @property
    def error(self) -> float:
        """|q - w| / |w| of the matrix."""
        return math.sqrt(self.errors / self.weights) if self.weights else 0.0

    def problems(self, bits: int, checksum: str | None, slack: float) -> Iterator[str]:
        """What is wrong with the matrix, to be read after its name. `checksum` is engine.json's, None if it has none;
        `slack` is what |q - w| may be besides where scales are too small for float16."""
        small = slack / math.sqrt(self.weights) if self.weights else 0.0
        if self.rows:
            most = max(error for _, error in self.rows)
            yield f", {len(self.rows)} rows: found relative error {most:.3g}, allowed {row_limit(bits):.3g}"
        if not self.error <= matrix_limit(bits) + small:
            yield f": found relative error {self.error:.3g}, allowed {matrix_limit(bits):.3g}"
        factor = self.products / self.squares if self.squares else 0.0
        allowed = FACTOR_LEAST + max(FACTOR * self.error**2, FACTOR_ON_GRID / 2**bits) + small
        if not abs(factor - 1) <= allowed:
            times = f"{1 / factor:.4f}" if factor else "0"
            yield f": found it {times} times the checkpoint's, expected 1 within {allowed:.3g}"
        if checksum is not None and checksum_text(self.checksum) != checksum:
            yield (
                f": found codes or scales that are not those that were solved (checksum "
                f"{checksum_text(self.checksum)}, expected {checksum})"
            )


def matrix_limit(bits: int) -> float:
    """The largest |q - w| / |w| of a matrix of so many bits."""
    return MATRIX / 2**bits


def row_limit(bits: int) -> float:
    """The largest |q - w| / |w| of a row of a matrix of so many bits."""
    return ROW / 2**bits
