"""llama.cpp's side: the same model as a GGUF file, its importance matrix, its quants, and their logits.

llama.cpp's own programs llama-imatrix and llama-quantize do both. The file has a tokenizer of llama.cpp's kind `llama`:
a token's score is minus its id. BPE gives ids in the order of merges, so that llama.cpp merges in the same order, and
reads the calibration text as the same tokens (`tokens_of` says so).

Sources: llama.cpp, convert_hf_to_gguf.py (LlamaModel.permute), and gguf-py, gguf/constants.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from decode.gguf_model import gguf
from decode.shape import share_read
from export.architecture import Architecture
from export.errors import ConfigError
from export.families import Model

TYPES = ("Q2_K", "Q3_K_M", "Q4_0", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0")
CONTEXT = 512
_EXPERTS = {"gate": "w1", "up": "w3", "down": "w2"}
_BENCHMARKS = Path(__file__).resolve().parent.parent
FloatArray = npt.NDArray[np.float32]


@dataclass(frozen=True, kw_only=True)
class Peer:
    """A GGUF file, the bits of all its tensors for each weight, and the bytes of them that decoding a token reads."""

    path: Path
    bits_per_weight: float
    bytes_per_token: int


def write_gguf(model: Model, path: Path) -> None:
    """Write a Mixtral in float32."""
    facts, package = model.architecture, gguf()
    writer = package.GGUFWriter(path, "llama")
    writer.add_context_length(facts.max_positions)
    writer.add_embedding_length(facts.hidden_size)
    writer.add_block_count(facts.num_layers)
    writer.add_feed_forward_length(facts.ffn_size)
    writer.add_head_count(facts.num_heads)
    writer.add_head_count_kv(facts.num_kv_heads)
    writer.add_rope_dimension_count(facts.rotary_dim)
    writer.add_rope_freq_base(facts.rope_base)
    writer.add_layer_norm_rms_eps(facts.norm_epsilon)
    writer.add_expert_count(facts.num_experts)
    writer.add_expert_used_count(facts.experts_per_token)
    writer.add_vocab_size(facts.vocab_size)
    writer.add_file_type(0)
    _add_tokenizer(writer, model.weights.checkpoint.folder / "tokenizer.json", facts.vocab_size)
    for name, values in _tensors(model):
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_tokenizer(writer: Any, path: Path, size: int) -> None:  # noqa: ANN401 - gguf's
    kinds = gguf().TokenType
    vocabulary = json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"]
    by_id = {number: name for name, number in vocabulary.items()}
    tokens = [by_id.get(number, f"<unused{number}>") for number in range(size)]
    types = []
    for number, token in enumerate(tokens):
        kind = kinds.UNUSED if number not in by_id else kinds.NORMAL
        if token.startswith("<0x") and len(token) == 6:
            kind = kinds.BYTE
        types.append({"<unk>": kinds.UNKNOWN, "<s>": kinds.CONTROL, "</s>": kinds.CONTROL}.get(token, kind))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(number) for number in range(size)])
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(True)


def _tensors(model: Model) -> Iterator[tuple[str, FloatArray]]:
    facts, folder = model.architecture, model.weights.checkpoint
    parts = {part.name: part for spec in model.weights.table.values() for part in spec.parts}

    def read(name: str) -> FloatArray:
        return np.ascontiguousarray(parts[name].read(folder))

    def turned(values: FloatArray, heads: int) -> FloatArray:
        """Rows i and i + D/2 of each head become neighbours."""
        halves = values.reshape(heads, 2, -1, values.shape[1])
        return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(values.shape)

    yield "token_embd.weight", read("model.embed_tokens.weight")
    yield "output_norm.weight", read("model.norm.weight")
    yield "output.weight", read("lm_head.weight")
    for layer in range(facts.num_layers):
        own, other = f"blk.{layer}.", f"model.layers.{layer}."
        yield f"{own}attn_norm.weight", read(f"{other}input_layernorm.weight")
        yield f"{own}ffn_norm.weight", read(f"{other}post_attention_layernorm.weight")
        yield f"{own}attn_q.weight", turned(read(f"{other}self_attn.q_proj.weight"), facts.num_heads)
        yield f"{own}attn_k.weight", turned(read(f"{other}self_attn.k_proj.weight"), facts.num_kv_heads)
        yield f"{own}attn_v.weight", read(f"{other}self_attn.v_proj.weight")
        yield f"{own}attn_output.weight", read(f"{other}self_attn.o_proj.weight")
        yield f"{own}ffn_gate_inp.weight", read(f"{other}block_sparse_moe.gate.weight")
        for name, matrix in _EXPERTS.items():
            experts = [
                read(f"{other}block_sparse_moe.experts.{expert}.{matrix}.weight") for expert in range(facts.num_experts)
            ]
            yield f"{own}ffn_{name}_exps.weight", np.stack(experts)


def make_importance(programs: Path, model: Path, text: Path, output: Path, num_tokens: int) -> None:
    """The importance matrix of a text, by llama-imatrix."""
    chunks = num_tokens // CONTEXT
    words = ["-c", CONTEXT, "--chunks", chunks, "-t", 1, "--process-output"]  # without the last the head has none
    _run([programs / "llama-imatrix", "-m", model, "-f", text, "-o", output, *words], "making the importance matrix")


def quantise(programs: Path, source: Path, kind: str, importance: Path | None, output: Path) -> None:
    """A quant of a float32 file, by llama-quantize."""
    words = [] if importance is None else ["--imatrix", importance]
    _run([programs / "llama-quantize", *words, source, output, kind, 1], f"quantising to {kind}")


def _run(command: Sequence[object], doing: str) -> None:
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, errors="replace")
    if done.returncode:
        raise ConfigError(f"{doing}: {command[0]} ended with status {done.returncode}: {done.stderr[-600:].strip()}")


def describe(path: Path, model: Architecture) -> Peer:
    """Count a file's bytes. Its float32 norms and router belong to them, as they do to ours."""
    stored = [
        (tensor.name, int(tensor.n_bytes), int(np.prod(tensor.shape))) for tensor in gguf().GGUFReader(path).tensors
    ]
    weights = sum(count for _, _, count in stored)
    read = sum(size * share_read(name, model) for name, size, _ in stored)
    bits = 8 * sum(size for _, size, _ in stored) / weights
    return Peer(path=path, bits_per_weight=bits, bytes_per_token=round(read))


def types_of(path: Path) -> dict[str, int]:
    """Type -> number of tensors that a file has of it."""
    found: dict[str, int] = {}
    for tensor in gguf().GGUFReader(path).tensors:
        found[tensor.tensor_type.name] = found.get(tensor.tensor_type.name, 0) + 1
    return found


def logits_of(path: Path, windows: Sequence[Sequence[int]], text: str = "") -> tuple[FloatArray, list[int]]:
    """llama.cpp's logits [S, V] of windows of token ids, in a process of its own, with a cache of float32; and the
    tokens that it makes of `text`."""
    with tempfile.TemporaryDirectory() as folder:
        order, answer = Path(folder) / "order.json", Path(folder) / "logits.npz"
        order.write_text(
            json.dumps({"model": str(path), "windows": [list(map(int, w)) for w in windows], "text": text})
        )
        command = [sys.executable, "-m", "frontier.llama_logits", str(order), str(answer)]
        environment = {**os.environ, "GGML_NO_BACKTRACE": "1"}
        done = subprocess.run(command, cwd=_BENCHMARKS, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise ConfigError(f"computing the logits of {path}: {done.stderr.strip()[-600:]}")
        found = np.load(answer)
        return found["logits"], found["tokens"].tolist()
