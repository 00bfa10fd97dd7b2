"""The memory that a job is expected to take, worked by hand from what it holds at once."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from export.checkpoint.tensor_table import CHUNK_ELEMENTS
from export.onnx_graph.converter import OnnxConverter
from export.onnx_graph.weights import Layout
from export.quantize.grid import SLICE_VALUES

SMALL, WIDE = 12, 4 * CHUNK_ELEMENTS  # input features


def bytes_of(layout, rows, features, *, row_multiple=1, files=1, itemsizes=(2,), kept=0):
    """`files`: tensors of the checkpoint whose rows lie beside one another in a row of the weight; `kept`: bytes of
    packed tensors that are kept."""
    parts = [SimpleNamespace(name=f"part{index}") for index in range(len(itemsizes))]
    row = SimpleNamespace(groups=[parts[:1] * files], shape=(rows, features), num_elements=rows * features, parts=parts)
    stored = {part.name: SimpleNamespace(itemsize=size) for part, size in zip(parts, itemsizes, strict=True)}
    weights = SimpleNamespace(table={"w": row}, checkpoint=SimpleNamespace(tensors=stored),
                              kept_bytes=lambda name: kept)  # fmt: skip
    job = SimpleNamespace(source="w", row_multiple=row_multiple, layout=layout)
    return OnnxConverter(weights=weights, data=Path(), placement=None).working_bytes(job)


@pytest.mark.parametrize(
    ("rows", "features", "more", "values"),
    [
        (3, SMALL, {}, 3 * SMALL),  # all of a small weight
        (CHUNK_ELEMENTS, SMALL, {}, CHUNK_ELEMENTS),  # a chunk of a large one
        (100, WIDE, {}, WIDE),  # at least one row
        (100, WIDE, {"row_multiple": 16}, 16 * WIDE),  # or as many rows as are laid out together
        (100, WIDE, {"files": 2}, 2 * WIDE),
    ],
)
def test_a_chunk_is_held_once_as_stored_and_twice_as_float32(rows, features, more, values):
    assert bytes_of(Layout.PLAIN, rows, features, **more) == values * (2 + 4 + 4)
    assert bytes_of(Layout.PLAIN, rows, features, itemsizes=(2, 4), **more) == values * (4 + 4 + 4)


def test_a_quantised_weight_holds_its_codes_and_a_slice_beside_them():
    plain = bytes_of(Layout.PLAIN, 100, WIDE)
    blocks = bytes_of(Layout.BLOCKS, 100, WIDE)
    assert blocks == plain + 3 * WIDE + 3 * 4 * SLICE_VALUES
    assert bytes_of(Layout.GROUPS, 100, WIDE) == blocks + WIDE


def test_a_packed_weight_is_held_whole_beside_a_chunk_of_its_codes_and_its_error():
    blocks = bytes_of(Layout.BLOCKS, 100, WIDE)
    assert bytes_of(Layout.BLOCKS, 100, WIDE, kept=7_000_000) == blocks + 7_000_000 + WIDE * (1 + 1 + 4 + 4)
