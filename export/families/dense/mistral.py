"""Dense Mistral: `export.families.shared.llama_stack` with an MLP, and a window of positions that a token attends to.

Tensors have the names of transformers' MistralForCausalLM. Where config.json has no sliding_window, the window is the
4096 positions of transformers' MistralConfig; where sliding_window is null, there is none. A config.json with
layer_types is a Ministral to transformers: its layers of full_attention have no window, whatever sliding_window says,
and those of sliding_attention have it. Layers of both types are refused. Several of these models are merged into a
Mixtral (export/merge).
Source: transformers, models/mistral, models/ministral and models/auto/configuration_auto.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from export.architecture import Architecture, ConfigReader
from export.config_keys.rules import transformers_keys
from export.families import Family
from export.families.shared.llama_stack import (
    BASE_MODULES,
    dense_tensors,
    layer_name,
    read_stack_config,
    stack_graph,
    stack_head,
    stack_network,
)
from export.families.shared.network import Network

_WINDOW = 4096  # of MistralConfig, for a config.json without the key


def matches(config: Mapping[str, Any]) -> bool:
    return config.get("model_type") == "mistral"


def read_config(raw: Mapping[str, Any]) -> Architecture:
    """Read the Architecture from a Mistral config.json. Missing keys have the defaults of transformers' MistralConfig.
    Raises ConfigError."""
    reader = ConfigReader(raw, "mistral", transformers_keys("MistralConfig"))
    reader.harmless("sliding_window")
    if _all_slide(raw):
        reader.harmless("layer_types")
    return read_stack_config(
        reader,
        "mistral",
        rope_base=1e4,
        norm_epsilon=1e-6,
        num_kv_heads=8,
        sliding_window=None if _window(raw) is None else reader.integer("sliding_window", absent=_WINDOW),
        dense=True,
    )


def _window(raw: Mapping[str, Any]) -> Any:  # noqa: ANN401 - JSON value
    """The window that a config.json states, as it is written; None for none. Where layers have types, all have one of
    the two, since any other layer_types is refused."""
    has_none = raw.get("layer_types") is not None and not _all_slide(raw)
    return None if has_none else raw.get("sliding_window", _WINDOW)


def _all_slide(raw: Mapping[str, Any]) -> bool:
    """Whether config.json says of each layer that it has a window, and says which."""
    types, layers = raw.get("layer_types"), raw.get("num_hidden_layers")
    if not isinstance(types, list) or len(types) != layers or raw.get("sliding_window", _WINDOW) is None:
        return False
    return all(one == "sliding_attention" for one in types)


def network(raw: Mapping[str, Any]) -> Network:
    """What the network computes; missing keys have the defaults of transformers' MistralConfig."""
    return stack_network(
        raw,
        rope_theta=1e4,
        rms_norm_eps=1e-6,
        num_key_value_heads=8,
        sliding_window=_window(raw),
        dense=True,
    )


FAMILY = Family(
    name="mistral",
    matches=matches,
    read_config=read_config,
    tensors=dense_tensors,
    decoder=stack_graph,
    head=stack_head,
    layer=layer_name,
    network=network,
    tokenizers={"mistral": "TokenizersBackend"},
    base_modules=BASE_MODULES,
)
