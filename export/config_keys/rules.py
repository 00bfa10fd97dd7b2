"""Decides about each key of config.json that a family's reader does not use: accept it, or refuse it by name.

transformers turns every key into an attribute of its configuration object and then ignores those that its code never
looks up. The judge of a key is therefore transformers' own code, read into `transformers_keys.py`, in this order:

1. Keys of bookkeeping (ANY_VALUE) are accepted with any value. They describe where a model comes from, how it was
   trained, what a call returns, which kernels compute, or how tokens are drawn. A test changes each of
   them and compares the logits of transformers (tests/export/test_config_keys.py).
2. Keys that transformers looks up for this family, and names of its configuration class, are accepted only with a value
   that changes nothing: null or the default. Any other value is refused: it would change numbers.
3. transformers ignores all other keys. A value that says nothing (null, false, 0, an empty object) is accepted.
4. Of the rest, a key is refused that is spelled almost like one which changes numbers, since it is probably a slip, or
   whose name has a word such as "rope" or "norm", since it probably says something about the network that another
   program honours. transformers would ignore it, but a wrong model is worse than a refused one.
5. What remains is accepted, and one warning names it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from export.config_keys.transformers_keys import (
    ALIASES,
    ATTRIBUTES,
    FIELDS,
    GENERATION,
    LOOKED_UP,
    VERSION,
)
from export.errors import shown

_TOLERANCE = 0.8  # similarity, by difflib, from which a key counts as misspelled
_MOST_LAYERS = 1 << 14
_LONGEST_KEY = 64  # characters; a similar spelling is searched in quadratic time
_IDENTITY = (
    "architectures", "auto_map", "model_type", "transformers_version", "_name_or_path", "name_or_path", "_commit_hash",
    "tokenizer_class", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id", "decoder_start_token_id",
    "dtype", "torch_dtype", "prefix", "task_specific_params", "finetuning_task",
)  # fmt: skip
_TRAINING = (
    "attention_dropout", "attn_pdrop", "embd_pdrop", "resid_pdrop", "hidden_dropout", "initializer_range",
    "initializer_factor",
    "gradient_checkpointing", "router_aux_loss_coef", "router_jitter_noise", "output_router_logits", "tf_legacy_loss",
    "id2label", "label2id", "num_labels", "problem_type", "classifier_dropout",
)  # fmt: skip
_CALLING = (
    "use_cache", "return_dict", "output_attentions", "_output_attentions", "output_hidden_states",
    "chunk_size_feed_forward", "torchscript", "use_bfloat16", "tie_encoder_decoder", "is_decoder",
    "cross_attention_hidden_size",
)  # fmt: skip
_KERNELS = (
    "_attn_implementation", "_attn_implementation_internal", "_attn_implementation_autoset", "attn_implementation",
    "_experts_implementation", "_experts_implementation_internal", "experts_implementation", "_flash_attn_2_enabled",
    "flash_attn", "flash_rotary", "fused_dense", "use_flash_attn", "use_flash_attention", "use_flash_attention_2",
    "pretraining_tp",
)  # fmt: skip
ANY_VALUE = frozenset((*_IDENTITY, *_TRAINING, *_CALLING, *_KERNELS, *GENERATION))
# Keys with one value that changes nothing, where that is not null. transformers 4 turned rotary embedding off in a
# granitemoe whose position_embedding_type is "nope"; transformers 5 ignores the key.
_ONLY = {"is_causal": True, "is_encoder_decoder": False, "position_embedding_type": "rope"}
# transformers 4 changed the network by these; transformers 5 ignores them.
_FORMERLY = frozenset(("pruned_heads", "add_cross_attention"))
_FILES = frozenset(("configuration_files",))  # read from the raw file: another file replaces config.json
_WORDS = frozenset(
    (
        "act", "activation", "alibi", "attention", "attn", "bias", "bits", "embedding", "embeddings", "eps",
        "epsilon", "expert", "experts", "factor", "ffn", "gate", "head", "heads", "hidden", "kv", "layernorm", "logit",
        "logits", "mlp", "moe", "mscale", "multiplier", "norm", "pos", "position", "positional", "positions", "quant",
        "quantization", "quantized", "residual", "rms", "rmsnorm", "rope", "rotary", "router", "routing", "scale",
        "scaled", "scaling", "shared", "sliding", "softcap", "softcapping", "theta", "window", "yarn",
    )
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class FamilyKeys:
    """What a family's configuration class does with keys. `fields`: key -> default. `looked_up`: other names that the
    code of the model looks up. `aliases`: key -> the key that it sets instead. `source`: whose class it is."""

    source: str
    fields: Mapping[str, Any]
    looked_up: frozenset[str] = frozenset()
    aliases: Mapping[str, str] = field(default_factory=dict)


def transformers_keys(name: str) -> FamilyKeys:
    """What the configuration class `name` of transformers does with keys."""
    return FamilyKeys(
        source=f"transformers {VERSION}",
        fields=FIELDS[name],
        looked_up=LOOKED_UP | ATTRIBUTES | _FILES,
        aliases=ALIASES[name],
    )


# Source: configuration_phi.py and modeling_phi.py as published with mlabonne/phixtral-4x2_8 and, before its move into
# transformers, with microsoft/phi-2. The base class of transformers is the same as that of the other families.
PHI_MSFT = FamilyKeys(
    source="the published configuration_phi.py",
    fields={
        "vocab_size": 51200, "n_positions": 2048, "n_embd": 1024, "n_layer": 20, "n_inner": None, "n_head": 16,
        "n_head_kv": None, "rotary_dim": 32, "activation_function": "gelu_new", "flash_attn": False,
        "flash_rotary": False, "fused_dense": False, "attn_pdrop": 0.0, "embd_pdrop": 0.0, "resid_pdrop": 0.0,
        "layer_norm_epsilon": 1e-5, "initializer_range": 0.02, "tie_word_embeddings": False,
        "num_local_experts": 4, "num_experts_per_tok": 2, "is_encoder_decoder": False,
    },
    looked_up=LOOKED_UP | ATTRIBUTES | _FILES | {"architecture", "blocks", "embd_layer"},
    aliases={
        "max_position_embeddings": "n_positions", "hidden_size": "n_embd", "num_attention_heads": "n_head",
        "num_hidden_layers": "n_layer",
    },
)  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """What becomes of a key: refused with `problem`, or accepted; then `noted` says whether a warning names it."""

    problem: str | None = None
    noted: bool = False


def judge(key: str, value: object, raw: Mapping[str, Any], keys: FamilyKeys, used: Iterable[str]) -> Verdict:
    """Decide about a key of config.json `raw` that the reader of its family does not use. `used`: the keys that it
    uses. The problem of a refused key is the end of a sentence that begins with the key and its value."""
    if key in ANY_VALUE:
        return Verdict()
    if key in keys.fields or key in keys.looked_up or key in _ONLY or key in _FORMERLY or key.startswith("__"):
        return Verdict() if _changes_nothing(key, value, raw, keys) else Verdict(_honoured(key, keys))
    if _says_nothing(value) or "dropout" in key or "pdrop" in key:
        return Verdict()
    if len(key) > _LONGEST_KEY:
        return Verdict("is a key that moeship does not support for this family: its name is too long to be one")
    near = _misspelled(key, {*used, *keys.fields, *keys.looked_up, *keys.aliases} - ANY_VALUE)
    if near:
        return Verdict(f"is a key that moeship does not support for this family (did you mean {near}?)")
    word = next((word for word in re.split(r"[^a-z]+", key.lower()) if word in _WORDS), None)
    if word:
        return Verdict(
            f"is a key that moeship does not support for this family: {keys.source} ignores it, but by the word "
            f"{word!r} in its name it may change numbers elsewhere"
        )
    return Verdict(noted=True)


def _honoured(key: str, keys: FamilyKeys) -> str:
    only = f"; only {shown(_ONLY[key])} is supported" if key in _ONLY else ""
    return f"is a key that moeship does not support for this family: it can change what {keys.source} computes{only}"


def _changes_nothing(key: str, value: object, raw: Mapping[str, Any], keys: FamilyKeys) -> bool:
    """Whether a key that the family's class honours has a value by which it changes nothing."""
    if key in _ONLY:
        return type(value) is type(_ONLY[key]) and value == _ONLY[key]
    if key in _FORMERLY:
        return _says_nothing(value)
    if key == "layer_types":
        layers = raw.get("num_hidden_layers")
        return value is None or (isinstance(layers, int) and value == ["full_attention"] * min(layers, _MOST_LAYERS))
    if key in ATTRIBUTES and key not in ("per_layer_config", "base_model_tp_plan", "base_model_pp_plan"):
        return False
    return value is None or value == {} or (key in keys.fields and value == keys.fields[key])


def _says_nothing(value: object) -> bool:
    return value is None or value is False or (isinstance(value, str | list | dict | int | float) and not value)


def _misspelled(key: str, known: Iterable[str]) -> str | None:
    words = [word for word in known if not word.startswith("_") and word != key]
    return next(iter(difflib.get_close_matches(key, sorted(words), n=1, cutoff=_TOLERANCE)), None)


def resolved(raw: Mapping[str, Any], keys: FamilyKeys) -> Mapping[str, Any]:
    """A config.json in which a key with two names has the name of the field."""
    found = {target: raw[alias] for alias, target in keys.aliases.items() if alias in raw and target not in raw}
    return {**raw, **found}


def contradictions(raw: Mapping[str, Any], keys: FamilyKeys) -> list[str]:
    """A problem for each key of config.json that has two names with different values."""
    return [
        f"{alias} is {shown(raw[alias])} and {target} is {shown(raw[target])}, but {keys.source} takes both for one "
        "key; keep the right one"
        for alias, target in keys.aliases.items()
        if alias in raw and target in raw and raw[alias] != raw[target]
    ]
