"""Reads what is the same in every config.json that transformers writes: the rotary embedding and the head sizes."""

from __future__ import annotations

from export.architecture import Architecture, ConfigReader
from export.errors import named, names, shown
from export.formats import methods

SCALED_ROTARY = "is not supported yet, and without it the logits would be wrong"


def read_rope(reader: ConfigReader, *keys: str) -> ConfigReader:
    """A reader of the keys `keys` of the rotary embedding. Every scaled rotary embedding is refused.

    transformers 5 writes these keys in the object rope_parameters, transformers 4 at the top of config.json.
    """
    _refuse_rotary_scaling(reader)
    rope = reader.nested("rope_parameters")
    reader.harmless(*keys)
    rope.require("rope_type", ["default"], absent="default")
    unknown = rope.overlaid - {*keys, "rope_type"}
    if unknown:
        reader.problem(
            f"rope_parameters holds {names(sorted(unknown))}, which moeship does not support for this family"
        )
    return rope


def _refuse_rotary_scaling(reader: ConfigReader) -> None:
    """Refuse a rope_scaling that scales. As in transformers, null, an empty object, and an object with the kind
    "default" alone do not scale."""
    scaling = reader.mapping("rope_scaling")
    if scaling:
        kind = scaling.get("rope_type") or scaling.get("type")
        more = sorted(set(scaling) - {"rope_type", "type"})
        if kind == "default":
            if more:
                reader.problem(f"rope_scaling of the kind 'default' holds {names(more)}, which is not supported there")
            if reader.mapping("rope_parameters"):
                reader.problem("rope_scaling and rope_parameters both set the rotary embedding; keep one of them")
            return
        reader.problem(f"rope_scaling is {shown(scaling)}: its kind, {shown(kind, 40)}, {SCALED_ROTARY}")


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
