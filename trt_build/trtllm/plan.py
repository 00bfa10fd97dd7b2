"""Computes the plan of a TensorRT-LLM engine from its planned checkpoint: bytes of each rank, keys and values, memory.

An engine stores the weights of a rank as the checkpoint does, so both files have the same size within a few megabytes.
Activations and the library's workspaces need memory in addition. How much depends on the kernels that the library
chooses, which are not known before the build.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from export.calibration.layers import Wanted
from export.calibration.work import Work, work_of
from export.checkpoint.safetensors_header import FLOAT_LABELS, itemsize
from export.checkpoint.tensor_table import Role, TensorSpec
from export.quantize.recipe import GPTQ
from export.routing import RoutingReport, left_out_note
from export.trtllm.carry import kept_grid
from export.trtllm.checkpoint import CheckpointPlan
from export.trtllm.converter import rank_file
from export.trtllm.layout import Form
from trt_build.trtllm.options import TrtllmOptions


@dataclass(frozen=True, kw_only=True)
class TrtllmPlan:
    """The figures of a planned engine. `rank_bytes` are the sizes of the checkpoint's files by rank;
    `weights_bytes_per_token` is what decoding one token reads of the weights on all ranks together;
    `kv_bytes_per_token` is the size of one position of the cache on the rank with the largest cache;
    `conversion_bytes` is the peak resident memory while the checkpoint is written; `gptq` is what GPTQ takes for all
    codes that it can solve, and `is_calibrated` whether this build solves codes."""

    family: str
    architecture: str
    precision: str
    quant_algo: str | None
    dtype: str
    group_size: int | None
    parallel: Mapping[str, int]
    max_sequence: int
    rank_bytes: tuple[int, ...]
    average_bits_per_weight: float
    weights_bytes_per_token: int
    source_bytes: int
    conversion_bytes: int
    kv_bytes_per_token: int
    gptq: Work
    is_calibrated: bool
    notes: tuple[str, ...]

    @property
    def largest_rank_bytes(self) -> int:
        return max(self.rank_bytes)

    def sequences_in(self, memory_bytes: int, kv_cache_fraction: float) -> int:
        """Number of sequences of max_sequence tokens whose keys and values fit into the fraction `kv_cache_fraction` of
        the GPU memory that the weights leave. Activations and workspaces are not known before the build and not
        counted."""
        left = (memory_bytes - self.largest_rank_bytes) * kv_cache_fraction
        return max(0, int(left // (self.kv_bytes_per_token * self.max_sequence)))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        files = {rank_file(rank): num_bytes for rank, num_bytes in enumerate(self.rank_bytes)}
        return {**dataclasses.asdict(self), "files": files, "checkpoint_bytes": sum(self.rank_bytes)}


def plan_trtllm(
    checkpoint: CheckpointPlan, options: TrtllmOptions, max_sequence: int, routing: RoutingReport | None
) -> TrtllmPlan:
    """Compute the plan of an engine from a planned checkpoint. Reads no weights."""
    model, config = checkpoint.model, checkpoint.config
    facts, parallel = model.architecture, options.parallel
    tensors = [tensor for rank in checkpoint.headers for tensor in checkpoint.layout.tensors(rank)]
    num_weights = sum(_num_written(spec, checkpoint) for spec in model.weights.table.values())
    layers = len(parallel.layers(0, facts.num_layers))
    heads = max(facts.num_kv_heads, parallel.tp_size) // parallel.tp_size
    wanted = solvable(checkpoint)
    grouped = "group_size" in config["quantization"]
    return TrtllmPlan(
        family=model.family.name,
        architecture=config["architecture"],
        precision=options.precision,
        quant_algo=config["quantization"]["quant_algo"],
        dtype=config["dtype"],
        group_size=config["quantization"]["group_size"] if grouped else None,
        parallel=config["mapping"],
        max_sequence=max_sequence,
        rank_bytes=tuple(checkpoint.rank_bytes.values()),
        average_bits_per_weight=8 * sum(tensor.num_bytes for tensor in tensors) / num_weights,
        weights_bytes_per_token=_bytes_per_token(checkpoint),
        source_bytes=sum(stored.num_bytes for stored in model.weights.checkpoint.tensors.values()),
        conversion_bytes=checkpoint.conversion_bytes(),
        kv_bytes_per_token=2 * layers * heads * facts.head_size * itemsize(FLOAT_LABELS[config["dtype"]]),
        gptq=work_of(model, wanted, options.calibration.most_tokens),
        is_calibrated=bool(wanted) and options.calibration.chosen() == GPTQ,
        notes=_notes(checkpoint, routing, grouped=grouped),
    )


def solvable(checkpoint: CheckpointPlan) -> dict[str, Wanted]:
    """The rows whose codes GPTQ can solve: those with a scale for each group."""
    facts, left_out = checkpoint.model.architecture, checkpoint.options.left_out
    written = tuple(expert for expert in range(facts.num_experts) if expert not in left_out)
    table = checkpoint.model.weights.table
    return {
        job.source: Wanted(
            bits=job.bits,
            block_size=job.group_size,
            experts=written if table[job.source].stacks_experts else (0,),
            scale_type=checkpoint.config["dtype"],
        )
        for job in checkpoint.groupwise
    }


def _num_written(spec: TensorSpec, checkpoint: CheckpointPlan) -> int:
    """Number of values that are written for one row of the tensor table, without experts that are left out."""
    experts = checkpoint.model.architecture.num_experts
    if spec.role is not Role.ROUTER and not spec.stacks_experts:
        return spec.num_elements
    return spec.num_elements * (experts - len(checkpoint.options.left_out)) // experts


def _bytes_per_token(checkpoint: CheckpointPlan) -> int:
    """Bytes of weights that decoding one token reads on all ranks: one row of the embedding, K of E experts, all of
    anything else."""
    facts, total = checkpoint.model.architecture, 0.0
    for tensor in (tensor for rank in checkpoint.headers for tensor in checkpoint.layout.tensors(rank)):
        name, share = tensor.name, 1.0
        if name.startswith("transformer.vocab_embedding."):
            share = 1 / facts.vocab_size
        elif facts.is_moe and (".mlp.fc." in name or ".mlp.proj." in name):
            share = facts.experts_per_token / checkpoint.config["moe"]["num_experts"]
        total += tensor.num_bytes * share
    return round(total)


def _packed_notes(checkpoint: CheckpointPlan) -> list[str]:
    """What becomes of the weights that the checkpoint stores packed; empty if there are none."""
    weights = checkpoint.model.weights
    packed = [
        job
        for job in checkpoint.layout.jobs
        if any(part.packed_in(weights.checkpoint) for part in weights.table[job.source].parts)
    ]
    kept = sum(kept_grid(weights, job) is not None for job in packed)
    anew = sum(job.form is not Form.FLOAT for job in packed) - kept
    if not packed:
        return []
    said = f"the checkpoint packs its weights as {', '.join(weights.packed_labels())}: "
    said += f"{kept} keep their codes, {anew} are quantised anew and {len(packed) - kept - anew} stored as floats"
    return [said + ("; quantising anew adds an error to the packer's" if anew else "")]


def _notes(checkpoint: CheckpointPlan, routing: RoutingReport | None, *, grouped: bool) -> tuple[str, ...]:
    """Messages about the engine that a user should read before building it."""
    found, facts, left_out = [], checkpoint.model.architecture, set(checkpoint.options.left_out)
    sm = checkpoint.options.sm
    if left_out and routing:
        found.append(left_out_note(routing, {layer.layer: tuple(sorted(left_out)) for layer in routing.layers}))
    groups = {group for layer in routing.layers for group in layer.duplicate_groups} if routing else set()
    if (
        any(len(set(group) - left_out) > 1 for group in groups)
        and facts.num_experts - len(left_out) > facts.experts_per_token
    ):
        found.append(
            "some gate rows are equal: equal router logits go to the lowest expert index, in TensorRT-LLM (its plugin "
            "TopkLastDim) as in the reference; other runtimes may choose another expert"
        )
    found += _packed_notes(checkpoint)
    if sm >= 120 and checkpoint.config["quantization"]["quant_algo"] == "W4A16_AWQ":
        found.append(
            f"int4_awq on SM {sm}: TensorRT-LLM packs these weights when it loads them, and some releases pack "
            "them wrongly there (NVIDIA/TensorRT-LLM#11561); compare the engine with the reference before you serve it"
        )
    if (
        grouped
        and facts.is_moe
        and any(spec.name.endswith(".fc1.bias") for spec in checkpoint.model.weights.table.values())
    ):
        found.append(
            "experimental: group-wise int4 experts with biases and no gate have a code path in the library and no test "
            "there; compare the engine with the reference before you serve it"
        )
    return tuple(found)
