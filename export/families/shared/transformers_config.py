"""Reads what is the same in every config.json that transformers writes: the rotary embedding and the head sizes."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from export import rotary
from export.architecture import MAX_LAYERS, MAX_POSITIONS, MAX_REAL, MIN_REAL, Architecture, ConfigReader
from export.errors import named, names, shown
from export.formats import methods
from export.rotary import RotaryScaling

logger = logging.getLogger(__name__)

_AT_THE_TOP = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
# Keys of every kind. Files of early yarn models say "finetuned", which nothing reads.
_OF_ANY_KIND = ("type", "rope_type", "rope_theta", "partial_rotary_factor", "finetuned")


@dataclass(frozen=True, kw_only=True)
class Rope:
    """The rotary embedding of a config.json. `positions` is the model's number of positions: max_position_embeddings,
    or less where more positions would need other tables."""

    base: float
    dim: int
    scaling: RotaryScaling | None
    positions: int


def read_rope(reader: ConfigReader, head_size: int, *, base: float, share: float | None = None) -> Rope:
    """Read the rotary embedding, in the spelling of transformers 4 (keys at the top, rope_scaling) or of transformers 5
    (rope_parameters). `base` and `share` are the class's own rope_theta and partial_rotary_factor; if `share` is None,
    the whole head turns and another factor is refused. Adds a problem for each value that is wrong or not built."""
    reader.harmless(*_AT_THE_TOP)
    most = reader.integer("max_position_embeddings", maximum=MAX_POSITIONS)
    older, newer = reader.mapping("rope_scaling"), reader.mapping("rope_parameters")
    if older and newer and older != newer:
        reader.problem("rope_scaling and rope_parameters both set the rotary embedding; keep one of them")
    values = rotary.parameters({**reader.raw, "rope_scaling": older, "rope_parameters": newer}, base, share)
    rope = reader.inside(values)
    part = rope.real("partial_rotary_factor", absent=1.0, maximum=1.0)
    if share is None and part != 1:
        reader.problem(f"partial_rotary_factor is {part:g}; this family turns the whole head")
    theta = rope.real("rope_theta", absent=base)
    key = rotary.kind_key(older or newer)
    scaling = _read_scaling(reader, rope, values, int(head_size * part), most, key)
    positions = most
    if scaling is not None and scaling.kind == "longrope" and most > scaling.original_positions:
        positions = scaling.original_positions
        logger.warning(
            "the rotary embedding (longrope) turns every position of a text of more than %d tokens in another way, so "
            "engines take %d of the model's %d positions", positions, positions, most,
        )  # fmt: skip
    return Rope(base=theta, dim=int(head_size * part), scaling=scaling, positions=positions)


def _read_scaling(
    reader: ConfigReader, rope: ConfigReader, values: Mapping[str, Any], width: int, most: int, key: str
) -> RotaryScaling | None:
    """The scaling that `values` state; `key` is the name that config.json has for its kind."""
    kind = values["rope_type"]
    if kind == "dynamic":
        reader.problem(
            f"{key} is 'dynamic': its frequencies change with the length of the text, also for tokens that are "
            "in the cache, and an engine has one table; take a model with another scaling"
        )
        return None
    if not isinstance(kind, str) or kind not in rotary.KEYS:
        reader.problem(f"{key} is {shown(kind, 40)}; moeship builds {', '.join(rotary.KEYS)}")
        return None
    if values.get("type", kind) != kind:
        reader.problem(f"rope_type is {shown(kind, 40)} and type is {shown(values['type'], 40)}; keep one of them")
    unused = [
        key for key, value in values.items() if key not in (*rotary.KEYS[kind], *_OF_ANY_KIND) and value is not None
    ]
    if unused:
        reader.problem(
            f"the rotary embedding of kind {kind!r} has {names(sorted(unused))}, which that kind does not read"
        )
    before = reader.number_of_problems
    _check_scaling(rope, values, kind, width)
    if unused or reader.number_of_problems > before:
        return None
    try:
        return rotary.scaling_of(values, most)
    except ValueError as error:
        reader.problem(str(error))
        return None


def _check_scaling(rope: ConfigReader, values: Mapping[str, Any], kind: str, width: int) -> None:
    """Add a problem for each value that a scaling cannot have."""
    for key in rotary.KEYS[kind]:
        value = values.get(key)
        if key in ("short_factor", "long_factor"):
            if not _is_factors(value, width // 2):
                rope.problem(f"{key} is {shown(value)}, expected {width // 2} positive numbers")
        elif key == "original_max_position_embeddings":
            rope.integer(key, minimum=2)
        elif key == "truncate":
            if key in values and not isinstance(value, bool):
                rope.problem(f"truncate is {shown(value)}, expected true or false")
        elif key == "factor" and value is None and key in values and kind in ("yarn", "longrope"):
            continue  # then it is the quotient of the two lengths
        elif key in ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim") and not value:
            if value is not None and (key == "attention_factor" or value != 0 or value is False):
                rope.problem(f"{key} is {shown(value)}, expected a positive number")
        elif key != "factor" or kind != "longrope" or key in values:
            rope.real(key)
    if kind == "yarn" and rope.real("rope_theta") == 1:
        rope.problem("rope_theta is 1, and a yarn takes its logarithm")


def _is_factors(value: object, number: int) -> bool:
    return (
        isinstance(value, list)
        and len(value) == number
        and all(type(item) in (int, float) and MIN_REAL <= item <= MAX_REAL for item in value)
    )


def read_dense_layers(reader: ConfigReader) -> dict[str, Any]:
    """Read the layers that have an MLP in place of experts, and its F, intermediate_size: the Architecture's
    `dense_layers` and `dense_ffn_size`. As in transformers' Qwen2MoeDecoderLayer, layer i has experts if i + 1 is a
    multiple of decoder_sparse_step and i is not in mlp_only_layers. Adds a problem for values that are wrong, and where
    no layer has experts."""
    step = reader.integer("decoder_sparse_step", absent=1)
    layers, listed = reader.raw.get("num_hidden_layers"), reader.raw.get("mlp_only_layers")
    reader.harmless("mlp_only_layers", "intermediate_size")
    if listed is not None and not (isinstance(listed, list) and all(type(item) is int for item in listed)):
        reader.problem(f"mlp_only_layers is {shown(listed)}, expected a list of layers")
        return {}
    if type(layers) is not int or not 1 <= layers <= MAX_LAYERS:  # told by the reader of this number
        return {}
    alone = set(listed or ())
    dense = tuple(layer for layer in range(layers) if (layer + 1) % step or layer in alone)
    if len(dense) == layers:
        reader.problem(
            f"by decoder_sparse_step {step} and mlp_only_layers {shown(listed)} none of {layers} layers has experts; "
            "expected one or more"
        )
    return {"dense_layers": dense, "dense_ffn_size": reader.integer("intermediate_size")} if dense else {}


_FIRST_WINDOWED, _WINDOW = 28, 4096  # of Qwen2Config and Qwen3Config, for a config.json without the keys
_SLIDING, _FULL = "sliding_attention", "full_attention"


def read_windows(reader: ConfigReader) -> dict[str, Any]:
    """Read which layers of a dense Qwen have a window of positions: the Architecture's `sliding_window` and
    `full_layers`. As in transformers' Qwen2Config, layers have one only with use_sliding_window, and then those that
    layer_types names, or those from max_window_layers on. Adds a problem for values that are wrong."""
    raw = reader.raw
    reader.require("use_sliding_window", [False, True], absent=False)
    reader.harmless("sliding_window", "max_window_layers")
    layers, types = raw.get("num_hidden_layers"), raw.get("layer_types")
    windowed = bool(raw.get("use_sliding_window")) and raw.get("sliding_window", _WINDOW) is not None
    if not windowed or type(layers) is not int or not 1 <= layers <= MAX_LAYERS:  # told by the reader of this number
        return {}
    window = reader.integer("sliding_window", absent=_WINDOW)
    first = reader.integer("max_window_layers", absent=_FIRST_WINDOWED, minimum=0)
    full: Collection[int] = range(min(first, layers))
    if types is not None:
        reader.harmless("layer_types")
        if not (isinstance(types, list) and len(types) == layers and all(one in (_SLIDING, _FULL) for one in types)):
            said = f"{_SLIDING} or {_FULL} for each of {layers} layers"
            reader.problem(f"layer_types is {shown(types, 80)}, expected {said}")
            return {}
        full = [layer for layer, one in enumerate(types) if one == _FULL]
    return {} if len(full) == layers else {"sliding_window": window, "full_layers": tuple(full)}


def windows_of(raw: Mapping[str, Any]) -> dict[str, Any]:
    """The window of a dense Qwen's layers and the layers without one, for the reference's network."""
    window = raw.get("sliding_window", _WINDOW) if raw.get("use_sliding_window") else None
    if window is None:
        return {}
    types, layers = raw.get("layer_types"), range(raw["num_hidden_layers"])
    first = raw.get("max_window_layers", _FIRST_WINDOWED)
    full = [layer for layer in layers if (layer < first if types is None else types[layer] == _FULL)]
    return {"sliding_window": window, "full_layers": full}


def refuse_quantized(reader: ConfigReader) -> None:
    """Refuse a config.json of weights that are stored quantised. Null or an empty object means that they are not."""
    for key in ("quantization_config", "compression_config"):
        value = reader.raw.get(key)
        fields = value if isinstance(value, dict) else {}
        method = fields.get("quant_method") or fields.get("quant_algo")
        reader.explain(
            key,
            f"the weights are quantised by {named(method, 40) if method else 'an unnamed method'}, which moeship does "
            f"not read; it reads {', '.join(methods())}, and the checkpoint as it was before quantisation",
        )


def tied_names(tied: bool, embedding: str, head: str, names: Collection[str]) -> tuple[str, str]:
    """The tensors of the checkpoint that hold the embedding and the head. If they are tied, the one that a checkpoint
    has serves for both; if it has both, each is itself, whatever config.json says (transformers, tie_weights)."""
    if not tied or (embedding in names and head in names):
        return embedding, head
    return (head, head) if head in names else (embedding, embedding)


def check_heads(reader: ConfigReader, architecture: Architecture) -> None:
    """Add a problem for each relation between head sizes that attention needs and that does not hold."""
    if architecture.num_heads % architecture.num_kv_heads:
        reader.problem(
            f"{architecture.num_heads} query heads are not a multiple of {architecture.num_kv_heads} key/value heads"
        )
    if architecture.rotary_dim % 2 or not 2 <= architecture.rotary_dim <= architecture.head_size:
        reader.problem(
            f"rotary dimension {architecture.rotary_dim}, expected an even number up to the head size "
            f"{architecture.head_size}"
        )
