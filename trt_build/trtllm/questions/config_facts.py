"""The facts in config.json, of rank files and of an engine, against the checkpoint's own.

What a network computes is expected from the family's `network`, which reads the checkpoint's config.json by itself, and
from the shapes of the tensors; what is left, such as the mapping of ranks, from the plan of the rank files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from export.checkpoint.folder import read_json
from export.families import Model
from export.families.shared.network import Activation
from export.trtllm.checkpoint import CONFIG_FILE, CheckpointPlan

_ACTIVATIONS = {(Activation.GELU_TANH, False): "gelu_new", (Activation.SILU, True): "swiglu"}


def config_failures(folder: Path, plan: CheckpointPlan, section: str | None = None) -> list[str]:
    """What of a folder's config.json is not what the checkpoint says, one sentence a key; `section` is the key under
    which an engine has what rank files have at the top. Raises ConfigError for a file that is no JSON object."""
    found: Any = read_json(folder / CONFIG_FILE, "TensorRT-LLM's config")
    where = CONFIG_FILE
    if section is not None:
        found, where = found.get(section), f"{CONFIG_FILE}, {section}"
    if not isinstance(found, dict):
        return [f"{where}: it is no object"]
    expected = {**json.loads(json.dumps(dict(plan.config))), **network_facts(plan.model)}
    return list(_differences(where, found, expected, exact=section is None))


def _differences(where: str, found: Mapping[str, Any], expected: Mapping[str, Any], *, exact: bool) -> list[str]:
    """One sentence for each key that differs; an engine's config.json may have keys that rank files lack."""
    problems = []
    for key in sorted({*expected, *(found if exact else ())}):
        here, wanted = found.get(key), expected.get(key)
        if isinstance(here, dict) and isinstance(wanted, dict):
            problems += _differences(f"{where}: {key}", here, wanted, exact=exact)
        elif here != wanted:
            problems.append(f"{where}: {key} is {here}, expected {wanted}")
    return problems


def network_facts(model: Model) -> dict[str, Any]:
    """The values of config.json that follow from the checkpoint's own config and from the shapes of its tensors."""
    table, network = model.weights.table, model.family.network(model.weights.checkpoint.config)
    first, attention = network.layers[0], network.layers[0].attention
    vocab, hidden = table[f"{network.embedding}.weight"].shape
    heads = table[f"{attention.output}.weight"].shape[-1]
    facts = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "num_hidden_layers": len(network.layers),
        "num_attention_heads": attention.num_heads,
        "num_key_value_heads": attention.num_kv_heads,
        "head_size": heads // attention.num_heads,
        "intermediate_size": table[f"{first.mlp.second}.weight"].shape[-1],
        "norm_epsilon": first.norms[0].epsilon,
        "rotary_base": attention.rotary_base,
        "rotary_embedding_dim": attention.rotary_dim,
        "hidden_act": _ACTIVATIONS[first.mlp.activation, first.mlp.gated],
    }
    shared = first.mlp.shared
    more = {
        "attn_bias": f"{attention.inputs[0]}.bias" in table,
        "moe_intermediate_size": facts["intermediate_size"],
        "moe_shared_expert_intermediate_size": 0 if shared is None else table[f"{shared.second}.weight"].shape[-1],
    }
    # Of these only what the class has: the others lack the keys.
    return facts | {
        key: value for key, value in more.items() if key in model.family.trtllm_network().config(model.architecture)
    }


def window_failures(model: Model, max_sequence: int) -> list[str]:
    """Layers whose attention sees fewer positions than an engine's sequences have: the library's networks see all."""
    layers = model.family.network(model.weights.checkpoint.config).layers
    return [
        f"layer {index}, attention: sees {layer.attention.window} positions, and the engine's network sees all of "
        f"{max_sequence}"
        for index, layer in enumerate(layers)
        if layer.attention.window is not None and layer.attention.window < max_sequence
    ]
