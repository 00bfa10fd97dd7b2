"""Recipes: how each matrix of a model is stored. A recipe is data; it is written into engine.json and read back.

    recipe = recipe_for("int4", PROVIDERS["cpu"])
    recipe.storage(spec)         # Storage(bits=4, block_size=64, ...), or None for a weight that is stored as floats

A recipe has a default and rules. A rule says which matrices it is for and which fields it changes; of several rules
the last one that matches wins, field by field. Router, norms and biases are never quantised.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from export.checkpoint.tensor_table import Role, TensorSpec
from export.errors import QuantizationError, named
from export.provider import PROVIDERS, Provider

FLOATS = "float"  # as bits: the matrix keeps the provider's float type
NEAREST, SEARCH, GPTQ = METHODS = ("nearest", "search", "gptq")
QUANTISED_ROLES = (Role.EMBEDDING, Role.ATTENTION, Role.FFN, Role.EXPERT, Role.HEAD)
_LAYER = re.compile(r"\.(\d+)\.")  # in a row's name
# Part of a layer -> the role and the letter of the input features of its matrices (the letters of TensorSpec).
_PARTS: Mapping[str, tuple[tuple[Role, ...], str]] = {
    "qkv": ((Role.ATTENTION,), "H"),
    "out": ((Role.ATTENTION,), "ND"),
    "first": ((Role.EXPERT, Role.FFN), "H"),
    "second": ((Role.EXPERT, Role.FFN), "F"),
}


@dataclass(frozen=True, kw_only=True)
class Storage:
    """How one matrix is stored. `block_size` neighbouring input features of a row share a scale; without `symmetric`
    they also have a zero point. `scales` is the dtype of the scales as they are stored. `method` chooses the codes:
    "nearest" rounds, "search" also looks for the scale with the least error, "gptq" minimises the error of the outputs
    over calibration text."""

    bits: int
    block_size: int
    symmetric: bool = True
    scales: str = "float16"
    method: str = SEARCH


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Fields of a Storage that a recipe states; None: not stated. `block` has the block sizes by preference: a matrix
    gets the first that its kernel has and that divides its input features. `scales` None: the kernel's dtype."""

    bits: int | str | None = None  # or FLOATS
    block: tuple[int, ...] | None = None
    symmetric: bool | None = None
    scales: str | None = None
    method: str | None = None

    def over(self, other: Choice) -> Choice:
        """This choice where it states a field, `other` where it does not."""
        stated = {name: value for name, value in vars(self).items() if value is not None}
        return replace(other, **stated)


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Which matrices a rule is for, and what it changes. An empty field matches every matrix. `weight` has parts of our
    rows' names, or the parts of a layer: qkv and out of attention, first and second of an expert or MLP. `layers` has
    numbers of layers; a negative number counts from the last layer, which is -1. A text "0-3" stands for
    the layers 0 to 3, and "1::3" for layer 1 and each third one after it."""

    role: tuple[str, ...] = ()
    weight: tuple[str, ...] = ()
    layers: tuple[int | str, ...] = ()
    choice: Choice = field(default_factory=Choice)

    def matches(self, spec: TensorSpec, num_layers: int) -> bool:
        """Whether the rule is for a row of the table of a model with so many layers."""
        if self.role and str(spec.role) not in self.role:
            return False
        if self.weight and not any(_is_named(spec, weight) for weight in self.weight):
            return False
        if not self.layers:
            return True
        layer = layer_of(spec.name)
        return layer is not None and any(_is_layer(layer, item, num_layers) for item in self.layers)

    @property
    def words(self) -> str:
        """What the rule is for, as in a recipe file."""
        parts = [(name, getattr(self, name)) for name in ("role", "weight", "layers")]
        return ", ".join(f"{name} {' or '.join(named(str(one), 40) for one in few[:8])}" for name, few in parts if few)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How each matrix of a model with `num_layers` layers is stored on a provider. The first `of_preset` rules are
    those of the preset that a recipe file begins from, and may match nothing. `accuracy_level` is the attribute of ONNX
    Runtime's MatMulNBits and QMoE operators. Level 4 allows the kernels to round activations to int8 in blocks, which
    makes them fast."""

    name: str  # a preset's name, or the recipe file's
    default: Choice
    rules: tuple[Rule, ...] = ()
    provider: Provider = PROVIDERS["cpu"]
    num_layers: int = 0
    of_preset: int = 0

    @property
    def quantises(self) -> bool:
        """Whether any matrix may be quantised."""
        return any(
            choice.bits not in (None, FLOATS) for choice in (self.default, *(rule.choice for rule in self.rules))
        )

    @property
    def accuracy_level(self) -> int:
        return self.provider.accuracy_level if self.quantises else 0

    def for_model(self, table: Iterable[TensorSpec]) -> Recipe:
        """The recipe for the rows of a model."""
        return replace(self, num_layers=1 + max((layer_of(spec.name) or 0 for spec in table), default=0))

    def with_method(self, method: str) -> Recipe:
        """The recipe with another method, but for rules that state one; itself if it has that method already."""
        if method == (self.default.method or SEARCH):
            return self
        return replace(self, default=replace(self.default, method=method))

    def check(self, table: Iterable[TensorSpec]) -> None:
        """Raise QuantizationError for a rule that matches no row, and for the first row whose storage its kernel does
        not have or whose input features no block size divides."""
        rows = [spec for spec in table if spec.role in QUANTISED_ROLES]
        for rule in self.rules[self.of_preset :]:
            if not any(rule.matches(spec, self.num_layers) for spec in rows):
                raise QuantizationError(
                    f"reading the recipe {named(self.name, 60)}: the rule for {rule.words} matches no matrix of this "
                    f"model, which has {_described(rows)}; mend the rule or take it out"
                )
        for spec in rows:
            self._check_row(spec)

    def _check_row(self, spec: TensorSpec) -> None:
        choice, offer = self.choice(spec), self.provider.offers(spec.role)
        if choice is None:
            return
        doing = f"quantising {spec.name} by the recipe {named(self.name, 60)}"
        whose = f"the kernel of {spec.role} weights, of {self.provider.kernels} on {self.provider.name},"
        stated = choice.block or ()
        if choice.bits not in offer.bits:
            raise QuantizationError(
                f"{doing}: found {choice.bits} bits, and {whose} has {', '.join(map(str, offer.bits))}; add a rule for "
                f"role: {spec.role}"
            )
        if not stated or not any(size in offer.block_sizes for size in stated):
            found = " or ".join(map(str, stated)) or "no block"
            raise QuantizationError(
                f"{doing}: found {found}, and {whose} has blocks of {', '.join(map(str, offer.block_sizes))}"
            )
        if choice.scales not in (None, offer.scales):
            raise QuantizationError(f"{doing}: found scales of {choice.scales}, and {whose} takes {offer.scales}")
        if choice.symmetric is False:
            raise QuantizationError(
                f"{doing}: found symmetric false, and no method chooses zero points; those of packed checkpoints are "
                "kept without it; leave symmetric out"
            )
        if not self.block_sizes(spec):
            fitting = [size for size in offer.block_sizes if spec.shape[-1] % size == 0]
            remedy = f"take blocks of {' or '.join(map(str, fitting))}" if fitting else "store it with bits: float"
            raise QuantizationError(
                f"{doing}: its {spec.shape[-1]} input features are not a multiple of {' or '.join(map(str, stated))}; "
                f"{remedy}"
            )

    def choice(self, spec: TensorSpec) -> Choice | None:
        """What the recipe states of a row; None if it is stored as floats."""
        if spec.role not in QUANTISED_ROLES:
            return None
        found = self.default
        for rule in self.rules:
            if rule.matches(spec, self.num_layers):
                found = rule.choice.over(found)
        return None if found.bits in (None, FLOATS) else found

    def block_sizes(self, spec: TensorSpec) -> tuple[int, ...]:
        """The block sizes that a quantised row may have, by preference; empty if none of the recipe's divides its input
        features."""
        choice = self.choice(spec)
        stated = (choice.block if choice else None) or ()
        return tuple(size for size in self._of_kernels(spec, stated) if spec.shape[-1] % size == 0)

    def storage(self, spec: TensorSpec) -> Storage | None:
        """How a row is stored; None: as floats. Raises QuantizationError if no block size fits."""
        choice = self.choice(spec)
        if choice is None:
            return None
        alone = spec.role is Role.EMBEDDING  # whose rows are read one by one, so that no errors meet
        sizes = self.block_sizes(spec)
        if not sizes:
            raise no_block_size(spec.name, [spec.shape[-1]], self._of_kernels(spec, choice.block or ()))
        return Storage(
            bits=int(choice.bits or 0),
            block_size=sizes[0],
            symmetric=choice.symmetric is not False,
            scales=choice.scales or self.provider.offers(spec.role).scales,
            method=SEARCH if alone and choice.method == GPTQ else choice.method or SEARCH,
        )

    def _of_kernels(self, spec: TensorSpec, sizes: Sequence[int]) -> tuple[int, ...]:
        offered = self.provider.offers(spec.role).block_sizes
        return tuple(size for size in sizes if size in offered)

    def to_json(self) -> dict[str, Any]:
        """The recipe as plain JSON values, as in a recipe file."""
        rules = [
            {**{name: list(value) for name in ("role", "weight", "layers") if (value := getattr(rule, name))},
             **_stated(rule.choice)}
            for rule in self.rules
        ]  # fmt: skip
        return {"name": self.name, "default": _stated(self.default), **({"rules": rules} if rules else {})}


