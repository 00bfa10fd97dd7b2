"""The `Architecture` record of a decoder's sizes and constants, and the strict reader of config.json that fills it.

Letters used throughout the project: B batch, S new tokens, P past tokens, T = B*S, H hidden, N query heads,
G key/value heads, D head size, E experts, K experts per token, F expert width, V vocabulary, L layers, C cache length.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from export.config_keys.rules import FamilyKeys, contradictions, judge, resolved
from export.errors import ConfigError, listing, named, names, shown, with_article
from export.rotary import RotaryScaling

logger = logging.getLogger(__name__)

MAX_DIMENSION = 1 << 24  # far above any model's size, and low enough that a mistyped digit cannot exhaust memory
MAX_LAYERS = 1 << 14
MAX_EXPERTS = 1 << 12  # the experts of a layer are compared with each other, pair by pair
# Smallest and largest accepted number: in float32, as the kernels get it, a smaller one is 0 and a larger one infinite.
MIN_REAL, MAX_REAL = 2.0**-126, 3.4e38

NORMED_OVER = ("width", "head")  # what a norm of queries and of keys can be over
SCORES = ("softmax", "sigmoid", "sparse_mixer")  # how a router turns logits into scores
MAX_UNREAD = 1000  # limit on keys that nobody reads: each is compared with those that are read
MAX_LISTED = 12  # number of unknown keys that an error names
MAX_POSITIONS = 1 << 20  # limit on positions: every graph holds rotary tables with one row a position


def _check_real(name: str, value: float) -> None:
    if not MIN_REAL <= value <= MAX_REAL:
        raise ValueError(f"{name} is {value}, expected a positive number of float32's range")


@dataclass(frozen=True, kw_only=True)
class Router:
    """How a mixture chooses K experts by their logits, and which weights it gives them.

    `score` is the function that turns the logits into scores: "softmax" or "sigmoid". The K experts with the largest
    scores are chosen. With `bias`, a vector is added to the scores for this choice only. With several `groups`, only
    experts of the best groups can be chosen. An expert's weight is its score without the vector; if `normalise` is
    set, it is divided by the sum of the chosen experts' scores. At last it is multiplied by `scale`.

    The score "sparse_mixer" has K = 2. The weight of the expert with the largest logit m is its value in the softmax
    over the experts whose logit l is near it: (m - l) / max(|l|, m) is at most twice `jitter`. The weight of the second
    is its value in the same softmax without the first, where m is the second's logit. Source: Liu et al., GRIN:
    GRadient-INformed MoE, 2024, and transformers, models/phimoe, in inference.
    Raises ValueError for an unknown score, and for a scale, jitter or number of groups out of range.
    """

    score: str = "softmax"
    normalise: bool = True
    scale: float = 1.0
    groups: int = 1
    bias: bool = False
    jitter: float | None = None  # of "sparse_mixer"

    def __post_init__(self) -> None:
        if self.score not in SCORES:
            raise ValueError(f"score is {shown(self.score)}, expected {' or '.join(SCORES)}")
        _check_real("scale", self.scale)
        if (self.jitter is not None) != (self.score == "sparse_mixer"):
            raise ValueError(f"jitter is {shown(self.jitter)} of the score {self.score}; sparse_mixer alone has one")
        if self.jitter is not None:
            _check_real("jitter", self.jitter)
        if not 1 <= self.groups <= MAX_EXPERTS:
            raise ValueError(f"groups is {shown(self.groups)}, which no router has")

    @property
    def reads_chosen_logits_alone(self) -> bool:
        """Whether the K largest logits alone decide the choice and the weights: the other experts do nothing."""
        return self.normalise and self.groups == 1 and not self.bias


@dataclass(frozen=True, kw_only=True)
class Scales:
    """Constant factors of a network. Each field is named after the values that are multiplied: `embedding` the rows of
    the embedding, `residual` the outputs of attention and of MLP or mixture before they are added to the residual,
    `attention` the products of query and key (None: 1/sqrt(D)). The logits are divided by `logits`.
    Raises ValueError for a factor that is not a positive number in float32's range."""

    embedding: float = 1.0
    residual: float = 1.0
    attention: float | None = None
    logits: float = 1.0

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value is not None:
                _check_real(field.name, value)


