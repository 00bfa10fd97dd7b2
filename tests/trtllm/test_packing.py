"""Codes and their bytes: the packer against the converter's own steps, one after the other, and against a closed form.

Both come from `weight_only_packing` in contract.json, which names their upstream sources. Codes are compared with what
C's roundf makes of every single value.
"""

from __future__ import annotations

import ctypes
import itertools
import json
from typing import Any

import numpy as np
import pytest
from trtllm.weight_layout import PACKING, Array, packed_by_form, unpacked

from export.quantize.channels import quantize_channels
from export.trtllm.packing import interleaves_columns, pack, pack_pairs

EDGES = [(64, 64), (64, 448), (448, 64), (128, 64), (64, 128)]
NUM_SHAPES = 200


def bytes_by_steps(codes: Array, bits: int, interleaved: bool, facts: dict[str, Any] = PACKING) -> bytes:
    """What the steps make of signed codes [K, N]: neighbouring columns into bytes, rows permuted, turned, columns
    interleaved, made unsigned and reordered in words."""
    kind, per_byte = f"int{bits}", 8 // bits
    rows, columns = codes.shape
    grid = np.zeros((rows, columns // per_byte), dtype=np.uint8)
    for column in range(columns):
        values = (codes[:, column] % 2**bits).astype(np.uint8)
        grid[:, column // per_byte] |= values << bits * (column % per_byte)
    permutation = facts["row_permutation"][kind]
    permuted = np.zeros_like(grid)
    for base in range(0, rows, permutation["group"]):
        for place, row in enumerate(permutation["map"]):
            permuted[base + place] = grid[base + row]
    turned = np.zeros((columns, rows // per_byte), dtype=np.uint8)
    for column in range(columns):
        values = permuted[:, column // per_byte] >> bits * (column % per_byte) & 2**bits - 1
        for place in range(per_byte):
            turned[column] |= values[place::per_byte] << bits * place
    words = turned.reshape(-1).view("<u4")
    if interleaved:
        tile = facts["column_interleave"][kind]
        words_of_tile = tile["rows_per_tile"] * bits // 32
        shape = (columns // tile["columns"], tile["columns"], rows // tile["rows_per_tile"], words_of_tile)
        words = words.reshape(shape).swapaxes(1, 2).reshape(-1)
    order = facts["bias_and_order"][kind]
    finished = np.zeros_like(words)
    elements = [((words >> bits * place & 2**bits - 1) + order["add"]) % 2**bits for place in range(32 // bits)]
    for place, element in enumerate(next(order[name] for name in order if name.endswith("order_low_to_high"))):
        finished |= elements[element] << bits * place
    return finished.tobytes()


def packed_by_us(codes: Array, bits: int, interleaved: bool) -> bytes:
    """Signed codes [K, N] through the packer, which takes them as checkpoints keep them, and unsigned."""
    unsigned = np.ascontiguousarray((codes.T.astype(np.int64) + 2 ** (bits - 1)).astype(np.uint8))
    return pack(unsigned, bits, interleave=interleaved).tobytes()


def random_codes(rng: np.random.Generator, rows: int, columns: int, bits: int) -> Array:
    return rng.integers(-(2 ** (bits - 1)), 2 ** (bits - 1), (rows, columns))


def expected_interleave(experts: int, sm: int) -> bool:
    """contract.json: always for 3-D; for 2-D on every architecture except SM90."""
    return bool(experts) or sm != 90


@pytest.mark.parametrize("number", range(NUM_SHAPES))
def test_random_weights_become_the_bytes_of_the_steps_and_of_the_closed_form(number):
    """Floats [K, N] or [E, K, N] to scales and bytes, as the converter would make them."""
    rng = np.random.default_rng(number)
    bits, sm, experts = (4, 8)[number % 2], (80, 90)[number // 2 % 2], int(rng.integers(1, 4)) * (number // 4 % 2)
    rows, columns = (64 * int(size) for size in rng.integers(1, 6, 2))
    weights = rng.standard_normal((max(1, experts), rows, columns), dtype=np.float32)
    interleaved = interleaves_columns(sm, experts=bool(experts))
    assert interleaved == expected_interleave(experts, sm)
    for weight in weights:
        codes, scales = quantize_channels(np.ascontiguousarray(weight.T), bits)
        found = pack(codes, bits, interleave=interleaved).tobytes()
        expected, expected_scales = quantized(weight, bits)
        assert np.array_equal(scales, expected_scales)
        assert found == bytes_by_steps(expected, bits, interleaved) == packed_by_form(expected, bits, interleaved)
        assert np.array_equal(unpacked(found, rows, columns, bits, interleaved), expected)


def quantized(weight: Array, bits: int) -> tuple[Array, Array]:
    """Codes [K, N] and scales [N] of a weight, by the contract: scale = max |w| / 2^(bits - 1), q = w / scale rounded
    and kept in range. Halves go away from zero, as of C's round."""
    end = 2 ** (bits - 1)
    scales = np.abs(weight).max(axis=0) / np.float32(end)
    ratio = (weight / scales).astype(np.float64)
    codes = np.floor(np.abs(ratio) + 0.5) * np.sign(ratio)
    return np.clip(codes, -end, end - 1).astype(np.int64), scales


@pytest.mark.parametrize("shape", EDGES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("interleaved", [True, False])
def test_edge_shapes_and_every_code_are_packed_and_come_back(shape, bits, interleaved):
    codes = random_codes(np.random.default_rng(bits), *shape, bits)
    end = 2 ** (bits - 1)
    codes.reshape(-1)[: 2 * end] = np.arange(-end, end)
    found = packed_by_us(codes, bits, interleaved)
    assert found == bytes_by_steps(codes, bits, interleaved) == packed_by_form(codes, bits, interleaved)
    assert np.array_equal(unpacked(found, *shape, bits, interleaved), codes)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("interleaved", [True, False])
def test_rows_packed_a_few_at_a_time_are_the_bytes_of_the_whole(bits, interleaved):
    codes = random_codes(np.random.default_rng(3), 192, 256, bits)  # 256 rows of the checkpoint's matrix
    cuts = [0, 4, 64, 68, 196, 256]
    parts = [packed_by_us(codes[:, first:last], bits, interleaved) for first, last in itertools.pairwise(cuts)]
    assert b"".join(parts) == packed_by_us(codes, bits, interleaved)


def swapped(values: list[int], first: int, second: int) -> list[int]:
    values = list(values)
    values[first], values[second] = values[second], values[first]
    return values


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("fault", ["rows", "order", "bias", "columns", "interleave"])
def test_one_wrong_step_gives_other_bytes(bits, fault):
    kind, codes = f"int{bits}", random_codes(np.random.default_rng(1), 128, 64, bits)
    facts = json.loads(json.dumps(PACKING))
    if fault == "rows":
        facts["row_permutation"][kind]["map"] = swapped(facts["row_permutation"][kind]["map"], 2, 3)
    elif fault == "order":
        name = next(name for name in facts["bias_and_order"][kind] if name.endswith("order_low_to_high"))
        facts["bias_and_order"][kind][name] = swapped(facts["bias_and_order"][kind][name], 1, 2)
    elif fault == "bias":
        facts["bias_and_order"][kind]["add"] = 0
    elif fault == "columns":
        facts["column_interleave"][kind]["columns"] *= 2
    assert packed_by_us(codes, bits, True) == bytes_by_steps(codes, bits, True)
    assert packed_by_us(codes, bits, True) != bytes_by_steps(codes, bits, fault != "interleave", facts)


@pytest.mark.parametrize("shape", [(64, 2), *EDGES])
def test_pairs_of_rows_are_the_columns_that_the_converter_puts_into_a_byte(shape):
    """The library turns [N / 2, K] before it packs; turned, it is the contract's first step."""
    codes = random_codes(np.random.default_rng(7), *shape, 4)
    codes.reshape(-1)[:16] = np.arange(-8, 8)
    found = pack_pairs(np.ascontiguousarray((codes.T + 8).astype(np.uint8)))
    assert (found.dtype, found.shape) == (np.uint8, (shape[1] // 2, shape[0]))
    for row, (even, odd) in enumerate(zip(codes.T[0::2], codes.T[1::2], strict=True)):
        assert found[row].tolist() == [low % 16 + 16 * (high % 16) for low, high in zip(even, odd, strict=True)]


# Codes and scales of single values -----------------------------------------------------------------------------------


def roundf(value: np.float32) -> int:
    """C's: to the nearest integer, halves away from zero."""
    function = ctypes.CDLL("libm.so.6").roundf
    function.argtypes, function.restype = [ctypes.c_float], ctypes.c_float
    return int(function(float(value)))


def quantized_value_by_value(row: Array, bits: int) -> tuple[list[int], np.float32]:
    """One row's signed codes and its scale."""
    end, largest = 2 ** (bits - 1), np.float32(0)
    for value in row:
        largest = max(largest, np.abs(value))
    scale = np.float32(largest / np.float32(end))
    if scale == 0:
        return [0] * len(row), scale
    return [min(end - 1, max(-end, roundf(np.float32(value / scale)))) for value in row], scale


HALF = np.float32(0.5)
ROWS: dict[str, list[float]] = {
    "zeros": [0, 0, -0.0, 0],
    "the largest is negative": [-8, 7.4, 7.5, -7.5],
    "the largest is positive": [8, 7.6, -7.6, -8],
    "halves": [-8, 0.5, -0.5, 1.5, -1.5, 2.5, -2.5, 6.5, 7.49999, -7.5],
    "just below a half": [-8, np.nextafter(HALF, 0), -np.nextafter(HALF, 0), np.nextafter(np.float32(2.5), 0)],
    "just above a half": [-8, np.nextafter(HALF, 1), -np.nextafter(HALF, 1), np.nextafter(np.float32(2.5), 3)],
    "halves of eight bits": [-128, 0.5, -0.5, 99.5, -99.5, 126.5, 127.5, -127.5],
    "one value": [3.25],
    "tiny": [1e-38, -9e-39, 4e-39, 0],
    "smaller than a scale can say": [-11 * 2.0**-149, 11 * 2.0**-149, 5 * 2.0**-149, -(2.0**-149)],
    "a scale of the smallest float": [-190 * 2.0**-149, 190 * 2.0**-149, 2.0**-149],
    "huge": [3e38, -3.4e38, 1e37, 2e36],
}


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ROWS)
def test_codes_and_scales_are_those_that_c_would_make(name, bits):
    row = np.array([ROWS[name]], dtype=np.float32)
    codes, scales = quantize_channels(row, bits)
    expected, scale = quantized_value_by_value(row[0], bits)
    assert (codes[0].astype(int) - 2 ** (bits - 1)).tolist() == expected
    assert (scales[0], scales.dtype, codes.dtype) == (scale, np.float32, np.uint8)
    assert codes.max() < 2**bits


@pytest.mark.parametrize("bits", [4, 8])
def test_codes_of_random_rows_are_those_that_c_would_make(bits):
    rng = np.random.default_rng(bits)
    rows = rng.standard_normal((24, 96), dtype=np.float32) * np.exp2(rng.integers(-9, 12, (24, 1))).astype(np.float32)
    rows[::2] = rows[::2].astype(np.float16)  # few distinct values, many of them halves of a code
    rows[5] = np.round(rows[5] * 4) / 4
    codes, scales = quantize_channels(rows, bits)
    for row, found, scale in zip(rows, codes, scales, strict=True):
        expected, expected_scale = quantized_value_by_value(row, bits)
        assert (found.astype(int) - 2 ** (bits - 1)).tolist() == expected
        assert scale == expected_scale


def test_every_float_beside_a_half_is_rounded_as_by_c():
    """On a scale of one."""
    halves = np.arange(0.5, 7.5, dtype=np.float32)
    near = np.concatenate([np.nextafter(halves, 0), halves, np.nextafter(halves, 8)])
    row = np.concatenate([np.float32([-8]), near, -near])
    codes, scales = quantize_channels(row[None], 4)
    assert scales[0] == 1
    assert (codes[0].astype(int) - 8).tolist() == [min(7, max(-8, roundf(value))) for value in row]
