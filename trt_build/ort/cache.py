"""The keys and values of several sequences, each in a slot of its own.

    cache = Cache(device, layers=32, heads=32, positions=2048, head_size=80, slots=8)
    cache.lengths[3]         # positions that slot 3 holds
    cache.copy(3, 5)         # slot 5 continues what slot 3 holds; copy(3, 5, 512) only its first 512 positions
    cache.shorten(3, 0)      # slot 3 is empty; its memory stays
    cache.release(3)         # its memory goes back to the system

A layer's buffers are [slots, G, C, D], so that one call of attention takes any run of slots. On the CPU all of them are
reserved at once and take memory as positions are written: a position's page is the system's until something is written
to it. The pages are small ones, since in a huge page a short sequence would take the memory of a long one: a head's
positions lie together, and the next head's C * D values away.
"""

from __future__ import annotations

import contextlib
import mmap
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from export.onnx_graph import names
from trt_build.errors import SequenceError
from trt_build.ort.device import Device
from trt_build.ort.step_call import Key, StepCall

_MOST_CALLS = 64  # kept; a call of 32 layers takes some 50 kB
_NO_RESERVE = getattr(mmap, "MAP_NORESERVE", 0x4000)  # Linux; Python names it since 3.13


class Cache:
    """Buffers of every layer's keys and values, [slots, G, C, D] on a device, and the number of positions that each
    slot holds."""

    def __init__(
        self,
        device: Device,
        new_binding: Callable[[], Any],
        *,
        layers: int,
        heads: int,
        positions: int,
        head_size: int,
        slots: int = 1,
        dtype: str | None = None,
    ) -> None:
        """`new_binding` makes an IOBinding of the session whose keys and values these are, in `dtype` (None: the
        provider's float type). On a device with its own memory they are floats."""
        self.lengths = [0] * slots
        self.num_slots, self.positions = slots, positions
        self._new_binding, self._bindings = new_binding, dict[tuple[int, int], Any]()
        self.calls: dict[Key, StepCall] = {}
        self._device, self._shape = device, (slots, heads, positions, head_size)
        self._dtype = np.dtype(dtype or device.provider.float_type)
        self._slot_bytes = heads * positions * head_size * self._dtype.itemsize
        pairs = [
            pair
            for layer in range(layers)
            for pair in (
                (names.past_key(layer), names.present_key(layer)),
                (names.past_value(layer), names.present_value(layer)),
            )
        ]
        size = slots * self._slot_bytes
        self._pages: mmap.mmap | None = None
        self._arrays: list[npt.NDArray[Any]] = []
        self._values: list[Any] = []  # onnxruntime.OrtValue, on a device with its own memory
        if device.kind == "cpu":
            self._pages = _reserve(len(pairs) * size)
            everything = np.frombuffer(self._pages, dtype=self._dtype)
            self._arrays = list(everything.reshape(len(pairs), *self._shape))
            pointers = [array.ctypes.data for array in self._arrays]
        else:
            self._values = [device.zeros(self._shape) for _ in pairs]
            pointers = [value.data_ptr() for value in self._values]
        self._places = list(zip(pairs, pointers, strict=True))

    def bytes_of(self, positions: int) -> int:
        """Bytes of memory that so many positions of one slot take at most. Each head's positions begin in a page of
        their own. A device with its own memory holds whole slots."""
        if self._pages is None:
            return self._slot_bytes * len(self._places)
        _, heads, _, head_size = self._shape
        row = positions * head_size * self._dtype.itemsize
        pages = heads * (-(-row // mmap.PAGESIZE) + 1)
        return len(self._places) * min(pages * mmap.PAGESIZE, self._slot_bytes + mmap.PAGESIZE) if positions else 0

    @property
    def can_copy(self) -> bool:
        """Whether `copy` works: in memory that the processor reads."""
        return bool(self._arrays)

    def binding(self, first: int, stop: int) -> Any:  # noqa: ANN401 - onnxruntime's IOBinding
        """An IOBinding in which the slots first to stop - 1 are the past and, in place, the present of a call. It is
        kept for later calls of the same slots."""
        if (first, stop) not in self._bindings:
            self._bindings[first, stop] = self.new_binding(first, stop)
        return self._bindings[first, stop]

    def new_binding(self, first: int, stop: int) -> Any:  # noqa: ANN401 - onnxruntime's IOBinding
        """The same, made for this call alone."""
        binding = self._new_binding()
        kind, index = self._device.kind, self._device.index
        dtype, shape = self._dtype.type, (stop - first, *self._shape[1:])
        for (past, present), pointer in self._places:
            place = pointer + first * self._slot_bytes
            binding.bind_input(past, kind, index, dtype, shape, place)
            binding.bind_output(present, kind, index, dtype, shape, place)
        return binding

    def held(self, slot: int) -> list[npt.NDArray[Any]]:
        """What a slot holds, without a copy: the keys of layer 0, its values, the keys of layer 1 and so on, each
        [G, positions, D]. Only where `can_copy`."""
        return [array[slot, :, : self.lengths[slot]] for array in self._arrays]

    def keep(self, key: Key, call: StepCall) -> None:
        """Keep a call, whose binding must be its own, for later steps of rows with the same key: see `calls`."""
        if len(self.calls) >= _MOST_CALLS:
            self.calls.clear()
        self.calls[key] = call

    def shorten(self, slot: int, length: int) -> None:
        """Drop the positions of a slot from `length` on. Raises SequenceError if it holds fewer."""
        if not 0 <= length <= self.lengths[slot]:
            raise SequenceError(
                f"shortening slot {slot} of the cache: found {self.lengths[slot]} positions, expected at least {length}"
            )
        self.lengths[slot] = length

    def copy(self, source: int, target: int, length: int | None = None) -> None:
        """Have the slot `target` hold what `source` holds, or the first `length` positions of it. The positions that
        `target` holds already must be those of `source`. Only where `can_copy`. Raises SequenceError if `source` holds
        fewer."""
        start, stop = self.lengths[target], self.lengths[source] if length is None else length
        if not start <= stop <= self.lengths[source]:
            raise SequenceError(
                f"copying {stop} positions of slot {source} of the cache: found {self.lengths[source]} positions, and "
                f"{start} in slot {target}, expected at least {stop}, and at most that many"
            )
        for array in self._arrays:
            array[target, :, start:stop] = array[source, :, start:stop]
        self.lengths[target] = stop

    def release(self, slot: int, length: int = 0) -> None:
        """Drop the positions of a slot from `length` on and give their memory back to the system, where the device
        allows it. Raises SequenceError if the slot holds fewer."""
        self.shorten(slot, length)
        if self._pages is None:
            return
        _, heads, positions, _ = self._shape
        head_bytes = self._slot_bytes // heads
        row_bytes = head_bytes // positions
        for number in range(len(self._arrays)):
            start = (number * self.num_slots + slot) * self._slot_bytes
            if not length:
                self._give_back(start, start + self._slot_bytes)
                continue
            for head in range(heads):  # whose positions lie together
                own = start + head * head_bytes
                self._give_back(own + length * row_bytes, own + head_bytes)

    def _give_back(self, start: int, stop: int) -> None:
        """Give the whole pages among some bytes back to the system."""
        first, last = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, stop // mmap.PAGESIZE * mmap.PAGESIZE
        if self._pages is not None and first < last:
            self._pages.madvise(mmap.MADV_DONTNEED, first, last - first)


def _reserve(num_bytes: int) -> mmap.mmap:
    """Address space of zeros that takes memory as it is written to."""
    pages = mmap.mmap(-1, num_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NO_RESERVE)
    with contextlib.suppress(AttributeError, OSError):  # systems without huge pages
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return pages
