"""The phixtral checkpoint that a merge writes: its config.json, its tensors, and the model that each is taken from.

  from expert e     transformer.h.{i}.mlp.fc1|fc2           -> transformer.h.{i}.moe.mlp.{e}.fc1|fc2
  from the prompts  gate rows                               -> transformer.h.{i}.moe.gate.weight
  from the base     embedding, norms, attention, head       -> under the same name

The layout is that of mlabonne/phixtral-4x2_8 (model_type phi-msft). Its auto_map is left out: it names Python files
that do not travel with the merged checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from export.architecture import Architecture
from export.checkpoint.safetensors_header import FLOAT_LABELS, numpy_dtype
from export.checkpoint.shard_writer import PlannedTensor
from export.checkpoint.tensor_table import CHUNK_ELEMENTS, Join, Part, Role
from export.errors import CheckpointError, MergeError
from export.families import Model, phixtral
from export.floats import all_finite
from export.merge.config import ExpertSource

_DTYPE_NAMES = {label: name for name, label in FLOAT_LABELS.items()}


def config_json(architecture: Architecture, dtype: str, pad_token_id: int | None = None) -> dict[str, Any]:
    """The config.json of the merged checkpoint. `dtype` is a safetensors label. The token ids are those of the base,
    after `export.tokenizer.settings` has joined its files, so that a program that reads only config.json finds them."""
    ids = architecture.eos_token_ids
    end = ids[0] if len(ids) == 1 else list(ids) or None
    stated = {"bos_token_id": architecture.bos_token_id, "eos_token_id": end, "pad_token_id": pad_token_id}
    tokens = {name: value for name, value in stated.items() if value is not None}
    heads, width = architecture.num_kv_heads, architecture.ffn_size
    return {
        "activation_function": "gelu_new",
        "architectures": ["PhiForCausalLM"],
        "attn_pdrop": 0.0,
        **tokens,
        "embd_pdrop": 0.0,
        "flash_attn": False,
        "flash_rotary": False,
        "fused_dense": False,
        "img_processor": None,
        "initializer_range": 0.02,
        "layer_norm_epsilon": architecture.norm_epsilon,
        "model_type": "phi-msft",
        "n_embd": architecture.hidden_size,
        "n_head": architecture.num_heads,
        "n_head_kv": None if heads == architecture.num_heads else heads,
        "n_inner": None if width == 4 * architecture.hidden_size else width,
        "n_layer": architecture.num_layers,
        "n_positions": architecture.max_positions,
        "num_experts_per_tok": architecture.experts_per_token,
        "num_local_experts": architecture.num_experts,
        "resid_pdrop": 0.1,
        "rotary_dim": architecture.rotary_dim,
        "tie_word_embeddings": False,
        "torch_dtype": _DTYPE_NAMES[dtype],
        "vocab_size": architecture.vocab_size,
    }


@dataclass(frozen=True, kw_only=True)
class MergedTensor:
    """One tensor of the merged checkpoint: the row `row` of the table of the expert `expert`, or of the base if that is
    None. A gate has no row."""

    planned: PlannedTensor
    layer: int | None
    expert: int | None
    row: str | None


def merged_tensors(architecture: Architecture, dtype: str) -> list[MergedTensor]:
    """All tensors of the merged checkpoint, in the order of phixtral's table."""
    tensors = []
    for spec in phixtral.FAMILY.tensors(architecture, ()):
        layer = int(spec.name.split(".")[2]) if spec.name.startswith("transformer.h.") else None
        for index, part in enumerate(spec.parts):
            planned = PlannedTensor(name=part.name, dtype=dtype, shape=part.shape)
            expert = index if spec.join is Join.STACK else None
            row = None if spec.role is Role.ROUTER else part.name.replace(f".moe.mlp.{index}.", ".mlp.")
            tensors.append(MergedTensor(planned=planned, layer=layer, expert=expert, row=row))
    return tensors


