"""The options of a TensorRT-LLM build, and the checks that refuse impossible options before any work is done."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from export.architecture import Architecture
from export.checkpoint.tensor_table import Role
from export.errors import listing
from export.families import Model
from export.quantize.recipe import GPTQ, NEAREST
from export.trtllm.checkpoint import DEFAULT_SM, CheckpointOptions
from export.trtllm.parallel import Parallelism
from trt_build.calibration import Calibration
from trt_build.comparison.parity import MIN_TOKENS
from trt_build.errors import EngineError
from trt_build.machine.readings import MPIRUN, Machine
from trt_build.trtllm_flags import STAGES

GROUPWISE = ("int4_gptq", "int4_awq")
SUPPORTED = ("1.0", "1.1", "1.2")  # later releases have no engines: NVIDIA/TensorRT-LLM#15907, #15918


@dataclass(frozen=True, kw_only=True)
class TrtllmOptions:
    """The options of a build. `checkpoint` is the source; `trtllm_checkpoint` is the folder of the TensorRT-LLM
    checkpoint that is written from it (None: beside the output). `gpu_sm` is the compute capability of the GPU to build
    for, 90 for 9.0 (None: that of this machine's GPU, or SM 80 if it has none). `kv_cache_fraction` is the share of the
    GPU's free memory that serving gives to keys and values. With `keep_all_experts` the engine has the experts that can
    never be chosen too. `until` names the last stage to run. With
    `unchecked` the rank files are not compared with the checkpoint. `calibration` says by which method the codes of
    group-wise precisions are found, and over which text."""

    checkpoint: str
    output: Path
    precision: str = "int4"
    dtype: str | None = None
    group_size: int | None = None
    plain_weights: bool = False
    experts_per_token: int | None = None
    keep_all_experts: bool = False
    tp_size: int = 1
    pp_size: int = 1
    moe_tp_size: int | None = None
    moe_ep_size: int | None = None
    gpu_sm: int | None = None
    max_batch_size: int = 32
    max_num_tokens: int = 8192  # tokens of all sequences in a step; the library's default
    max_seq_len: int | None = None
    kv_cache_fraction: float = 0.9
    workers: int = 1
    until: str = "verify"
    trtllm_checkpoint: Path | None = None
    verify_tokens: int = 2048
    unchecked: bool = False
    calibration: Calibration = field(default_factory=Calibration)

    @property
    def parallel(self) -> Parallelism:
        return Parallelism(
            tp_size=self.tp_size, pp_size=self.pp_size, moe_tp_size=self.moe_tp_size, moe_ep_size=self.moe_ep_size
        )

    @property
    def checkpoint_folder(self) -> Path:
        """The folder of the TensorRT-LLM checkpoint."""
        output = self.output.resolve() if self.output.name in ("", "..") else self.output  # path that ends with a name
        return self.trtllm_checkpoint or output.with_name(f"{output.name}.checkpoint")

    def sm(self, machine: Machine) -> int:
        """The compute capability of the GPU to build for, 90 for 9.0."""
        if self.gpu_sm is not None:
            return self.gpu_sm
        return machine.gpus[0].sm if machine.gpus else DEFAULT_SM

    def checkpoint_options(
        self,
        machine: Machine,
        tokenizer_size: int,
        left_out: tuple[int, ...],
        calibration: Mapping[str, Any] | None = None,
    ) -> CheckpointOptions:
        """The options of the TensorRT-LLM checkpoint. `tokenizer_size` is the number of ids that stand for text;
        `left_out` are the experts that no layer can choose; `calibration` says over which text codes are solved."""
        return CheckpointOptions(
            precision=self.precision,
            dtype=self.dtype,
            parallel=self.parallel,
            group_size=self.group_size,
            sm=self.sm(machine),
            plain=self.plain_weights,
            mask_from=tokenizer_size,
            left_out=left_out,
            calibration=calibration,
        )


def check_options(options: TrtllmOptions, model: Model, machine: Machine) -> None:
    """Refuse options that the library or the machine would refuse later, or with which answers would be wrong.

    `export.trtllm.checkpoint.plan_checkpoint` checks the layout of the checkpoint. Raises one EngineError that lists
    every problem.
    """
    problems = [
        *_method_problems(options),
        *_value_problems(options, model.architecture),
        *_folder_problems(options, model.weights.checkpoint.folder),
        *_model_problems(options, model),
        *_machine_problems(options, machine),
    ]
    if problems:
        raise EngineError(f"planning a TensorRT-LLM engine of {options.checkpoint}:{listing(problems)}")


def _method_problems(options: TrtllmOptions) -> Iterator[str]:
    method = options.calibration.chosen()
    if method == NEAREST:
        yield "--method nearest is for --backend onnxruntime; take search or gptq"
    if method == GPTQ and options.precision not in GROUPWISE:
        yield (
            f"--method gptq and --calibrate are for --precision {' and '.join(GROUPWISE)}, whose scales are for "
            f"groups; found {options.precision}"
        )


def _value_problems(options: TrtllmOptions, facts: Architecture) -> Iterator[str]:
    if options.until not in STAGES:
        yield f"--until is {options.until!r}, expected {', '.join(STAGES)}"
    for name in ("max_batch_size", "max_num_tokens", "workers"):
        value = getattr(options, name)
        if value < 1:
            yield f"--{name.replace('_', '-')} is {value}, expected 1 or more"
    if options.max_num_tokens < options.max_batch_size:
        yield (
            f"--max-num-tokens is {options.max_num_tokens}, expected at least --max-batch-size "
            f"{options.max_batch_size}: every sequence of a step adds a token"
        )
    if not 0 < options.kv_cache_fraction < 1:
        yield f"--kv-cache-fraction is {options.kv_cache_fraction}, expected a number between 0 and 1"
    if options.max_seq_len is not None and not 1 < options.max_seq_len <= facts.max_positions:
        yield f"--max-seq-len is {options.max_seq_len}, expected 2 to {facts.max_positions}, the model's own"
    longest = min(options.max_seq_len or facts.max_positions, options.max_num_tokens + 1)
    compared = min(options.verify_tokens, longest - 1)
    if options.until == STAGES[-1] and compared < MIN_TOKENS:
        yield (
            f"{compared} tokens would be compared with the reference, expected at least {MIN_TOKENS}; ask for more "
            "with --verify-tokens, or for longer sequences, or stop with --until engine"
        )
    if facts.sliding_window is not None and (options.max_seq_len or facts.max_positions) > facts.sliding_window:
        yield (
            f"the model's attention sees only the last {facts.sliding_window} positions, and the engine's network sees "
            f"all positions; build it with --max-seq-len {facts.sliding_window} or less, where that is the same"
        )


def _folder_problems(options: TrtllmOptions, source: Path) -> Iterator[str]:
    for flag, taken in (("--output", options.output), ("--checkpoint", source)):
        if options.checkpoint_folder.resolve() == taken.resolve():
            yield (
                f"the library's form of the checkpoint would lie in {options.checkpoint_folder}, which is {flag}; name "
                "another folder with --trtllm-checkpoint"
            )


def _model_problems(options: TrtllmOptions, model: Model) -> Iterator[str]:
    network, facts = model.family.trtllm_network(), model.architecture
    if options.workers > 1 and network.module is not None:
        yield (
            f"--workers is {options.workers}: trtllm-build starts workers that do not know moeship's own "
            f"{network.architecture}; use --workers 1, which builds the ranks one after the other"
        )
    rows = -(-facts.vocab_size // max(1, options.tp_size)) * options.tp_size
    if rows > facts.vocab_size and not has_biased_head(model):
        yield (
            f"the vocabulary of {facts.vocab_size} rows is padded to {rows} for tp_size {options.tp_size}, and this "
            "model's head has no bias that would keep the rows that were added from being sampled; use a tp_size that "
            f"divides {facts.vocab_size}"
        )


def has_biased_head(model: Model) -> bool:
    """Whether the head has a bias. Such a bias can keep ids that stand for no text from being sampled."""
    head = [spec for spec in model.weights.table.values() if spec.role is Role.HEAD]
    return any(spec.name.removesuffix("weight") + "bias" in model.weights.table for spec in head)


def _machine_problems(options: TrtllmOptions, machine: Machine) -> Iterator[str]:
    version = machine.tensorrt_llm
    if version is not None and not version.startswith(tuple(f"{line}." for line in SUPPORTED)):
        yield (
            f"TensorRT-LLM {version} is installed, engines are built with {SUPPORTED[0]} to {SUPPORTED[-1]}, the last "
            "releases that build engines; use one of these, or 'moeship package --backend llmapi' for later releases"
        )
    if not machine.gpus or options.until not in STAGES[2:]:
        return
    found = ", ".join(f"{gpu.name} (SM {gpu.sm})" for gpu in machine.gpus)
    if len({gpu.sm for gpu in machine.gpus}) > 1:
        yield (
            f"this machine has {found}, and CUDA chooses on which of them an engine is built; make GPUs of one kind "
            "visible, by their UUIDs in CUDA_VISIBLE_DEVICES"
        )
    if options.gpu_sm is not None and all(gpu.sm != options.gpu_sm for gpu in machine.gpus):
        yield (
            f"--gpu-sm is {options.gpu_sm} and this machine has {found}: an engine is built on the GPU that it is "
            "for; leave --gpu-sm out, or stop with --until checkpoint and finish there"
        )
    ranks, gpus = options.parallel.world_size, len(machine.gpus) if machine.visible is None else machine.visible
    if options.until == STAGES[-1] and ranks > gpus:
        yield (
            f"an engine of {ranks} ranks needs {ranks} GPUs, and this machine has {found}: stop with --until engine, "
            "and run the same command without that flag on a machine with enough GPUs"
        )
    elif options.until == STAGES[-1] and ranks > 1 and shutil.which(MPIRUN) is None:
        yield (
            f"an engine of {ranks} ranks is run by {MPIRUN}, which is not on PATH: install Open MPI, or stop with "
            "--until engine"
        )
