"""Carries a packed checkpoint's own codes over into group-wise weights of TensorRT-LLM."""

from __future__ import annotations

from export.checkpoint.tensor_table import OnGrid, Part, Weights
from export.formats.view import Grid
from export.quantize.carry import carried_blocks
from export.quantize.grid import ByteArray, FloatArray
from export.trtllm.layout import Form, TensorJob


def kept_grid(weights: Weights, job: TensorJob) -> Grid | None:
    """The grid whose codes a job keeps: that of the checkpoint, if its codes have room, its groups are multiples of the
    job's, and the form can state its zero points, which W4A16_AWQ cannot. None if the job quantises floats."""
    if job.form not in (Form.GROUPS, Form.PAIRS):
        return None
    grid = weights.grid(job.source)
    if grid is None or grid.bits > job.bits or grid.group_size % job.group_size:
        return None
    return None if grid.has_zeros and job.form is Form.PAIRS else grid


def carried_groups(
    weights: Weights, part: Part, first: int, values: FloatArray, job: TensorJob, grid: Grid
) -> tuple[ByteArray, FloatArray, FloatArray]:
    """Codes uint8 [n, K], and scales and zeros float32 [n, K / group], of a part's rows from `first` on: value =
    (code - 2^(bits-1)) * scale + zero. Source: tensorrt_llm/layers, W4A16_GPTQ's `zero`."""
    packed = part.packed_in(weights.checkpoint)
    assert packed is not None  # of a row that has a grid every part is packed
    start = part.first_row + first
    scales, zero_points = packed.steps(weights.checkpoint, start, start + len(values))
    chunk = OnGrid(values=values, scales=scales, zero_points=zero_points)
    codes, scales, zeros = carried_blocks(chunk, job.bits, job.group_size, has_zeros=grid.has_zeros)
    return codes, scales, ((1 << (job.bits - 1)) - zeros.astype(scales.dtype)) * scales
