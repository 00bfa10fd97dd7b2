"""Stands for tensorrt_llm/parameter.py: a tensor of a promised shape and dtype, set once a checkpoint is loaded."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from tensorrt_llm._utils import str_dtype_to_torch
from tensorrt_llm.logger import logger


class Parameter:
    """Setting a value of another shape fails, of another dtype warns and takes it. A buffer has its value from the
    start, so that no checkpoint needs to hold it. Reading one that nobody set raises, where upstream makes it up."""

    def __init__(
        self,
        value: torch.Tensor | None = None,
        shape: Sequence[int] | None = None,
        dtype: str | torch.dtype | None = None,
        is_buffer: bool = False,
        prefer_managed: bool = False,
    ) -> None:
        self.shape = tuple(value.shape if value is not None else shape)
        self.dtype = str_dtype_to_torch(dtype) if isinstance(dtype, str) else dtype or torch.float32
        self.is_buffer, self.prefer_managed = is_buffer, prefer_managed
        self._value = value

    def is_inited(self) -> bool:
        return self._value is not None

    @property
    def value(self) -> torch.Tensor:
        if self._value is None:
            raise RuntimeError(f"reading a parameter of shape {self.shape} that no checkpoint has set")
        return self._value

    raw_value = value

    @value.setter
    def value(self, value: torch.Tensor) -> None:
        assert tuple(value.shape) == self.shape, (
            "The value updated is not the same shape as the original. "
            f"Updated: {tuple(value.shape)}, original: {self.shape}"
        )
        if value.dtype != self.dtype:
            logger.warning("Parameter was initialized as %s but set to %s", self.dtype, value.dtype)
            self.dtype = value.dtype
        self._value = value

    def float32(self) -> torch.Tensor:
        """The value as this stand-in computes with it."""
        return self.value.float()