@dataclass(frozen=True, kw_only=True)
class QueryKeyValue:
    """What becomes of queries, keys and values before the rotary embedding. `norm` "width": an RMSNorm over all heads
    of the queries together, [N*D], and one over those of the keys, [G*D], each with factors of its own. `norm` "head":
    an RMSNorm over each head of the queries, whose factors [D] are the same for all heads, and one over each head of
    the keys (None: no norm).
    `clip`: then each value of queries, keys and values is held within -clip and clip (None: as it is).
    Raises ValueError for another norm, and for a clip that is not a positive number in float32's range."""

    norm: str | None = None
    clip: float | None = None

    def __post_init__(self) -> None:
        if self.norm is not None and self.norm not in NORMED_OVER:
            raise ValueError(f"norm is {shown(self.norm)}, expected {' or '.join(NORMED_OVER)}")
        if self.clip is not None:
            _check_real("clip", self.clip)

    @property
    def is_plain(self) -> bool:
        """Whether queries, keys and values stay as they are."""
        return self.norm is None and self.clip is None


@dataclass(frozen=True, kw_only=True)
class SwiGlu:
    """The activation of a gated expert: gate * sigmoid(`alpha` * gate) * (up + `beta`). With a `limit` gate is held at
    most at the limit and up within -limit and limit before that (None: both stay).
    Raises ValueError for an alpha or a limit that is not a positive number in float32's range, and for a beta outside
    that range."""

    alpha: float = 1.0
    beta: float = 0.0
    limit: float | None = None

    def __post_init__(self) -> None:
        _check_real("alpha", self.alpha)
        if not abs(self.beta) <= MAX_REAL:
            raise ValueError(f"beta is {self.beta}, expected a number of float32's range")
        if self.limit is not None:
            _check_real("limit", self.limit)

    @property
    def described(self) -> str:
        """The activation in words, for `moeship inspect`."""
        limits = "" if self.limit is None else f", gate and up limited by {self.limit:g}"
        return f"gate * sigmoid({self.alpha:g} * gate) * (up + {self.beta:g}){limits}"

    @property
    def finite_limit(self) -> float:
        """The limit as kernels take it: infinity for none."""
        return math.inf if self.limit is None else self.limit


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """Sizes and constants of one decoder. `num_experts` is 0 for a dense model. Raises ValueError for a size out of
    range, whichever file it comes from."""

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
    source_dtype: str | None  # dtype that config.json states; the stored tensors may have another, which counts
    rotary_scaling: RotaryScaling | None = None
    sliding_window: int | None = None  # number of positions a token attends to, its own included; None for all
    tied_head: bool = False  # whether the head uses the embedding's matrix
    full_layers: tuple[int, ...] = ()  # in a model with a sliding window, the layers that attend to all positions
    attention_bias: bool = False  # whether attention's matrices have biases, all four
    head_bias: bool = False
    dense_layers: tuple[int, ...] = ()  # in a model with experts, the layers that have one MLP instead of a mixture
    dense_ffn_size: int | None = None  # F of the MLP of `dense_layers`; None: that of an expert
    shared_ffn_size: int | None = None  # F of an MLP beside each mixture, for all tokens; None: there is none
    router: Router = Router()
    scales: Scales = Scales()
    qkv: QueryKeyValue = QueryKeyValue()
    swiglu: SwiGlu = SwiGlu()
    # export/tokenizer/settings.py reads the begin and end tokens, since several files can state them.
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        most = {"num_layers": MAX_LAYERS, "num_experts": MAX_EXPERTS, "max_positions": MAX_POSITIONS}
        least = {"num_experts": 0, "experts_per_token": 0, "bos_token_id": 0, "rotary_dim": 0}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, float):
                _check_real(field.name, value)
            if isinstance(value, bool) or not isinstance(value, int):
                continue
            if not least.get(field.name, 1) <= value <= most.get(field.name, MAX_DIMENSION):
                raise ValueError(f"{field.name} is {shown(value)}, which no model has")
        if not all(map(is_token_id, self.eos_token_ids)):
            raise ValueError(f"eos_token_ids is {shown(self.eos_token_ids)}, expected token ids")

        for name in ("dense_layers", "full_layers"):
            layers = getattr(self, name)
            if not all(0 <= layer < self.num_layers for layer in layers):
                raise ValueError(f"{name} is {shown(layers)}, expected layers below {self.num_layers}")

    @property
    def num_mixtures(self) -> int:
        """Number of layers that have experts."""
        return len(self.mixture_layers)

    @property
    def mixture_layers(self) -> tuple[int, ...]:
        """The layers that have experts."""
        return tuple(layer for layer in range(self.num_layers) if self.is_moe and layer not in self.dense_layers)

    def window(self, layer: int) -> int | None:
        """The number of positions that a layer's tokens attend to, their own included; None for all."""
        return None if layer in self.full_layers else self.sliding_window

    @property
    def attention_scale(self) -> float:
        """The factor by which the products of query and key are multiplied."""
        return 1 / math.sqrt(self.head_size) if self.scales.attention is None else self.scales.attention

    @property
    def qkv_rows(self) -> tuple[int, int, int]:
        """Numbers of rows of query, key and value in a matrix that stacks all three."""
        keys = self.num_kv_heads * self.head_size
        return self.num_heads * self.head_size, keys, keys

    @property
    def is_moe(self) -> bool:
        return self.num_experts > 0


