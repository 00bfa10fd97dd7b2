"""Small GGUF files, written by the package gguf."""

from __future__ import annotations

import gguf
import numpy as np


def write_file(path, *, tensors=None, architecture="llama", **metadata):
    """A small Llama with tied embeddings; `metadata` replaces values, None leaves them out. `tensors`: name -> shape of
    random values, or the values."""
    values = {
        "context_length": 64, "embedding_length": 32, "block_count": 1, "feed_forward_length": 32,
        "attention.head_count": 2, "attention.layer_norm_rms_epsilon": 1e-5, **metadata,
    }  # fmt: skip
    writer = gguf.GGUFWriter(str(path), architecture)
    for key, value in values.items():
        if key == "without":
            continue
        name = key if key.startswith(("general.", "split.", "tokenizer.")) else f"{architecture}.{key}"
        if isinstance(value, list):
            writer.add_array(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif value is not None:
            writer.add_uint32(name, value)
    without = tuple(values.pop("without", ()))
    shapes = {
        "token_embd.weight": (40, 32), "output_norm.weight": (32,), "blk.0.attn_norm.weight": (32,),
        "blk.0.ffn_norm.weight": (32,),
        **{f"blk.0.{name}.weight": (32, 32)
           for name in ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")},
        **(tensors or {}),
    }  # fmt: skip
    rng = np.random.default_rng(0)
    for name, shape in shapes.items():
        if name.startswith(without):
            continue
        values = shape if isinstance(shape, np.ndarray) else rng.standard_normal(shape).astype(np.float32)
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
