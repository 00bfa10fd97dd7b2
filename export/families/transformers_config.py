"""What every config.json that transformers writes has in common: harmless keys, rotary facts, relations of heads."""

from __future__ import annotations

from export.architecture import Architecture, ConfigReader

# Keys that transformers' PretrainedConfig writes and that change nothing at inference.
HARMLESS_KEYS = (
    "architectures", "auto_map", "model_type", "attention_dropout", "initializer_range", "transformers_version",
    "use_cache", "_name_or_path", "pad_token_id", "chunk_size_feed_forward", "id2label", "label2id",
    "is_encoder_decoder", "output_attentions", "output_hidden_states", "problem_type", "return_dict",
)  # fmt: skip


def read_rope(reader: ConfigReader, *keys: str) -> ConfigReader:
    """A reader of the rotary facts `keys`, wherever they stand; every scaled rotary embedding is refused.

    transformers 5 nests them in rope_parameters, transformers 4 kept them at the top.
    """
    reader.require("rope_scaling", [None])
    rope = reader.nested("rope_parameters")
    reader.harmless(*keys)
    rope.require("rope_type", ["default"], absent="default")
    unknown = rope.overlaid - {*keys, "rope_type"}
    if unknown:
        reader.problem(f"rope_parameters holds {', '.join(sorted(unknown))}, which this family does not honour")
    return rope


def check_heads(reader: ConfigReader, architecture: Architecture) -> None:
    """Relations between dimensions that attention needs."""
    if architecture.num_heads % architecture.num_kv_heads:
        reader.problem(
            f"{architecture.num_heads} query heads do not divide among {architecture.num_kv_heads} key heads"
        )
    if architecture.rotary_dim % 2 or architecture.rotary_dim > architecture.head_size:
        reader.problem(
            f"rotary dimension {architecture.rotary_dim}, expected an even number up to the head size "
            f"{architecture.head_size}"
        )
