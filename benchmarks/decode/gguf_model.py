"""Writes a model of shape.py as a GGUF file with random weights, with one tensor in memory at a time.

To write at the disk's speed, one pool of normal values is quantised once for each type and row length, and each tensor
is copied from the pool, beginning at a row that depends on the tensor's name. In the llama.cpp formats used here rows
are quantised independently, so the bytes are those that quantising the whole tensor would give.
"""

from __future__ import annotations

import logging
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from decode.shape import ARCHITECTURES, EMBEDDING, ROW_MULTIPLE, WITH_SINKS, Tensor, share_read, tensors
from export.architecture import Architecture, Scales
from export.errors import CheckpointError, ConfigError
from export.files.output import require_space
from export.optional import optional_package
from export.rotary import RotaryScaling

if TYPE_CHECKING:
    from gguf import GGMLQuantizationType, GGUFWriter

POOL_WEIGHTS = 1 << 24
_VECTOR_FEATURES = 16
_WITH_EXPERT_LENGTH = ("qwen3moe", "gpt-oss")  # architectures that read the experts' width from a key of its own
Quantize = Callable[[npt.NDArray[np.float32], "GGMLQuantizationType"], npt.NDArray[np.uint8]]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Vocabulary:
    """Tokens in the order of ids, and merges, of a byte-level BPE tokenizer (`gpt2` in GGUF)."""

    tokens: Sequence[str]
    merges: Sequence[str]
    end_id: int


@dataclass(frozen=True, kw_only=True)
class Contents:
    """The contents of a GGUF file: bytes and number of tensors by type, and the bytes that a token reads."""

    bytes_of_type: Mapping[str, int]
    tensors_of_type: Mapping[str, int]
    weights: int
    weight_bytes: int
    bytes_read_per_token: int  # bytes of weights, without the key/value cache


def gguf() -> Any:  # noqa: ANN401 - the package, which is imported by those who write or read files alone
    with optional_package("gguf", "writing llama.cpp's model", "bench"):
        import gguf
    return gguf


