"""What a conversion into any format has in common: jobs, each of which reads some tensors once and writes some bytes.

A job is one part of the output: the weights of one row of the tensor table. A converter knows from headers alone which
bytes of which files a job fills, and fills them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, Protocol, TypeVar

from export.checkpoint.tensor_table import Weights
from export.conversion.parts import PartRecord, PlannedRegion


class Job(Protocol):
    """One part of a conversion; `source` is the table row that it is made of, or a name of its own."""

    @property
    def source(self) -> str: ...


J = TypeVar("J", bound=Job)


@dataclass(frozen=True, kw_only=True)
class Converter(ABC, Generic[J]):
    """Converts jobs into files that have their full length already. It travels to workers: fields are plain data."""

    weights: Weights

    @abstractmethod
    def files(self) -> Mapping[Path, int]:
        """The files that the jobs fill, with their bytes."""

    @abstractmethod
    def file_of(self, region: str) -> Path:
        """The file that a region of this name lies in."""

    @abstractmethod
    def planned_regions(self, job: J) -> list[PlannedRegion]:
        """What the job writes."""

    @abstractmethod
    def source_bytes(self, job: J) -> int:
        """Bytes of the source tensors that the job reads."""

    @abstractmethod
    def working_bytes(self, job: J) -> int:
        """What converting the job holds in memory at the most."""

    @abstractmethod
    def convert(self, job: J, count: Callable[[int], None]) -> PartRecord:
        """Write one part; `count` gets the bytes of each read. Raises as reading and quantising do."""