@dataclass(frozen=True, kw_only=True)
class MergeSources:
    """The opened models of a merge, and the gates: layer -> [E, H] in the output dtype."""

    base: Model
    experts: Sequence[Model]
    settings: Sequence[ExpertSource]
    gates: Mapping[int, npt.NDArray[Any]]
    seed: int

    def chunks(self, tensor: MergedTensor) -> Iterator[npt.NDArray[Any]]:
        """Yield a tensor's values in the planned dtype, row-major, at most CHUNK_ELEMENTS at a time.

        Raises CheckpointError for a value that is NaN or infinite, MergeError for one that is too large for the dtype.
        """
        dtype = tensor.planned.dtype
        if tensor.row is None:
            assert tensor.layer is not None  # merged_tensors gives every gate its layer
            yield self.gates[tensor.layer]
        elif tensor.expert is None:
            yield from _plain_chunks(self.base, tensor.row, dtype)
        elif _is_plain(self.settings[tensor.expert]):
            yield from _plain_chunks(self.experts[tensor.expert], tensor.row, dtype)
        else:
            yield from self._altered_chunks(tensor, tensor.expert, tensor.row)

    def _altered_chunks(self, tensor: MergedTensor, expert: int, row: str) -> Iterator[npt.NDArray[Any]]:
        """Yield the values of an expert's tensor with noise added, then multiplied by the residual scale if it is the
        weight or bias of fc2, which compute the expert's output."""
        setting = self.settings[expert]
        scale = np.float32(setting.residual_scale if ".mlp.fc2." in row else 1.0)
        rng = np.random.default_rng([self.seed, expert, *tensor.planned.name.encode()])
        for part, rows in _row_slices(self.experts[expert], row):
            values = self.experts[expert].weights.checkpoint.read_float32(part.name, rows)
            if setting.noise_scale:
                values = values + np.float32(setting.noise_scale) * rng.standard_normal(values.shape, dtype=np.float32)
            yield cast(values * scale, tensor.planned.dtype, tensor.planned.name)


def _is_plain(setting: ExpertSource) -> bool:
    return setting.noise_scale == 0.0 and setting.residual_scale == 1.0


def cast(values: npt.NDArray[Any], dtype: str, name: str) -> npt.NDArray[Any]:
    """Convert finite values to another float dtype, rounding to nearest even. Raises MergeError if one is too large."""
    with np.errstate(over="ignore"):
        converted = values.astype(numpy_dtype(dtype), copy=False)
    if not all_finite(converted):
        largest = float(np.abs(values).max())
        raise MergeError(
            f"merging {name}: a value of magnitude {largest:g} does not fit {_DTYPE_NAMES[dtype]}; "
            "set dtype to bfloat16 or float32"
        )
    return converted


def _row_slices(model: Model, row: str) -> Iterator[tuple[Part, slice]]:
    """Yield a table row in pieces of at most CHUNK_ELEMENTS values: a part, and the rows of it."""
    for part in model.weights.table[row].parts:
        step = max(1, CHUNK_ELEMENTS // max(1, math.prod(part.shape[1:])))
        for start in range(0, part.shape[0], step):
            yield part, slice(start, min(start + step, part.shape[0]))


def _plain_chunks(model: Model, row: str, dtype: str) -> Iterator[npt.NDArray[Any]]:
    """Yield the values of a table row in `dtype`. If they are stored in that dtype, they are copied byte for byte."""
    checkpoint = model.weights.checkpoint
    for part, rows in _row_slices(model, row):
        if checkpoint.tensors[part.name].dtype != dtype:
            yield cast(checkpoint.read_float32(part.name, rows), dtype, row)
            continue
        values = checkpoint.read(part.name, rows)
        if not all_finite(values):
            raise CheckpointError(
                f"merging {part.name} from {checkpoint.tensors[part.name].shard}: it holds values that are NaN or "
                "infinite; the checkpoint is damaged or its training diverged: download it again or leave it out"
            )
        yield values
