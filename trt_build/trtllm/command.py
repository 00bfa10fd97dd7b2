"""Runs `build_engine.py --backend tensorrt-llm`: reads the flags of `trt_build/trtllm_flags.py`, prints the result."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

from trt_build.errors import EngineError, VerificationFailed
from trt_build.manifest import MANIFEST_FILE
from trt_build.progress_line import ProgressLine
from trt_build.trtllm.build import Outcome, build_trtllm
from trt_build.trtllm.options import TrtllmOptions
from trt_build.trtllm.plan import TrtllmPlan
from trt_build.trtllm_flags import STAGES

_DEFAULTS = {field.name: field.default for field in dataclasses.fields(TrtllmOptions)}


def read_trtllm_options(arguments: argparse.Namespace, checkpoint: str, output: Path) -> TrtllmOptions:
    """The options that the command line gives; a flag that is missing keeps the default of TrtllmOptions. Raises
    EngineError for flags of the other backend."""
    others = {
        "--provider": arguments.provider is not None,
        "--kernels": arguments.kernels is not None,
    }
    strangers = [flag for flag, is_given in others.items() if is_given]
    if strangers:
        raise EngineError(f"reading the flags: {', '.join(strangers)}: for --backend onnxruntime only; leave them out")
    values = {
        name: getattr(arguments, name)
        for name in _DEFAULTS
        if getattr(arguments, name, None) is not None and name not in ("checkpoint", "output", "max_seq_len")
    }
    return TrtllmOptions(checkpoint=checkpoint, output=output, max_seq_len=arguments.max_sequence, **values)


def run_trtllm(arguments: argparse.Namespace, checkpoint: str) -> int:
    """Build as the command line asks, and print the result. Raises VerificationFailed if a figure of the comparison is
    past its limit."""
    options = read_trtllm_options(arguments, checkpoint, arguments.output)
    outcome = build_trtllm(options, ProgressLine(sys.stderr) if sys.stderr.isatty() else None)
    sys.stdout.write(f"{_json(outcome) if arguments.json else _summary(outcome, options)}\n")
    if outcome.verification is not None and outcome.verification.failures:
        raise VerificationFailed(
            f"verifying {options.output} ({options.precision}): {'; '.join(outcome.verification.failures)}; "
            "the result is in its engine.json"
        )
    return 0


def _json(outcome: Outcome) -> str:
    engine, checkpoint = outcome.engine, outcome.checkpoint
    return json.dumps(
        {
            "plan": outcome.plan.to_json(),
            "checkpoint": None if checkpoint is None else str(checkpoint),
            "engine": None
            if engine is None
            else json.loads((engine.folder / MANIFEST_FILE).read_text(encoding="utf-8")),
        },
        indent=2,
    )


def _summary(outcome: Outcome, options: TrtllmOptions) -> str:
    lines = plan_lines(outcome.plan)
    if outcome.checkpoint is not None:
        lines.append(f"{outcome.checkpoint}: written")
    if outcome.engine is not None:
        manifest = outcome.engine.manifest
        lines.append(
            f"{outcome.engine.folder}: {outcome.engine.num_bytes / 1e6:.1f} MB for {manifest.gpu.name or 'a GPU'}, "
            f"batches of {manifest.max_batch}, context {manifest.max_sequence} tokens"
        )
    if outcome.verification is not None:
        report = outcome.verification.report
        lines.append(
            f"against the reference: mean KL {report.mean_kl:.2e} scored and {report.mean_decoded_kl:.2e} decoded, "
            f"perplexity {report.perplexity_increase:+.2%}, top-1 {report.top1_agreement:.1%} of {report.num_tokens}"
        )
    elif options.until == STAGES[-1]:
        lines.append("not compared with the reference")
    return "\n".join(lines)


def plan_lines(plan: TrtllmPlan) -> list[str]:
    """The lines that describe a planned engine."""
    ranks = f"{len(plan.rank_bytes)} rank(s) of up to {plan.largest_rank_bytes / 1e6:.1f} MB"
    return [
        f"{plan.family} {plan.precision} ({plan.quant_algo or plan.dtype}): {ranks}, "
        f"{plan.average_bits_per_weight:.2f} bits per weight",
        f"keys and values {plan.kv_bytes_per_token / 1e3:.1f} kB a token and rank, context {plan.max_sequence} tokens; "
        f"writing the checkpoint takes up to {plan.conversion_bytes / 1e6:.0f} MB of memory",
    ]
