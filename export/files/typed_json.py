"""JSON into frozen dataclasses with every type checked: what a manifest says is what its reader gets."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from export.errors import names, shown

_T = TypeVar("_T")


def read_typed(cls: type[_T], raw: Any, where: str = "") -> _T:  # noqa: ANN401 - JSON value
    """`raw` as `cls`, a dataclass of numbers, texts, truths, tuples, mappings and other such dataclasses.

    Raises ValueError naming the place, what was found and what was expected; missing and unknown keys included. A
    whole number passes for a float, true and false never pass for numbers, and no number is infinite or NaN.
    """
    if not isinstance(raw, dict):
        raise ValueError(f"{where or 'the top'} is {shown(raw, 60)}, expected an object")
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    required = {name for name, field in fields.items() if field.default is dataclasses.MISSING}
    wrong = sorted(required - set(raw)) + sorted(set(raw) - set(fields))
    if wrong:
        raise ValueError(f"{where or 'the top'}: keys missing or unknown: {names(wrong)}")
    values = {name: _value(hints[name], value, f"{where}.{name}".lstrip(".")) for name, value in raw.items()}
    return cls(**values)


def _value(hint: Any, value: Any, where: str) -> Any:  # noqa: ANN401 - any type, any JSON value
    origin, arguments = get_origin(hint), get_args(hint)
    if hint is Any:
        return value
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        [hint] = [argument for argument in arguments if argument is not type(None)]
        return _value(hint, value, where)
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return read_typed(hint, value, where)
    if origin is tuple and isinstance(value, list):
        return tuple(_value(arguments[0], item, f"{where}[{index}]") for index, item in enumerate(value))
    if origin is Mapping and isinstance(value, dict):
        return {key: _value(arguments[1], item, f"{where}.{key}") for key, item in value.items()}
    if hint is float and isinstance(value, int | float) and not isinstance(value, bool):
        return _finite(value, where)
    if hint in (int, float, str, bool) and isinstance(value, hint) and isinstance(value, bool) is (hint is bool):
        return value
    expected = getattr(hint, "__name__", str(hint))
    raise ValueError(f"{where} is {shown(value, 60)}, expected {expected}")


def _finite(value: float, where: str) -> float:
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise ValueError(f"{where} is {shown(value, 60)}, expected a finite number")
    return number
