"""What tokens of drafts cost: learnt from how long steps took.

    costs = Costs()
    costs.learn(rows=1, drafted=8, seconds=0.17)
    costs.of(rows=1)            # {0: 1.0, 1: 1.26, 2: 1.39}: tokens of drafts -> time of the step

Times are in units of a step without drafts and with as many sequences, since that changes with the length of the
sequences and with what else the machine does. A token more costs its computation, and on a mixture the weights of the
experts that no other token of the step reads. How much that is depends on the machine, the model and the text, so
little is assumed: a number of tokens of which nothing is known, or nothing recent, is taken to cost half as much for
each further token as the sizes below it did, the first one nothing, and is measured when it would pay at that. An
estimate too low is corrected by its first use, where one too high would never be.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection

# Tokens of drafts in a step. Few different numbers are measured sooner than many.
SIZES = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32)
_WINDOW = 5  # measurements that count, but for the lowest and the highest: something may hold up a step
_ENOUGH = 2  # measurements that are relied on
_DOUBT = 1.05  # what a guess counts for more than a measurement, so that little hope is not worth a try
_OLD = 128  # steps after which a measurement is repeated, if it would pay; twice as many each time that it stands
_OLDEST = 1024  # such steps at most
_STANDS = 0.4  # part of a cost below which a later measurement is another one
_LEAST_S = 1e-9  # that a step takes, whatever a clock says
_TOO_OLD = 128  # steps with drafts after which one without is measured


class _Measured:
    """The last measurements of one number of tokens."""

    def __init__(self) -> None:
        self.values: deque[float] = deque(maxlen=_WINDOW)
        self.mean = 0.0  # of those in the middle
        self.step = 0  # of the last one
        self._lasts = _OLD  # steps that the values are taken for
        self._before: float | None = None  # the mean of the values that they are to replace

    def is_old(self, step: int) -> bool:
        return step - self.step > self._lasts

    def is_known(self, step: int) -> bool:
        return len(self.values) >= _ENOUGH and not self.is_old(step)

    def add(self, value: float, step: int) -> None:
        if self.is_old(step):
            self._before = self.mean if len(self.values) >= _ENOUGH else None
            self.values.clear()  # a bad moment is forgotten at once
        self.values.append(value)
        self.mean = _middle(self.values)
        self.step = step
        if self._before is not None and len(self.values) == _ENOUGH:
            self._lasts = min(2 * self._lasts, _OLDEST) if self.mean >= _STANDS * self._before else _OLD
            self._before = None


def _middle(values: Collection[float]) -> float:
    """The mean of values without the lowest and the highest; of one or two the lowest, since the first step of a kind
    takes longer."""
    if len(values) < 3:
        return min(values)
    return (sum(values) - min(values) - max(values)) / (len(values) - 2)


class _Curve:
    """The steps with one number of sequences."""

    def __init__(self) -> None:
        self.num_steps = 0
        self.plain = _Measured()  # seconds
        self.drafted = {size: _Measured() for size in SIZES}  # in units of those

    def learn(self, drafted: int, seconds: float) -> None:
        self.num_steps += 1
        measured, value = self.plain, max(seconds, _LEAST_S)
        if drafted:
            measured, value = self.drafted[drafted], value / self.plain.mean
        measured.add(value, self.num_steps)

    def costs(self) -> dict[int, float]:
        if not self.plain.values or self.num_steps - self.plain.step > _TOO_OLD:
            return {}
        found, slope = {0: 1.0}, 0.0
        last_size, last = 0, 1.0
        for size, measured in self.drafted.items():
            guess = _DOUBT * (last + (size - last_size) * slope / 2)
            if not measured.values:
                found[size] = guess
                break
            own = measured.mean
            found[size] = own if own < guess or measured.is_known(self.num_steps) else guess
            slope = max(0.0, own - 1.0) / size
            last_size, last = size, own
        return found


class Costs:
    """The costs of one engine."""

    def __init__(self) -> None:
        self._curves: dict[int, _Curve] = {}  # by the number of sequences in a step

    def learn(self, rows: int, drafted: int, seconds: float) -> None:
        """A step of so many sequences, with no prompt, and with so many tokens of drafts (one of SIZES, or none) took
        so long."""
        self._curves.setdefault(rows, _Curve()).learn(drafted, seconds)

    def of(self, rows: int) -> dict[int, float]:
        """Numbers of tokens of drafts that may be tried, and the time that a step of so many sequences takes with
        them. Empty if the next step must be one without drafts."""
        return self._curves[rows].costs() if rows in self._curves else {}

    def plain_s(self, rows: int) -> float:
        """Seconds of a step without drafts. Only where `of` gives something."""
        return self._curves[rows].plain.mean
