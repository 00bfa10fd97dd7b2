"""Weight jobs into an ONNX data file: source tensors read once and hashed, initializers written to their places and
hashed."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from export.checkpoint.digests import recorded
from export.checkpoint.tensor_table import CHUNK_ELEMENTS, Weights
from export.conversion.converter import Converter
from export.conversion.parts import OpenRegion, PartRecord, PlannedRegion
from export.onnx_graph.weights import Layout, Placement, WeightJob
from export.quantize.grid import SLICE_VALUES
from export.quantize.half_scales import SmallScales


@dataclass(frozen=True, kw_only=True)
class OnnxConverter(Converter[WeightJob]):
    """Converts jobs into the data file."""

    data: Path
    placement: Placement

    def files(self) -> Mapping[Path, int]:
        """The data file."""
        return {self.data: self.placement.total_bytes}

    def file_of(self, region: str) -> Path:  # noqa: ARG002 - there is one
        """The data file."""
        return self.data

    def planned_regions(self, job: WeightJob) -> list[PlannedRegion]:
        """The job's initializers, each with the zeros up to the next."""
        return self.placement.regions(job)

    def source_bytes(self, job: WeightJob) -> int:
        """Bytes of the source tensors that the job reads."""
        stored = self.weights.checkpoint.tensors
        return sum(stored[name].num_bytes for name in {part.name for part in self.weights.table[job.source].parts})

    def working_bytes(self, job: WeightJob) -> int:
        """A chunk as stored, two as float32 (the one before is let go when the next is there) and, where blocks are
        made of it, its codes twice, a byte each and as they are stored, and the slices that they are made in."""
        row = self.weights.table[job.source]
        least = job.row_multiple * len(row.groups[0]) * row.shape[-1]  # of a chunk's values
        chunk = min(max(CHUNK_ELEMENTS, least), row.num_elements)
        stored = max(self.weights.checkpoint.tensors[part.name].itemsize for part in row.parts)
        plain = chunk * (stored + 2 * 4)
        if job.layout is Layout.PLAIN:
            return plain
        blocks = plain + chunk * (1 + 1 + 1) + 3 * 4 * SLICE_VALUES
        return blocks + chunk if job.layout is Layout.GROUPS else blocks  # once more padded to whole groups

    def convert(self, job: WeightJob, count: Callable[[int], None]) -> PartRecord:
        """Write one part. Raises as reading and quantising do."""
        checkpoint = recorded(self.weights.checkpoint, count, self.weights.run_starts(job.source))
        regions = [OpenRegion(planned) for planned in self.planned_regions(job)]
        small = SmallScales()
        produced = job.produce(Weights(checkpoint=checkpoint, table=self.weights.table), small)
        with self.data.open("r+b", buffering=0) as file:
            for pieces in produced:
                for region, piece in zip(regions, pieces, strict=True):
                    region.write(file.fileno(), piece)
        ends = [sum(self.placement.offsets[output.name]) for output in job.outputs]
        if [region.position for region in regions] != ends:
            raise AssertionError(f"{job.source}: wrote to {[region.position for region in regions]}, planned {ends}")
        written = tuple(region.finish() for region in regions)
        return PartRecord(
            part=job.source, sources=checkpoint.runs(), regions=written, warning=small.warning(job.source)
        )
