"""Keys and values in int8 as moeship's own attention stores them: a record for each position and head.

A record is the D codes of a key or value, int8, then its scale and its middle, both bfloat16 in little-endian bytes. A
stored value is code * scale + middle. trt_build/ort/kernels/attention.cpp writes records; the scale and the middle are
those of the key or value itself, so that nothing is found beforehand.
"""

from __future__ import annotations

LAYOUT = 1  # the operator's attribute of that name
GRID_BYTES = 4  # of a scale and a middle
LARGEST_HEAD = 256  # channels that the kernel takes


def record_bytes(head_size: int) -> int:
    """The bytes of a record."""
    return head_size + GRID_BYTES
