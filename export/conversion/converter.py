"""The interface of a converter, the same for every output format. A converter turns jobs into bytes of output files.

A job produces one weight of the tensor table: it reads the weight's source tensors once and writes some bytes. From the
headers alone a converter knows which bytes of which files a job will write.
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
    """The work of producing one weight. `source` is the name of its row in the tensor table, or another unique name."""

    @property
    def source(self) -> str: ...


J = TypeVar("J", bound=Job)


@dataclass(frozen=True, kw_only=True)
class Converter(ABC, Generic[J]):
    """Converts jobs into files that already have their full length. A converter is pickled and sent to the workers, so
    its fields are plain data."""

    weights: Weights

    @abstractmethod
    def files(self) -> Mapping[Path, int]:
        """The output files and their lengths in bytes."""

    @abstractmethod
    def file_of(self, region: str) -> Path:
        """The output file that holds the region of this name."""

    @abstractmethod
    def planned_regions(self, job: J) -> list[PlannedRegion]:
        """The regions that the job writes."""

    @abstractmethod
    def source_bytes(self, job: J) -> int:
        """Bytes of the source tensors that the job reads."""

    @abstractmethod
    def working_bytes(self, job: J) -> int:
        """The most memory that converting the job takes, in bytes."""

    @abstractmethod
    def convert(self, job: J, count: Callable[[int], None]) -> PartRecord:
        """Do the job: read, quantise, write. `count` is called with the number of bytes of each read.

        Raises CheckpointError when reading fails and QuantizationError when a value does not fit.
        """