def is_token_id(value: Any) -> bool:  # noqa: ANN401 - JSON value
    """Whether a JSON value is a whole number from 0 to MAX_DIMENSION, so that it can be a token id."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= MAX_DIMENSION


class ConfigReader:
    """Reads a raw config.json so that every key is used, known to change nothing, or refused by name. `keys` are those
    of the family's configuration class; export/config_keys/rules.py decides about each key that nobody reads.

    Problems are collected; `finish` raises one ConfigError that lists them all.
    """

    def __init__(self, raw: Mapping[str, Any], family: str, keys: FamilyKeys) -> None:
        self.raw = resolved(raw, keys)
        self._written = raw
        self._family = family
        self._keys = keys
        self._seen: set[str] = set(keys.aliases)
        self._problems: list[str] = contradictions(raw, keys)
        self._notes: dict[str, str] = {}

    def inside(self, values: Mapping[str, Any]) -> ConfigReader:
        """A reader of a nested object. Its problems are added to the problems of this reader."""
        reader = ConfigReader(values, self._family, self._keys)
        reader._problems = self._problems
        return reader

    def spelled(self, key: str) -> str:
        """The name that config.json has for a key: the key, or another name that the family's class takes for it."""
        if key in self._written:
            return key
        others = (alias for alias, target in self._keys.aliases.items() if target == key and alias in self._written)
        return next(others, key)

    def integer(
        self,
        key: str,
        *,
        absent: int | None = None,
        null: int | None = None,
        minimum: int = 1,
        maximum: int = MAX_DIMENSION,
    ) -> int:
        """Read a whole number from `minimum` to `maximum`. `absent` is the value that transformers' config class has
        for a missing key, `null` the value for null. Where that is None, such a key is refused."""
        value = self._value(key, absent, null)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            self._problems.append(
                f"{self.spelled(key)} is {shown(value)}, expected a whole number of {minimum} to {maximum}"
            )
            return minimum
        return value

    def real(self, key: str, *, absent: float | None = None, maximum: float = MAX_REAL) -> float:
        """Read a positive number that float32 can hold. `absent` is the default for a missing key; null is refused."""
        value = self._value(key, absent, None)
        if isinstance(value, bool) or not isinstance(value, int | float) or not MIN_REAL <= value <= maximum:
            most = "" if maximum == MAX_REAL else f" of at most {maximum:g}"
            self._problems.append(f"{self.spelled(key)} is {shown(value)}, expected a positive, finite number{most}")
            return 1.0
        return float(value)

    def text(self, key: str) -> str | None:
        self._seen.add(key)
        value = self.raw.get(key)
        return value if isinstance(value, str) else None

    def mapping(self, key: str) -> Mapping[str, Any]:
        """Read a nested object; empty when the key is missing or null."""
        self._seen.add(key)
        value = self.raw.get(key)
        if value is not None and not isinstance(value, dict):
            self._problems.append(f"{self.spelled(key)} is {shown(value)}, expected an object")
        return value if isinstance(value, dict) else {}

    def require(self, key: str, allowed: Iterable[Any], *, absent: Any = None) -> None:  # noqa: ANN401 - JSON value
        """Refuse a key whose value is not one of `allowed`. A missing or null key counts as the value `absent`."""
        allowed = list(allowed)
        value = self._value(key, absent, absent)
        if value not in allowed:
            built = " or ".join(map(repr, allowed))
            self._problems.append(f"{self.spelled(key)} is {shown(value)}; moeship builds only {built}")

    def harmless(self, *keys: str) -> None:
        """Accept keys that this family does not read with any value."""
        self._seen.update(keys)

    @property
    def number_of_problems(self) -> int:
        return len(self._problems)

    def problem(self, text: str) -> None:
        self._problems.append(text)

    def explain(self, key: str, note: str) -> None:
        """Set the reason that the error gives if a key is not honoured. The value null or {} is accepted like a
        missing key."""
        self._notes[key] = note
        if self.raw.get(key) in (None, {}):
            self._seen.add(key)

    def finish(self) -> None:
        """Raise one ConfigError that lists all problems and every key that is refused; return if there are none. One
        warning names the keys that are ignored because nobody knows them."""
        refused, ignored = self._judged()
        self._problems += [f"{named(key, 60)} = {shown(self.raw[key])} {refused[key]}" for key in refused][:MAX_LISTED]
        if len(refused) > MAX_LISTED:
            self._problems.append(f"and {len(refused) - MAX_LISTED} more such keys")
        if self._problems:
            raise ConfigError(
                f"reading config.json of {with_article(self._family)} checkpoint: moeship refuses keys and values that "
                "it does not support. Correct those that are misspelled or damaged. Leave the others in place: they "
                "describe the weights, and without them another model would be built:"
                f"{listing(self._problems, 2 * MAX_LISTED)}"
            )
        if ignored:
            logger.warning("config.json has keys that %s and moeship ignore: %s", self._keys.source, names(ignored))

    def _judged(self) -> tuple[dict[str, str], list[str]]:
        """The keys that were never read: key -> problem of the refused ones, and the keys that a warning names."""
        refused: dict[str, str] = {}
        ignored: list[str] = []
        used = frozenset(self._seen)
        unread = sorted(set(self.raw) - used)
        if len(unread) > MAX_UNREAD:
            self._problems.append(f"{len(unread)} keys that no reader knows; is this the config.json of a model?")
            return refused, ignored
        for key in unread:
            if key in self._notes:
                refused[key] = f"is a key that moeship does not support for this family: {self._notes[key]}"
                continue
            verdict = judge(key, self.raw[key], self.raw, self._keys, used)
            if verdict.problem:
                refused[key] = verdict.problem
            elif verdict.noted:
                ignored.append(key)
        return refused, ignored

    def _value(self, key: str, absent: Any, null: Any) -> Any:  # noqa: ANN401 - JSON value
        self._seen.add(key)
        value = self.raw.get(key, absent)
        if value is not None or key not in self.raw:
            return value
        if null is None and absent is not None:
            self._problems.append(
                f"{self.spelled(key)} is null, and transformers has no default for it; write a number"
            )
            return absent
        return null
