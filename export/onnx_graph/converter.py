"""The converter that fills the ONNX data file: it reads and hashes each source tensor once, and writes and hashes the
initializers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from export.checkpoint.digests import recorded
from export.checkpoint.tensor_table import CHUNK_ELEMENTS, Weights
from export.conversion.converter import Converter
from export.conversion.parts import OpenRegion, PartRecord, PlannedRegion
from export.onnx_graph.weights import Layout, Placement, WeightJob
from export.quantize.carry import Loss
from export.quantize.grid import SLICE_VALUES
from export.quantize.half_scales import SmallScales
from export.quantize.solved import SolvedCodes


@dataclass(frozen=True, kw_only=True)
class OnnxConverter(Converter[WeightJob]):
    """Converts jobs into initializers in the ONNX data file. `solved` has codes that are carried over."""

    data: Path
    placement: Placement
    solved: SolvedCodes | None = None

    def files(self) -> Mapping[Path, int]:
        """The data file and its length in bytes."""
        return {self.data: self.placement.total_bytes}

    def file_of(self, region: str) -> Path:  # noqa: ARG002 - there is one
        """The data file, which holds every region."""
        return self.data

    def planned_regions(self, job: WeightJob) -> list[PlannedRegion]:
        """One region for each initializer of the job, with the zeros up to the next initializer."""
        return self.placement.regions(job)

    def source_bytes(self, job: WeightJob) -> int:
        """Bytes of the source tensors that the job reads."""
        stored = self.weights.checkpoint.tensors
        return sum(stored[name].num_bytes for name in {part.name for part in self.weights.table[job.source].parts})

    def working_bytes(self, job: WeightJob) -> int:
        """The most memory that the job takes, in bytes: a chunk as stored and two chunks as float32, since the last one
        is freed only after the next is read. A quantised weight also takes the codes of a chunk, unpacked and packed,
        and the slices in which they are computed."""
        row = self.weights.table[job.source]
        least = job.row_multiple * len(row.groups[0]) * row.shape[-1]  # fewest values of a chunk
        chunk = min(max(CHUNK_ELEMENTS, least), row.num_elements)
        stored = max(self.weights.checkpoint.tensors[part.name].itemsize for part in row.parts)
        plain = chunk * (stored + 2 * 4)
        kept = self.weights.kept_bytes(job.source)
        if kept:  # packed bytes in order, codes, zero points and scales of a chunk, or its error
            plain += kept + chunk * (1 + 1 + 2 * 4)
        if job.layout is Layout.PLAIN:
            return plain
        blocks = plain + chunk * (1 + 1 + 1) + 3 * 4 * SLICE_VALUES
        return blocks + chunk if job.layout is Layout.GROUPS else blocks  # one more copy, padded to whole groups

    def convert(self, job: WeightJob, count: Callable[[int], None]) -> PartRecord:
        """Do the job: read, quantise, write. Raises CheckpointError when reading fails and QuantizationError when a
        value does not fit."""
        checkpoint = recorded(self.weights.checkpoint, count, self.weights.run_starts(job.source))
        regions = [OpenRegion(planned) for planned in self.planned_regions(job)]
        small = SmallScales()
        packed = any(part.packed_in(checkpoint) is not None for part in self.weights.table[job.source].parts)
        loss = Loss() if packed and job.layout is not Layout.PLAIN else None
        weights = Weights(checkpoint=checkpoint, table=self.weights.table)
        produced = job.produce(weights, small, loss, self.solved)
        with self.data.open("r+b", buffering=0) as file:
            for pieces in produced:
                for region, piece in zip(regions, pieces, strict=True):
                    region.write(file.fileno(), piece)
        job.read_left_out(weights)
        ends = [sum(self.placement.offsets[output.name]) for output in job.outputs]
        if [region.position for region in regions] != ends:
            raise AssertionError(f"{job.source}: wrote to {[region.position for region in regions]}, planned {ends}")
        written = tuple(region.finish() for region in regions)
        if self.solved is not None:
            self.solved.check_read(job.source, checkpoint.runs())
        return PartRecord(
            part=job.source, sources=checkpoint.runs(), regions=written, warning=small.warning(job.source),
            loss=None if loss is None else (loss.error, loss.size),
        )  # fmt: skip
