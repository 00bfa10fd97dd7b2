"""Which kernels a decode step runs on the GPU, and how long the GPU waits between them.

    python ci/gpu/profile_decode.py ENGINE --batch 1

Needs onnxruntime-gpu, numpy, and a CUDA build of torch. torch's profiler records every kernel of the process through
CUPTI, so it sees those of ONNX Runtime. Prints the time of a step, the time in which the GPU computed, and the kernels
by their share of it. Exit status 0 done, 2 wrong input.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from device_engine import SERVING_GRAPH, Decoder, UsageError, check_device, open_graph, read_facts
from onnxruntime_cuda import WARM_UP_STEPS, positive

NAME_CHARACTERS = 90


def profile(options: argparse.Namespace) -> str:
    """Profile decode steps; returns the text of the report. Raises UsageError."""
    facts = read_facts(options.engine, golden=False)
    capacity = options.prompt + 2 * WARM_UP_STEPS + 2 * options.steps
    if capacity > facts.max_sequence:
        raise UsageError(f"profiling {facts.folder}: prompt and steps exceed its context of {facts.max_sequence}")
    if not torch.cuda.is_available():
        raise UsageError(f"looking for the GPU: torch {torch.__version__} sees none; install its build for CUDA")
    torch.zeros(1, device="cuda")  # starts CUDA with torch's libraries before ONNX Runtime loads its own
    check_device("cuda")
    decoder = Decoder(open_graph(facts.folder / SERVING_GRAPH, "cuda"), facts, "cuda", options.batch, capacity)
    rng = np.random.default_rng(0)

    def steps(count: int) -> float:
        """Mean seconds of a decode step over `count` steps."""
        started = time.perf_counter()
        for _ in range(count):
            decoder.run(rng.integers(0, facts.vocab_size, (options.batch, 1)))
        return (time.perf_counter() - started) / count

    decoder.run(rng.integers(0, facts.vocab_size, (options.batch, options.prompt)))
    steps(2 * WARM_UP_STEPS)
    step_s = steps(options.steps)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as record:
        steps(options.steps)
    counts: dict[str, int] = defaultdict(int)
    seconds: dict[str, float] = defaultdict(float)
    for event in record.profiler.kineto_results.events():
        if event.device_type() == torch.autograd.DeviceType.CUDA:
            counts[event.name()] += 1
            seconds[event.name()] += event.duration_ns() / 1e9
    busy_s = sum(seconds.values()) / options.steps
    launches = sum(counts.values()) / options.steps
    lines = [
        f"{facts.model} {facts.precision}, batch {options.batch}, after {options.prompt} tokens: {step_s * 1e3:.2f} ms "
        f"a step, in {busy_s * 1e3:.2f} ms of it the GPU computes; {launches:.0f} launches"
    ]
    for name in sorted(seconds, key=lambda name: -seconds[name])[: options.kernels]:
        each_s = seconds[name] / options.steps
        share = each_s / busy_s
        lines.append(
            f"  {each_s * 1e6:8.1f} us {counts[name] / options.steps:6.1f} x {share:6.1%}  {name[:NAME_CHARACTERS]}"
        )
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path, metavar="ENGINE", help="engine folder built with --provider cuda")
    parser.add_argument("--batch", type=positive, default=1, metavar="B")
    parser.add_argument("--prompt", type=positive, default=512, metavar="TOKENS")
    parser.add_argument("--steps", type=positive, default=8, metavar="N")
    parser.add_argument("--kernels", type=positive, default=18, metavar="N", help="number of kernels to print")
    try:
        print(profile(parser.parse_args()))
    except UsageError as refusal:
        print(refusal, file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
