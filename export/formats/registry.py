"""The record by which a format of packed weights is known; apart from the package, so that formats can import it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from export.formats.view import Header, PackedTensor, Source


@dataclass(frozen=True, kw_only=True)
class Format:
    """A format of packed weights.

    - `methods`: the values of `quant_method` in config.json that name it.
    - `views(settings, headers, source)`: the packed tensors, by the names that they have in an ordinary checkpoint.
      `settings` is the object quantization_config, `headers` the tensors of the files, and `source` reads them. Raises
      ConfigError and CheckpointError.
    """

    methods: tuple[str, ...]
    views: Callable[[Mapping[str, Any], Mapping[str, Header], Source], dict[str, PackedTensor]]
