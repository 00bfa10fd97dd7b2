"""Which of transformers' models a checkpoint of a family is: the record from which trt_build makes the reference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


def _as_it_is(raw: Mapping[str, Any]) -> Mapping[str, Any]:
    return raw


@dataclass(frozen=True, kw_only=True)
class Reference:
    """`model` is the class in transformers. `name` turns the name of a row of the table into the class's, where {}
    stands for q, k and v, which are one row here and three tensors there; None for a row that the class has no place
    for. `router` is the path of the router's module inside a layer, of families that route. `config` puts a config.json
    into the words of the class's configuration, from the JSON alone. `additions` names the module of
    trt_build/comparison/references that puts in what the class lacks."""

    model: str
    name: Callable[[str], str | None]
    router: str | None = None
    config: Callable[[Mapping[str, Any]], Mapping[str, Any]] = _as_it_is
    additions: str | None = None
