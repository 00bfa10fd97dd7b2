"""Weight jobs into an ONNX data file: source tensors read once and hashed, initializers written to their places and
hashed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from export.conversion.converter import Converter
from export.conversion.parts import OpenRegion, PartRecord, PlannedRegion
from export.conversion.writer import MAX_WORKERS
from export.digests import num_cores, recorded
from export.onnx_graph.packing import SCRATCH_COPIES, QuantizedWeight, packed, packed_bytes
from export.onnx_graph.weights import Packing, Placement, WeightJob, aligned
from export.quantize.grid import SLICE_VALUES
from export.tensor_table import CHUNK_ELEMENTS, Weights


@dataclass(frozen=True, kw_only=True)
class OnnxConverter(Converter[WeightJob]):
    """Converts jobs into the data file; `scratch` is a folder for working files, `packs` a weight of the kind that will
    be packed, if any will."""

    data: Path
    placement: Placement
    scratch: Path
    packs: QuantizedWeight | None

    def files(self) -> Mapping[Path, int]:
        """The data file."""
        return {self.data: self.placement.total_bytes}

    def file_of(self, region: str) -> Path:  # noqa: ARG002 - there is one
        """The data file."""
        return self.data

    def planned_regions(self, job: WeightJob) -> list[PlannedRegion]:
        """The job's initializers, each with the zeros up to the next."""
        return planned_regions(job, self.placement)

    def source_bytes(self, job: WeightJob) -> int:
        """Bytes of the source tensors that the job reads."""
        stored = self.weights.checkpoint.tensors
        return sum(stored[name].num_bytes for name in {part.name for part in self.weights.table[job.source].parts})

    def working_bytes(self, job: WeightJob) -> int:
        """A chunk as stored, two as float32 (the one before is let go when the next is there) and, where blocks are
        made of it, its codes twice, a byte each and as they are stored, and the slices that they are made in. To pack
        a weight its codes and scales are mapped whole, and its packed form is held beside them."""
        row = self.weights.table[job.source]
        least = job.row_multiple * len(row.groups[0]) * row.shape[-1]  # of a chunk's values
        chunk = min(max(CHUNK_ELEMENTS, least), row.num_elements)
        stored = max(self.weights.checkpoint.tensors[part.name].itemsize for part in row.parts)
        plain = chunk * (stored + 2 * 4)
        if job.packing is Packing.PLAIN:
            return plain
        blocks = plain + chunk * (1 + 1 + 1) + 3 * 4 * SLICE_VALUES
        if job.packing is Packing.GROUPS:  # once more padded to whole groups
            return blocks + chunk
        if job.packed is None:
            return blocks
        return blocks + job.packed.codes_bytes + job.packed.scales_bytes + sum(item.num_bytes for item in job.outputs)

    def prepare(self) -> None:
        """Load ONNX Runtime where weights are to be packed."""
        if self.packs is not None:
            packed_bytes(self.packs)

    def convert(self, job: WeightJob, count: Callable[[int], None]) -> PartRecord:
        """Write one part. Raises as reading, quantising and packing do."""
        checkpoint = recorded(self.weights.checkpoint, count, run_starts(job, self.weights))
        regions = [OpenRegion(planned) for planned in self.planned_regions(job)]
        produced = job.produce(Weights(checkpoint=checkpoint, table=self.weights.table))
        key = None
        with self.data.open("r+b", buffering=0) as file:
            blobs = regions[: len(job.outputs)] if job.packed else []
            for pieces in produced:
                for region, piece in zip(regions[len(blobs) :], pieces, strict=True):
                    region.write(file.fileno(), piece)
            if job.packed is not None:
                codes, scales = (self.placement.offsets[form.name][0] for form in job.unpacked)
                with packed(job.packed, self.data, codes, scales, self.scratch) as weight:
                    key = weight.key
                    for region, blob in zip(blobs, weight.blobs, strict=True):
                        for piece in weight.pieces(blob):
                            region.write(file.fileno(), piece)
        ends = [sum(self.placement.offsets[form.name]) for form in job.stored]
        if [region.position for region in regions] != ends:
            raise AssertionError(f"{job.source}: wrote to {[region.position for region in regions]}, planned {ends}")
        written = tuple(region.finish() for region in regions)
        return PartRecord(part=job.source, sources=checkpoint.runs(), regions=written, key=key)


def onnx_converter(
    jobs: Sequence[WeightJob], placement: Placement, weights: Weights, data: Path, scratch: Path
) -> OnnxConverter:
    """The converter of these jobs into the file `data`."""
    packs = next((job.packed for job in jobs if job.packed), None)
    return OnnxConverter(weights=weights, data=data, placement=placement, scratch=scratch, packs=packs)


def planned_regions(job: WeightJob, placement: Placement) -> list[PlannedRegion]:
    """Name, offset and bytes of what a job writes."""
    return [PlannedRegion(form.name, placement.offsets[form.name][0], aligned(form.num_bytes)) for form in job.stored]


def run_starts(job: WeightJob, weights: Weights) -> dict[str, list[int]]:
    """At which bytes of each source tensor a run of reading begins: where one of the job's parts does."""
    return weights.run_starts(job.source)


def disk_bytes(jobs: Sequence[WeightJob], placement: Placement) -> int:
    """What a conversion takes on the disk: the data file, and the working files of the largest parts side by side."""
    scratch = sorted(
        (SCRATCH_COPIES * (job.packed.codes_bytes + job.packed.scales_bytes) for job in jobs if job.packed),
        reverse=True,
    )
    return placement.total_bytes + sum(scratch[: min(MAX_WORKERS, num_cores())])
