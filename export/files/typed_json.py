"""Converts JSON values to frozen dataclasses and checks the type of every field."""

from __future__ import annotations

import dataclasses
import math
import types
from collections.abc import Mapping
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from export.errors import names, shown

_T = TypeVar("_T")


def read_typed(cls: type[_T], raw: Any, where: str = "") -> _T:  # noqa: ANN401 - JSON value
    """Convert a JSON value to `cls`, a dataclass of numbers, strings, booleans, tuples, mappings and such dataclasses.

    Raises ValueError that names the place, what was found and what was expected, also for missing and unknown keys. A
    whole number is accepted as a float. A boolean is not accepted as a number, nor is an infinite number or a NaN.
    """
    if not isinstance(raw, dict):
        raise ValueError(f"{where or 'the top'} is {shown(raw, 60)}, expected an object")
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    required = {
        name
        for name, field in fields.items()
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
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
