"""Computes the hidden states that enter each layer of a Phi-2, with one layer's weights in memory at a time.

    for layer, states in enumerate(layer_inputs(model, [[256, 71], [256]])):
        states[0].shape          # [2, H], float32: prompt 0 as it enters `layer`

They are transformers' hidden_states[0 .. L-1], without the last one, which comes after the final norm.
The layer is transformers' own PhiDecoderLayer in float32. torch and transformers are imported here and nowhere else
in `export`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from export.architecture import Architecture
from export.families import Model
from export.families.phi_stack import EMBEDDING, TRANSFORMERS_MODULES, layer_name
from export.optional import optional_package

if TYPE_CHECKING:
    import torch

States = list[npt.NDArray[np.float32]]


def embedding_rows(model: Model, token_ids: Sequence[int]) -> npt.NDArray[np.float32]:
    """The embedding rows of token ids, float32 [len(token_ids), H]; no other rows are read."""
    name = model.weights.table[EMBEDDING].parts[0].name
    rows = np.empty((len(token_ids), model.architecture.hidden_size), dtype=np.float32)
    read: dict[int, npt.NDArray[np.float32]] = {}
    for index, token in enumerate(token_ids):
        if token not in read:
            read[token] = model.weights.checkpoint.read_float32(name, slice(token, token + 1))[0]
        rows[index] = read[token]
    return rows


def layer_inputs(model: Model, prompts: Sequence[Sequence[int]]) -> Iterator[States]:
    """Yield for each layer the hidden states that enter it: one array [S, H] for each prompt, [0, H] for an empty
    one."""
    torch = require_torch()
    states = [torch.from_numpy(embedding_rows(model, prompt)) for prompt in prompts]
    config = phi_config(model.architecture)
    config._attn_implementation = "sdpa"  # without a mask it is causal
    for layer in range(model.architecture.num_layers):
        yield [state.numpy() for state in states]
        if layer + 1 < model.architecture.num_layers:
            states = _run_layer(model, layer, config, states)


def require_torch() -> Any:  # noqa: ANN401 - a module
    """Import transformers and torch; returns torch. Raises MissingPackageError."""
    purpose = "making gates from hidden states (gate_mode cheap_embed works without)"
    for package in ("transformers", "torch"):
        with optional_package(package, purpose, "verify"):
            module = __import__(package)
    return module


def phi_config(architecture: Architecture) -> Any:  # noqa: ANN401 - PhiConfig
    """transformers' PhiConfig of a dense Phi-2 with this architecture, without dropout."""
    from transformers import PhiConfig

    config = PhiConfig(
        vocab_size=architecture.vocab_size,
        hidden_size=architecture.hidden_size,
        intermediate_size=architecture.ffn_size,
        num_hidden_layers=architecture.num_layers,
        num_attention_heads=architecture.num_heads,
        num_key_value_heads=architecture.num_kv_heads,
        max_position_embeddings=architecture.max_positions,
        layer_norm_eps=architecture.norm_epsilon,
        hidden_act="gelu_new",
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attention_dropout=0.0,
        tie_word_embeddings=False,
        bos_token_id=architecture.bos_token_id,
        eos_token_id=list(architecture.eos_token_ids) or None,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": architecture.rope_base,
            # transformers takes int(D * factor); adding 0.25 keeps rounding from losing a dimension.
            "partial_rotary_factor": (architecture.rotary_dim + 0.25) / architecture.head_size,
        },
    )
    return config


def _run_layer(model: Model, layer: int, config: Any, states: list[torch.Tensor]) -> list[torch.Tensor]:  # noqa: ANN401
    """Run the states [S, H] of all prompts through one layer, one by one, so that none is padded."""
    import torch
    from transformers.models.phi.modeling_phi import PhiDecoderLayer, PhiRotaryEmbedding

    with torch.device("meta"):
        module = PhiDecoderLayer(config, layer_idx=0)
    module.load_state_dict(_layer_weights(model, layer), strict=True, assign=True)
    module.eval()
    rotary = PhiRotaryEmbedding(config)
    after = []
    with torch.inference_mode():
        for state in states:
            if not len(state):
                after.append(state)
                continue
            batch = state.unsqueeze(0)  # [1, S, H]
            angles = rotary(batch, torch.arange(len(state)).unsqueeze(0))
            after.append(module(batch, attention_mask=None, position_embeddings=angles)[0])
    return after


def _layer_weights(model: Model, layer: int) -> dict[str, torch.Tensor]:
    """One layer's weights, float32, under the names of PhiDecoderLayer; query, key and value are views of Wqkv."""
    import torch

    architecture, name = model.architecture, layer_name(layer)
    queries = architecture.num_heads * architecture.head_size
    keys = architecture.num_kv_heads * architecture.head_size
    weights: dict[str, torch.Tensor] = {}
    for kind in ("weight", "bias"):
        packed = torch.from_numpy(model.weights.load(f"{name}.mixer.Wqkv.{kind}"))
        for letter, rows in zip("qkv", packed.split([queries, keys, keys]), strict=True):
            weights[f"self_attn.{letter}_proj.{kind}"] = rows
        for ours, theirs in TRANSFORMERS_MODULES.items():
            weights[f"{theirs}.{kind}"] = torch.from_numpy(model.weights.load(f"{name}.{ours}.{kind}"))
    return weights