def _described(rows: Sequence[TensorSpec]) -> str:
    """The roles and layers of rows, and the parts of a layer that can be named."""
    roles = dict.fromkeys(str(spec.role) for spec in rows)
    parts = [part for part in _PARTS if any(_is_named(spec, part) for spec in rows)]
    last = max((layer_of(spec.name) or 0 for spec in rows), default=0)
    return f"the roles {', '.join(roles)}, the weights {', '.join(parts)} and the layers 0 to {last}"


def layer_of(name: str) -> int | None:
    """The layer that a row's name belongs to; None if it belongs to none."""
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def no_block_size(name: str, features: Sequence[int], sizes: Sequence[int]) -> QuantizationError:
    """The error for a matrix whose input features no block size divides. `features` has those of all matrices that must
    have the same block size."""
    return QuantizationError(
        f"quantising {name}: {' and '.join(map(str, features))} input features are not a multiple of any block size "
        f"that the kernels take ({', '.join(map(str, sizes))}); build it without blocks: with --provider cpu "
        "--precision fp32 or --provider cuda --precision fp16, and without --kernels"
    )


def _stated(choice: Choice) -> dict[str, Any]:
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in asdict(choice).items()
        if value is not None
    }


def _is_layer(layer: int, item: int | str, num_layers: int) -> bool:
    if isinstance(item, str) and "::" in item:
        first, step = map(int, item.split("::"))
        return layer >= first and (layer - first) % step == 0
    if isinstance(item, str):
        first, last = map(int, item.split("-"))
        return first <= layer <= last
    return layer == (item if item >= 0 else num_layers + item)


def _is_named(spec: TensorSpec, weight: str) -> bool:
    if weight not in _PARTS:
        return weight in spec.name
    roles, letter = _PARTS[weight]
    return spec.role in roles and spec.letters.split()[-1] == letter
