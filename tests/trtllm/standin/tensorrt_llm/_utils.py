"""Stands for tensorrt_llm/_utils.py."""

from __future__ import annotations

import inspect
import os
from typing import Any

import torch

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "int8": torch.int8}


def str_dtype_to_torch(dtype: str) -> torch.dtype:
    return _DTYPES[dtype]


def pad_vocab_size(vocab_size: int, tp_size: int) -> int:
    """The vocabulary, rounded up to what the ranks can share."""
    return -(-vocab_size // tp_size) * tp_size


def get_sm_version() -> int:
    """The GPU's architecture, 90 for a Hopper."""
    return int(os.environ.get("STANDIN_SM", "80"))


def device_count() -> int:
    """Stands for torch.cuda.device_count()."""
    return int(os.environ.get("STANDIN_GPUS", "1"))


def mpi_world() -> tuple[int, int]:
    """This process's rank and how many there are, as mpirun told it."""
    return int(os.environ.get("OMPI_COMM_WORLD_RANK", "0")), int(os.environ.get("OMPI_COMM_WORLD_SIZE", "1"))


def absent(**arguments: Any) -> None:
    """Raises NotImplementedError for what upstream has and this stand-in does not, where it is asked for."""
    asked = [name for name, value in arguments.items() if value]
    if asked:
        raise NotImplementedError(f"{', '.join(asked)}: not part of this stand-in")


def get_init_params(obj: object, cls: type | None = None) -> dict[str, Any]:
    """The arguments of an object's constructor, read back as its attributes; with `cls`, those that it takes too."""
    names = list(inspect.signature(type(obj).__init__).parameters)[1:]
    if cls is not None:
        taken = set(inspect.signature(cls.__init__).parameters)
        names = [name for name in names if name in taken]
    return {name: getattr(obj, name) for name in names}


def activations(x: torch.Tensor) -> torch.Tensor:
    """Floats as the kernels hand them on: rounded to the dtype that STANDIN_ACTIVATIONS names, if it is set. Sums
    within an operation stay float32, as in the kernels."""
    name = os.environ.get("STANDIN_ACTIVATIONS")
    return x if name is None or not x.is_floating_point() else x.to(getattr(torch, name)).float()
