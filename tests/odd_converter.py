"""A converter for the workers' tests: what it does with a job is the job's name."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from export.checkpoint.folder import open_checkpoint
from export.conversion.parts import PartRecord, Region
from export.errors import MissingPackageError, QuantizationError
from export.families import read_model
from export.onnx_graph.converter import OnnxConverter
from export.onnx_graph.weights import Placement


@dataclass(frozen=True, kw_only=True)
class OddJob:
    source: str


@dataclass(frozen=True, kw_only=True)
class OddConverter(OnnxConverter):
    def convert(self, job, count):
        count(len(job.source))
        match job.source:
            case "die":
                os.kill(os.getpid(), signal.SIGKILL)
            case "refuse":
                raise QuantizationError("quantising w: its values are odd")
            case "lack":
                raise MissingPackageError("onnxruntime", "packing", "cpu")
            case "fill":
                raise OSError(28, "No space left on device", "data")
            case "break":
                raise ValueError("a fault of ours")
            case "sleep":
                time.sleep(3600)
        process = Region(name=str(os.getpid()), offset=0, bytes=0, sha256="")
        return PartRecord(part=job.source, sources={}, regions=(process,))


def odd_converter(checkpoint):
    weights = read_model(open_checkpoint(checkpoint)).weights
    return OddConverter(data=Path("data"), placement=Placement(offsets={}, total_bytes=0), weights=weights)
