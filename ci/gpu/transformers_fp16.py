"""Time the reference in float16 on a GPU: what an engine's speed is compared with.

    python ci/gpu/transformers_fp16.py CHECKPOINT --output benchmarks/results

transformers' own attention, norms and head, the mixture expert by expert as in tests/torch_reference:
no transformers release has a phixtral of its own. Prompts are prefilled and tokens decoded as in onnxruntime_cuda.py,
without sampling. Needs moeship with the extra `transformers` and a CUDA build of torch; loads the checkpoint in float32
in main memory first. Exit status 0 done, 2 wrong input.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from onnxruntime_cuda import PREFILL_RUNS, WARM_UP_STEPS, describe_device, positive, report_file

# tests/torch_reference makes transformers' model of a checkpoint.
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

from torch_reference import load_reference

from export.checkpoint.folder import open_checkpoint
from export.command import run_command
from export.errors import ConfigError, OutputError
from export.families import read_model


def measure(reference: torch.nn.Module, device: str, batch: int, prompt: int, steps: int) -> dict[str, Any]:
    """Measure one row of the report, as onnxruntime_cuda.py does: median seconds of a prefill and of a decode step."""
    vocab = reference.config.vocab_size

    def timed(call: Callable[[], Any]) -> tuple[float, Any]:
        synchronize(device)
        started = time.perf_counter()
        result = call()
        synchronize(device)
        return time.perf_counter() - started, result

    def prefill() -> Any:  # noqa: ANN401 - transformers' cache
        ids = torch.randint(0, vocab, (batch, prompt), device=device)
        return reference(ids, use_cache=True, logits_to_keep=1).cache

    def step() -> None:
        reference(torch.randint(0, vocab, (batch, 1), device=device), cache=cache, use_cache=True)

    with torch.no_grad():
        prefills = [timed(prefill) for _ in range(1 + PREFILL_RUNS)]
        cache = prefills[-1][1]
        times = [timed(step)[0] for _ in range(WARM_UP_STEPS + steps)]
    prefill_s, step_s = statistics.median(s for s, _ in prefills[1:]), statistics.median(times[WARM_UP_STEPS:])
    return {
        "batch": batch, "prompt_tokens": prompt, "prefill_s": prefill_s,
        "prefill_tokens_per_s": batch * prompt / prefill_s,
        "steps": steps, "step_s": step_s, "decode_tokens_per_s": batch / step_s,
    }  # fmt: skip


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def run(options: argparse.Namespace) -> int:
    if not options.output.is_dir():
        raise OutputError(f"writing into {options.output}: no such folder")
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"looking for the GPU: torch {torch.__version__} sees none; install its build for CUDA")
    model = read_model(open_checkpoint(options.checkpoint))
    reference = load_reference(model).half().to(options.device)
    rows = [measure(reference, options.device, batch, options.prompt, options.steps) for batch in options.batch]
    moment = datetime.datetime.now(datetime.UTC)
    device = describe_device(options.device)
    report = {
        "device": device, "time": moment.isoformat(timespec="seconds"), "torch": torch.__version__,
        "model": Path(options.checkpoint).name, "speed": rows,
    }  # fmt: skip
    path = report_file(options.output, "transformers_fp16", device, moment)
    path.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    for row in rows:
        print(f"batch {row['batch']:>3}: prefill {row['prefill_tokens_per_s']:.0f} tokens/s, "
              f"decode {row['decode_tokens_per_s']:.1f} tokens/s")  # fmt: skip
    print(path)
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="checkpoint folder")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for the JSON")
    parser.add_argument("--batch", nargs="+", type=positive, default=[1, 32], metavar="B")
    parser.add_argument("--prompt", type=positive, default=512, metavar="TOKENS")
    parser.add_argument("--steps", type=positive, default=64, metavar="N", help="tokens decoded after the prompt")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args()
    return run_command(lambda: run(options))


if __name__ == "__main__":
    sys.exit(main())
