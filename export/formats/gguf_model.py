"""A GGUF file of the architectures phi2 and llama as a checkpoint: a config.json, and tensors under ordinary names.

  phi2    Phi-2: the fused query, key and value have phi-msft names, separate ones those of transformers
  llama   Llama and Mistral, and with `llama.expert_count` Mixtral: experts stacked (blk.N.ffn_gate_exps) or single
          (blk.N.ffn_gate.E)

llama.cpp's converter reorders the rows of Llama's queries and keys for its own rotary embedding: of each head, rows i
and i + D/2 become neighbours. That is undone here. Values are dequantised by the package gguf.
Sources: llama.cpp, convert_hf_to_gguf.py (LlamaModel.permute, Phi2Model) and gguf-py, gguf/tensor_mapping.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from export.errors import CheckpointError, ConfigError, named, names, shown
from export.files.reading import open_regular
from export.formats.gguf_file import Array, GgufFile, GgufTensor
from export.formats.gguf_rope import FREQUENCIES, divided, stated_scaling
from export.formats.view import ByteArray, FloatArray, Grid, PackedTensor, Source

FLOATS = {0: "F32", 1: "F16", 30: "BF16"}  # numbers of the float types in ggml -> labels of the safetensors format
_Q4_0, _Q8_0 = 2, 8
_GRIDS = {_Q4_0: 4, _Q8_0: 8}  # types whose values are (code - 2^(bits-1)) * scale, in blocks of 32 -> bits
_GRID_BLOCK = 32
_BLOCK = re.compile(r"blk\.(\d+)\.(.+)")
_SINGLE_EXPERT = re.compile(r"ffn_(gate|up|down)\.(\d+)")
_EXPERT_MATRICES = {"gate": "w1", "up": "w3", "down": "w2"}


@dataclass(frozen=True, kw_only=True)
class GgufMatrix(PackedTensor):
    """A matrix, or one of a stack, that lies from row `first_row` of the tensor `sources[0]` on. `heads`: number of
    heads whose rows llama.cpp reordered; 0 if they lie in order."""

    kind: int
    first_row: int
    row_bytes: int
    heads: int = 0

    @property
    def reads_whole(self) -> bool:
        return bool(self.heads)

    def read(self, source: Source, first: int, last: int) -> FloatArray:
        import gguf
        import gguf.quants

        values = gguf.quants.dequantize(self._raw(source, first, last), gguf.GGMLQuantizationType(self.kind))
        return np.ascontiguousarray(values, dtype=np.float32).reshape(last - first, self.features)

    def grid(self, source: Source) -> Grid | None:  # noqa: ARG002 - its type decides
        if self.kind not in _GRIDS:
            return None
        return Grid(bits=_GRIDS[self.kind], group_size=_GRID_BLOCK, has_zeros=False)

    def steps(self, source: Source, first: int, last: int) -> tuple[FloatArray, ByteArray]:
        """A block begins with its scale in float16."""
        blocks = self._raw(source, first, last).reshape(last - first, self.features // _GRID_BLOCK, -1)
        scales: FloatArray = np.ascontiguousarray(blocks[..., :2]).view("<f2")[..., 0].astype(np.float32)
        return scales, np.full(scales.shape, 1 << (_GRIDS[self.kind] - 1), dtype=np.uint8)

    def run_start(self, first_row: int) -> dict[str, int]:
        return {self.sources[0]: 0 if self.heads else (self.first_row + first_row) * self.row_bytes}

    def _raw(self, source: Source, first: int, last: int) -> ByteArray:
        """The bytes of some rows, uint8 [rows, bytes of a row]."""
        if not self.heads:
            return source.stored_rows(self.sources[0], self.first_row + first, self.first_row + last)
        size = self.num_rows // self.heads
        head, within = np.divmod(np.arange(first, last), size)
        half, place = np.divmod(within, size // 2)
        rows: ByteArray = source.kept(self.sources[0])[head * size + 2 * place + half]
        return rows


@dataclass(frozen=True, kw_only=True)
class GgufCheckpoint:
    """What a GGUF file holds: the values of a config.json, ordinary name -> packed tensor, and name of a tensor of the
    file -> its ordinary name, for tensors that are floats in order."""

    config: Mapping[str, Any]
    packed: Mapping[str, PackedTensor]
    plain: Mapping[str, str]


def read_model(file: GgufFile, path: Path) -> GgufCheckpoint:
    """Describe the GGUF file `path` with the header `file` as a checkpoint. Raises ConfigError for metadata
    that are missing, contradict the tensors or would change what is computed, and CheckpointError for tensors of no
    known name."""
    metadata, doing = file.metadata, f"opening {named(path)}"
    if metadata.get("split.count", 1) != 1:
        raise ConfigError(
            f"{doing}: it is one of {shown(metadata.get('split.count'))} files; join them with llama-gguf-split --merge"
        )
    architecture = metadata.get("general.architecture")
    if architecture not in _READERS:
        raise ConfigError(
            f"{doing}: its architecture is {shown(architecture)}, moeship reads GGUF files of "
            f"{' and '.join(_READERS)}; take the model's safetensors"
        )
    facts = _Facts(metadata, str(architecture), doing, lambda tensor: _floats(path, tensor, doing))
    tensors = {tensor.name: tensor for tensor in file.tensors}
    config, rename = _READERS[str(architecture)](facts, tensors)
    packed: dict[str, PackedTensor] = {}
    plain: dict[str, str] = {}
    strange = []
    for tensor in file.tensors:
        if tensor.name == FREQUENCIES:  # the config has them
            continue
        found = list(rename(tensor))
        if not found:
            strange.append(tensor.name)
        for name, view in found:
            if name in packed or name in plain.values():
                raise CheckpointError(f"{doing}: {named(tensor.name)} is there in two forms; convert the model again")
            if view is None:
                plain[tensor.name] = name
            else:
                packed[name] = view
    if strange:
        raise CheckpointError(
            f"{doing}: {names(sorted(strange))}: moeship does not know what is computed with them; take the model's "
            "safetensors"
        )
    return GgufCheckpoint(config=config, packed=packed, plain=plain)


_Renamed = Iterator[tuple[str, PackedTensor | None]]
_Reader = Callable[["_Facts", Mapping[str, GgufTensor]], tuple[dict[str, Any], Callable[[GgufTensor], _Renamed]]]


class _Facts:
    """The metadata of one architecture, each used or refused by name."""

    def __init__(
        self,
        metadata: Mapping[str, Any],
        architecture: str,
        doing: str,
        values: Callable[[GgufTensor], FloatArray],
    ) -> None:
        self._metadata, self.prefix, self.doing = metadata, f"{architecture}.", doing
        self._values = values  # of a tensor of a few floats
        self._used: set[str] = set()

    def integer(self, key: str, absent: int | None = None) -> int:
        value = self._value(key, absent)
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ConfigError(f"{self.doing}: {self.prefix}{key} is {shown(value)}, expected a whole number")
        return value

    def real(self, key: str, absent: float | None = None) -> float:
        value = self._value(key, absent)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise ConfigError(f"{self.doing}: {self.prefix}{key} is {shown(value)}, expected a number")
        # The converter rounded a decimal number of config.json to float32.
        return float(np.format_float_positional(np.float32(value), unique=True))

    def rope_scaling(
        self, tensors: Mapping[str, GgufTensor], base: float, width: int, positions: int
    ) -> dict[str, Any]:
        """The key rope_scaling of config.json, if the file scales its rotary embedding of `width` dimensions."""
        kind = self._value("rope.scaling.type", "")
        betas = {
            name: self.real(f"rope.scaling.yarn_{name}")
            for name in ("beta_fast", "beta_slow")
            if f"{self.prefix}rope.scaling.yarn_{name}" in self._metadata
        }
        factor = self.real("rope.scaling.factor", 0.0) or self.real("rope.scale_linear", 0.0)
        original = self.integer("rope.scaling.original_context_length", positions)
        tensor = tensors.get(FREQUENCIES)
        divisors = None if tensor is None else self._values(tensor)
        found = stated_scaling(str(kind), factor, original, betas, divisors)
        if isinstance(found, str):
            raise ConfigError(f"{self.doing}: {found}; take the model's safetensors")
        if divisors is not None:
            if divisors.shape != (width // 2,) or not (np.isfinite(divisors) & (divisors > 0)).all():
                raise CheckpointError(
                    f"{self.doing}: {FREQUENCIES} has {divisors.size} values, expected {width // 2} positive numbers; "
                    "convert the model again"
                )
            found = {} if (divisors == 1).all() else divided(divisors, base, positions)
        return {"rope_scaling": found} if found else {}

    def finish(self) -> None:
        """Refuse metadata of the architecture that nothing has used and that may change what is computed."""
        harmless = {"vocab_size", "rope.scaling.finetuned"}
        for key, value in self._metadata.items():
            short = key.removeprefix(self.prefix)
            if not key.startswith(self.prefix) or short in self._used | harmless:
                continue
            raise ConfigError(
                f"{self.doing}: {named(key)} is {shown(value)}, which moeship does not support in a GGUF file; take "
                "the model's safetensors"
            )

    def check_vocabulary(self, rows: int) -> None:
        """Compare the numbers of tokens that the metadata state with the rows of the embedding."""
        tokens = self._metadata.get("tokenizer.ggml.tokens")
        stated = {
            f"{self.prefix}vocab_size": self._metadata.get(f"{self.prefix}vocab_size"),
            "tokenizer.ggml.tokens": tokens.length if isinstance(tokens, Array) else None,
        }
        for key, value in stated.items():
            if value is not None and value != rows:
                raise ConfigError(
                    f"{self.doing}: {key} says {shown(value)} tokens, the embedding has {rows} rows; the file "
                    "contradicts itself: convert the model again"
                )

    def token_ids(self) -> dict[str, Any]:
        found = {}
        for name in ("bos", "eos"):
            value = self._metadata.get(f"tokenizer.ggml.{name}_token_id")
            if isinstance(value, int) and not isinstance(value, bool):
                found[f"{name}_token_id"] = value
        return found

    def _value(self, key: str, absent: Any) -> Any:  # noqa: ANN401 - whatever the metadata hold
        self._used.add(key)
        value = self._metadata.get(f"{self.prefix}{key}", absent)
        if value is None:
            raise ConfigError(f"{self.doing}: its metadata lack {self.prefix}{key}; convert the model again")
        return value


def _floats(path: Path, tensor: GgufTensor, doing: str) -> FloatArray:
    """The values of a float32 tensor of a file."""
    if FLOATS.get(tensor.kind) != "F32":
        raise CheckpointError(
            f"{doing}: {named(tensor.name)} is {type_name(tensor.kind)}, expected F32; convert the model again"
        )
    with open_regular(path, doing, CheckpointError) as file:
        file.seek(tensor.offset)
        data = file.read(tensor.num_bytes)
    if len(data) != tensor.num_bytes:
        raise CheckpointError(f"{doing}: the file ended early; it changed while it was read")
    return np.frombuffer(data, dtype="<f4").reshape(tensor.shape).astype(np.float32)


def _view(tensor: GgufTensor, name: str, shape: tuple[int, ...], first_row: int = 0, heads: int = 0) -> PackedTensor:
    rows = math.prod(tensor.shape[:-1])
    return GgufMatrix(
        name=name, shape=shape, sources=(tensor.name,), label=f"gguf {type_name(tensor.kind)}", kind=tensor.kind,
        first_row=first_row, row_bytes=tensor.num_bytes // rows, heads=heads,
    )  # fmt: skip


def type_name(kind: int) -> str:
    """The name of a type of ggml, such as Q4_K."""
    import gguf

    return str(gguf.GGMLQuantizationType(kind).name)


def _one(tensor: GgufTensor, name: str, heads: int = 0) -> tuple[str, PackedTensor | None]:
    """A tensor under another name: floats in order as they are, anything else as a view."""
    if tensor.kind in FLOATS and not heads:
        return name, None
    return name, _view(tensor, name, tensor.shape, heads=heads)


def _embedding_rows(facts: _Facts, tensors: Mapping[str, GgufTensor]) -> int:
    embedding = tensors.get("token_embd.weight")
    if embedding is None:
        raise CheckpointError(f"{facts.doing}: token_embd.weight is missing; convert the model again")
    facts.check_vocabulary(embedding.shape[0])
    return embedding.shape[0]


def _read_phi2(facts: _Facts, tensors: Mapping[str, GgufTensor]) -> tuple[dict[str, Any], Callable[..., _Renamed]]:
    hidden, heads = facts.integer("embedding_length"), max(1, facts.integer("attention.head_count"))
    size = max(1, hidden // heads)
    positions, base = facts.integer("context_length"), facts.real("rope.freq_base", 10000.0)
    width = facts.integer("rope.dimension_count")
    config = {
        "model_type": "phi",
        "architectures": ["PhiForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": facts.integer("feed_forward_length"),
        "num_hidden_layers": facts.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": facts.integer("attention.head_count_kv", heads),
        "max_position_embeddings": positions,
        "layer_norm_eps": facts.real("attention.layer_norm_epsilon"),
        "rope_theta": base,
        **facts.rope_scaling(tensors, base, width, positions),
        # transformers takes int(D * factor); adding 0.25 keeps rounding from losing a dimension.
        "partial_rotary_factor": min(1.0, (width + 0.25) / size),
        "hidden_act": "gelu_new",
        "vocab_size": _embedding_rows(facts, tensors),
        "tie_word_embeddings": False,
        **facts.token_ids(),
    }
    facts.finish()
    fused = any(".attn_qkv." in name for name in tensors)
    if fused:
        top = {"token_embd": "transformer.embd.wte", "output_norm": "lm_head.ln", "output": "lm_head.linear"}
        layer, modules = "transformer.h", {
            "attn_norm": "ln", "attn_qkv": "mixer.Wqkv", "attn_output": "mixer.out_proj", "ffn_up": "mlp.fc1",
            "ffn_down": "mlp.fc2",
        }  # fmt: skip
    else:
        top = {"token_embd": "model.embed_tokens", "output_norm": "model.final_layernorm", "output": "lm_head"}
        layer, modules = "model.layers", {
            "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
            "attn_v": "self_attn.v_proj", "attn_output": "self_attn.dense", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2",
        }  # fmt: skip

    def rename(tensor: GgufTensor) -> _Renamed:
        stem, _, kind = tensor.name.rpartition(".")
        block = _BLOCK.fullmatch(stem)
        if stem in top:
            yield _one(tensor, f"{top[stem]}.{kind}")
        elif block and block[2] in modules:
            yield _one(tensor, f"{layer}.{block[1]}.{modules[block[2]]}.{kind}")

    return config, rename


def _llama_config(facts: _Facts, tensors: Mapping[str, GgufTensor]) -> dict[str, Any]:
    """The config.json of a Llama, or with experts of a Mixtral."""
    hidden, heads = facts.integer("embedding_length"), max(1, facts.integer("attention.head_count"))
    kv_heads = max(1, facts.integer("attention.head_count_kv", heads))
    size = facts.integer("attention.key_length", max(1, hidden // heads))
    if facts.integer("attention.value_length", size) != size or facts.integer("rope.dimension_count", size) != size:
        raise ConfigError(
            f"{facts.doing}: the lengths of keys, values and rotary embedding differ, expected {size} for all; take "
            "the model's safetensors"
        )
    experts = facts.integer("expert_count", 0)
    positions, base = facts.integer("context_length"), facts.real("rope.freq_base", 10000.0)
    config = {
        "model_type": "mixtral" if experts else "llama",
        "architectures": ["MixtralForCausalLM" if experts else "LlamaForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": facts.integer("feed_forward_length"),
        "num_hidden_layers": facts.integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": size,
        "max_position_embeddings": positions,
        "rms_norm_eps": facts.real("attention.layer_norm_rms_epsilon"),
        "rope_theta": base,
        **facts.rope_scaling(tensors, base, size, positions),
        "hidden_act": "silu",
        "vocab_size": _embedding_rows(facts, tensors),
        "tie_word_embeddings": "output.weight" not in tensors,
        **facts.token_ids(),
    }
    if experts:
        config |= {"num_local_experts": experts, "num_experts_per_tok": facts.integer("expert_used_count")}
    facts.finish()
    return config


def _read_llama(facts: _Facts, tensors: Mapping[str, GgufTensor]) -> tuple[dict[str, Any], Callable[..., _Renamed]]:
    config = _llama_config(facts, tensors)
    heads, kv_heads, experts = (
        config.get(key, 0) for key in ("num_attention_heads", "num_key_value_heads", "num_local_experts")
    )
    top = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    modules = {
        "attn_norm": "input_layernorm", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm", "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj", "ffn_gate_inp": "block_sparse_moe.gate",
    }  # fmt: skip
    reordered = {"attn_q": ("self_attn.q_proj", heads), "attn_k": ("self_attn.k_proj", kv_heads)}

    def rename(tensor: GgufTensor) -> _Renamed:
        stem, _, kind = tensor.name.rpartition(".")
        block = _BLOCK.fullmatch(stem)
        if stem in top and kind == "weight":
            yield _one(tensor, f"{top[stem]}.weight")
        if not block or kind != "weight":
            return
        layer, module = f"model.layers.{block[1]}", block[2]
        single = _SINGLE_EXPERT.fullmatch(module)
        if module in modules:
            yield _one(tensor, f"{layer}.{modules[module]}.weight")
        elif module in reordered and len(tensor.shape) == 2:
            name, own = reordered[module]
            if tensor.shape[0] % (2 * own):
                raise CheckpointError(
                    f"{facts.doing}: {named(tensor.name)} has {tensor.shape[0]} rows, no even number for each of {own} "
                    "heads; the file contradicts itself: convert the model again"
                )
            yield _one(tensor, f"{layer}.{name}.weight", heads=own)
        elif single and experts:
            yield _one(tensor, f"{layer}.block_sparse_moe.experts.{single[2]}.{_EXPERT_MATRICES[single[1]]}.weight")
        elif experts and module.endswith("_exps") and len(tensor.shape) == 3:
            matrix = _EXPERT_MATRICES.get(module.removeprefix("ffn_").removesuffix("_exps"))
            if matrix is None:
                return
            if tensor.shape[0] != experts:
                raise CheckpointError(
                    f"{facts.doing}: {named(tensor.name)} stacks {tensor.shape[0]} experts, {facts.prefix}expert_count "
                    f"says {experts}; the file contradicts itself: convert the model again"
                )
            rows = tensor.shape[1]
            for expert in range(experts):
                name = f"{layer}.block_sparse_moe.experts.{expert}.{matrix}.weight"
                yield name, _view(tensor, name, tensor.shape[1:], first_row=expert * rows)

    return config, rename


_READERS: Mapping[str, _Reader] = {"phi2": _read_phi2, "llama": _read_llama}
