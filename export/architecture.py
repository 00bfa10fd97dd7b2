"""What a decoder's configuration says, in the field's words, and the strict reader that turns config.json into it.

Letters used throughout the project: B batch, S new tokens, P past tokens, T = B*S, H hidden, N query heads,
G key/value heads, D head size, E experts, K experts per token, F expert width, V vocabulary, L layers, C cache length.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from export.errors import ConfigError, listing

MAX_DIMENSION = 1 << 24  # far above any model's, far below what would exhaust memory by a slip of a digit

MAX_POSITIONS = 1 << 20  # the rotary tables of as many positions are written into every graph


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The facts of one decoder. `num_experts` is 0 for a dense model."""

    family: str
    hidden_size: int  # H
    num_layers: int  # L
    num_heads: int  # N
    num_kv_heads: int  # G
    head_size: int  # D
    ffn_size: int  # F, of one expert
    vocab_size: int  # V
    num_experts: int  # E
    experts_per_token: int  # K
    rotary_dim: int
    rope_base: float
    norm_epsilon: float
    max_positions: int
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    source_dtype: str | None  # what the config claims; the tensors themselves decide
    sliding_window: int | None = None  # positions that attention looks back on, its own included; None for all
    tied_head: bool = False  # the head is the embedding

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 0


def is_token_id(value: Any) -> bool:  # noqa: ANN401 - JSON value
    """Whether a JSON value is a whole number that can count rows of a vocabulary."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_DIMENSION


class ConfigReader:
    """Reads a raw config.json so that every key is used, listed as harmless, or refused by name.

    Problems are collected; `finish` raises one ConfigError that lists them all.
    """

    def __init__(self, raw: Mapping[str, Any], family: str) -> None:
        self._raw = raw
        self._family = family
        self._seen: set[str] = set()
        self._problems: list[str] = []
        self.overlaid: frozenset[str] = frozenset()  # keys that a nested object laid over the rest

    def nested(self, key: str) -> ConfigReader:
        """A reader of this config with the keys of a nested object laid over it; its problems are this reader's."""
        nested = self.mapping(key)
        reader = ConfigReader({**self._raw, **nested}, self._family)
        reader._problems = self._problems
        reader.overlaid = frozenset(nested)
        return reader

    def integer(self, key: str, *, absent: int | None = None, minimum: int = 1, maximum: int = MAX_DIMENSION) -> int:
        """A whole number in its range. `absent` is the value upstream's config class gives a missing or null key."""
        value = self._value(key, absent)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            self._problems.append(f"{key} is {value!r}, expected a whole number of {minimum} to {maximum}")
            return minimum
        return value

    def real(self, key: str, *, absent: float | None = None) -> float:
        """A positive number. `absent` as for `integer`."""
        value = self._value(key, absent)
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            self._problems.append(f"{key} is {value!r}, expected a positive, finite number")
            return 1.0
        return float(value)

    def text(self, key: str) -> str | None:
        self._seen.add(key)
        value = self._raw.get(key)
        return value if isinstance(value, str) else None

    def token_ids(self, key: str) -> tuple[int, ...]:
        """Zero, one or several token ids."""
        self._seen.add(key)
        value = self._raw.get(key)
        ids = [] if value is None else value if isinstance(value, list) else [value]
        if not all(is_token_id(item) for item in ids):
            self._problems.append(f"{key} is {value!r}, expected a token id or a list of them")
            return ()
        return tuple(ids)

    def mapping(self, key: str) -> Mapping[str, Any]:
        """A nested object; empty when the key is missing or null."""
        self._seen.add(key)
        value = self._raw.get(key)
        if value is not None and not isinstance(value, dict):
            self._problems.append(f"{key} is {value!r}, expected an object")
        return value if isinstance(value, dict) else {}

    def require(self, key: str, allowed: Iterable[Any], *, absent: Any = None) -> None:  # noqa: ANN401 - JSON value
        """The key may be missing only if `absent` is allowed; any other value is refused."""
        allowed = list(allowed)
        value = self._value(key, absent)
        if value not in allowed:
            self._problems.append(f"{key} is {value!r}; moeship builds only {' or '.join(map(repr, allowed))}")

    def harmless(self, *keys: str) -> None:
        """Keys that change nothing at inference."""
        self._seen.update(keys)

    def problem(self, text: str) -> None:
        self._problems.append(text)

    def finish(self) -> None:
        for key in sorted(set(self._raw) - self._seen):
            near = difflib.get_close_matches(key, self._seen, n=1)
            hint = f" (did you mean {near[0]}?)" if near else ""
            self._problems.append(f"{key} = {self._raw[key]!r} is not a key this family honours{hint}")
        if self._problems:
            raise ConfigError(
                f"reading config.json of a {self._family} checkpoint: moeship builds only what it understands; "
                f"correct or remove:{listing(self._problems)}"
            )

    def _value(self, key: str, absent: Any) -> Any:  # noqa: ANN401 - JSON value
        self._seen.add(key)
        value = self._raw.get(key)
        return absent if value is None else value
