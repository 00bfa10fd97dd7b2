"""Unpacks codes of 2, 3, 4 and 8 bits from bytes."""

from __future__ import annotations

import numpy as np

from export.formats.view import ByteArray


def unpack_bits(packed: ByteArray, bits: int) -> ByteArray:
    """Codes uint8 [..., n * 8 / bits] of bytes [..., n], which are a stream of bits from the lowest bit of the first
    byte on. A code of 3 bits may lie in two bytes; n is then a multiple of 3."""
    if bits == 8:
        return packed
    shape = (*packed.shape[:-1], packed.shape[-1] * 8 // bits)
    if bits == 3:
        single = np.unpackbits(packed, axis=-1, bitorder="little").reshape(*shape, 3)
        codes: ByteArray = single[..., 0] | single[..., 1] << np.uint8(1) | single[..., 2] << np.uint8(2)
        return codes
    codes = np.empty(shape, dtype=np.uint8)
    per_byte, mask = 8 // bits, np.uint8((1 << bits) - 1)
    for place in range(per_byte):
        np.bitwise_and(packed >> np.uint8(place * bits), mask, out=codes[..., place::per_byte])
    return codes