def write_model(
    path: Path,
    model: Architecture,
    types: Mapping[str, GGMLQuantizationType],
    quantize: Quantize,
    file_type: int,
    vocabulary: Vocabulary | None = None,
) -> None:
    """Write a model under `path` by rename. `types` names the format of every tensor, `file_type` is llama_ftype's
    number for the mixture of them. Raises OutputError where the disk is too small."""
    package = gguf()
    rows = tensors(model)
    num_bytes = sum(byte_count(tensor, types[tensor.name]) for tensor in rows)
    require_space(path, num_bytes, f"llama.cpp's model {path.name}")
    logger.info("writing %s, %.2f GB", path, num_bytes / 1e9)
    partial = path.with_name(f".{path.name}.partial-gguf")
    writer = package.GGUFWriter(partial, ARCHITECTURES[model.family])
    try:
        _add_facts(writer, model, file_type)
        _add_vocabulary(writer, vocabulary)
        for tensor in rows:
            kind = types[tensor.name]
            shape = package.quant_shape_to_byte_shape(tensor.shape, kind) if _is_packed(kind) else tensor.shape
            dtype = {"F32": np.float32, "F16": np.float16}.get(kind.name, np.uint8)
            writer.add_tensor_info(tensor.name, shape, np.dtype(dtype), byte_count(tensor, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        values = Values(quantize)
        for tensor in rows:
            writer.write_tensor_data(values.of(tensor, types[tensor.name]))
        writer.close()
        partial.replace(path)
    finally:
        writer.close()
        partial.unlink(missing_ok=True)


class Values:
    """Makes the bytes of every tensor: norms are ones, matrices are normal with variance 1 / input features, biases and
    sinks with variance 1 / _VECTOR_FEATURES."""

    def __init__(self, quantize: Quantize, seed: int = 0, pool_weights: int = POOL_WEIGHTS) -> None:
        self._draws = np.random.default_rng(seed).standard_normal(pool_weights, dtype=np.float32)
        self._quantize = quantize
        self._pools: dict[tuple[int, str], npt.NDArray[np.uint8]] = {}

    def of(self, tensor: Tensor, kind: GGMLQuantizationType) -> npt.NDArray[np.uint8]:
        """Bytes of one tensor in the format `kind`, flat."""
        if tensor.name.endswith("norm.weight"):
            return np.ones(tensor.shape, dtype=np.float32).view(np.uint8)
        is_vector = len(tensor.shape) == 1 or tensor.name.endswith(".bias")
        features = _VECTOR_FEATURES if is_vector else tensor.shape[-1]
        pool = self._pool(1 if tensor.name == EMBEDDING else features, kind)
        rows = pool.reshape(-1, len(pool) * ROW_MULTIPLE // len(self._draws))
        count = byte_count(tensor, kind)
        start = zlib.crc32(tensor.name.encode()) % len(rows) * rows.shape[1]
        data = np.empty(count, dtype=np.uint8)
        done = 0
        while done < count:
            piece = pool[start : start + count - done]
            data[done : done + len(piece)] = piece
            done, start = done + len(piece), 0
        return data

    def _pool(self, features: int, kind: GGMLQuantizationType) -> npt.NDArray[np.uint8]:
        key = (features, kind.name)
        if key not in self._pools:
            draws = (self._draws / np.float32(np.sqrt(features))).reshape(-1, ROW_MULTIPLE)
            packed = self._quantize(draws, kind)
            self._pools[key] = np.ascontiguousarray(packed).reshape(-1).view(np.uint8)
        return self._pools[key]


def byte_count(tensor: Tensor, kind: GGMLQuantizationType) -> int:
    """Bytes of a tensor in a format; its rows must be whole blocks."""
    block, size = gguf().GGML_QUANT_SIZES[kind]
    if tensor.shape[-1] % block:
        raise CheckpointError(
            f"packing {tensor.name}: rows of {tensor.shape[-1]}, {kind.name} needs a multiple of {block}; choose "
            "another width"
        )
    return tensor.num_weights // block * size


def read_contents(path: Path, model: Architecture) -> Contents:
    """Count the tensors of a GGUF file. Raises CheckpointError if they are not the tensors of `model`."""
    by_bytes: dict[str, int] = {}
    by_count: dict[str, int] = {}
    read = 0.0
    expected = {tensor.name: tensor.shape for tensor in tensors(model)}
    found = {}
    for name, shape, kind, num_bytes in _stored(path):
        found[name] = shape
        by_bytes[kind] = by_bytes.get(kind, 0) + num_bytes
        by_count[kind] = by_count.get(kind, 0) + 1
        read += num_bytes * share_read(name, model)
    if found != expected:
        wrong = sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))
        raise CheckpointError(
            f"reading {path}: {len(wrong)} tensors are not those of the model asked for, the first is {wrong[0]}: "
            f"found {found.get(wrong[0])}, expected {expected.get(wrong[0])}; remove the file, and it is written again"
        )
    return Contents(
        bytes_of_type=by_bytes,
        tensors_of_type=by_count,
        weights=sum(tensor.num_weights for tensor in tensors(model)),
        weight_bytes=sum(by_bytes.values()),
        bytes_read_per_token=round(read),
    )


def _stored(path: Path) -> Iterator[tuple[str, tuple[int, ...], str, int]]:
    """Name, shape outermost first, type and bytes of every tensor."""
    for tensor in gguf().GGUFReader(path).tensors:
        yield tensor.name, tuple(int(size) for size in reversed(tensor.shape)), tensor.tensor_type.name, tensor.n_bytes


def _is_packed(kind: GGMLQuantizationType) -> bool:
    return kind.name not in ("F32", "F16")


def _add_facts(writer: GGUFWriter, model: Architecture, file_type: int) -> None:
    """Write the metadata keys that llama.cpp reads of the model's architecture, except those of the tokenizer."""
    writer.add_name(f"{model.family} of random weights")
    writer.add_context_length(model.max_positions)
    writer.add_embedding_length(model.hidden_size)
    writer.add_block_count(model.num_layers)
    writer.add_feed_forward_length(model.ffn_size)
    if ARCHITECTURES[model.family] in _WITH_EXPERT_LENGTH:
        writer.add_expert_feed_forward_length(model.ffn_size)
    writer.add_head_count(model.num_heads)
    writer.add_head_count_kv(model.num_kv_heads)
    writer.add_key_length(model.head_size)
    writer.add_value_length(model.head_size)
    writer.add_rope_dimension_count(model.rotary_dim)
    writer.add_rope_freq_base(model.rope_base)
    writer.add_layer_norm_rms_eps(model.norm_epsilon)
    writer.add_expert_count(model.num_experts)
    writer.add_expert_used_count(model.experts_per_token)
    writer.add_vocab_size(model.vocab_size)
    if model.sliding_window is not None and model.family in WITH_SINKS:
        writer.add_sliding_window(model.sliding_window)
    if model.rotary_scaling is not None:
        _add_rotary_scaling(writer, model.rotary_scaling)
    if model.scales != Scales():
        writer.add_embedding_scale(model.scales.embedding)
        writer.add_residual_scale(model.scales.residual)
        writer.add_attention_scale(model.attention_scale)
        writer.add_logit_scale(model.scales.logits)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf().GGML_QUANT_VERSION)


def _add_rotary_scaling(writer: GGUFWriter, scaling: RotaryScaling) -> None:
    """Write yarn's keys. llama.cpp rounds the ends of its ramp, as transformers does with `truncate`."""
    if scaling.kind != "yarn":
        raise ConfigError(f"writing llama.cpp's model: found rotary scaling {scaling.kind}, expected yarn or none")
    writer.add_rope_scaling_type(gguf().RopeScalingType.YARN)
    writer.add_rope_scaling_factor(scaling.factor)
    writer.add_rope_scaling_orig_ctx_len(scaling.original_positions)
    writer.add_rope_scaling_yarn_beta_fast(scaling.beta_fast)
    writer.add_rope_scaling_yarn_beta_slow(scaling.beta_slow)


def _add_vocabulary(writer: GGUFWriter, vocabulary: Vocabulary | None) -> None:
    """Write a byte-level BPE tokenizer; without one, callers of llama.cpp can only use token ids."""
    if vocabulary is None:
        writer.add_tokenizer_model("no_vocab")
        return
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(list(vocabulary.tokens))
    writer.add_token_types([gguf().TokenType.NORMAL] * len(vocabulary.tokens))
    writer.add_token_merges(list(vocabulary.merges))
    writer.add_eos_token_id(vocabulary.end_id)
    writer.add_add_bos_token(False)
