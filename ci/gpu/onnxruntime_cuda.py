"""Run CUDA engines on a GPU: parity, speed of prefill and decode, and their share of the memory's bandwidth.

    python ci/gpu/onnxruntime_cuda.py ENGINE... --output benchmarks/results

Needs onnxruntime-gpu, numpy and engine folders with a golden.npz from ci/gpu/write_golden.py; neither torch nor
moeship. Every engine is compared with its golden logits, scored whole and decoded through the cache; then prompts are
prefilled and tokens decoded at each batch size, without sampling, the logits left on the device. Bandwidth is measured
on the device in the same run. Everything goes into one JSON file, which is written again after every row, so that a
run that is cut off keeps what it measured. Exit status 0 done, 1 parity failed, 2 wrong input.

The first run of a batch size takes far longer than the next: ONNX Runtime times its kernels for the new shape. A row
has that time as `first_prefill_s` and `first_step_s`.

`--provider cpu` walks through the same steps on the CPU's kernels, to try the script where there is no GPU.
"""

from __future__ import annotations

import argparse
import datetime
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from device_engine import (
    GOLDEN_FILE,
    PROVIDERS,
    SERVING_GRAPH,
    Decoder,
    Facts,
    UsageError,
    check_device,
    on_device,
    open_graph,
    read_facts,
)
from golden import Golden, compare, read_golden

WARM_UP_STEPS = 4  # in the first runs of a shape ONNX Runtime times candidate kernels
PREFILL_RUNS = 3
COPY_RUNS = 10
FLOAT, FLOAT_BYTES = 1, 4  # TensorProto.FLOAT of ONNX, and the bytes of a value


def neg_model() -> bytes:
    """An ONNX model y = -x over float32 [n], written without the onnx package (protobuf wire format, onnx.proto)."""

    def number(field: int, value: int) -> bytes:
        return bytes([field << 3, value])

    def nested(field: int, content: bytes) -> bytes:
        return bytes([field << 3 | 2, len(content)]) + content

    shape = nested(2, nested(1, nested(2, b"n")))
    tensor = nested(2, nested(1, number(1, FLOAT) + shape))
    node = nested(1, b"x") + nested(2, b"y") + nested(4, b"Neg")
    ends = nested(11, nested(1, b"x") + tensor) + nested(12, nested(1, b"y") + tensor)
    return (
        number(1, 10)
        + nested(7, nested(1, node) + nested(2, b"copy") + ends)
        + nested(8, nested(1, b"") + number(2, 21))
    )


def measure_bandwidth(provider: str, num_bytes: int) -> float:
    """Memory bandwidth in bytes per second: an elementwise operation reads and writes `num_bytes`; the fastest run
    counts."""
    session = open_graph(neg_model(), provider)
    source = on_device(np.ones(num_bytes // FLOAT_BYTES, np.float32), provider)
    target = on_device(np.empty(num_bytes // FLOAT_BYTES, np.float32), provider)
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", source)
    binding.bind_ortvalue_output("y", target)
    fastest = float("inf")
    for _ in range(COPY_RUNS):
        started = time.perf_counter()
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        fastest = min(fastest, time.perf_counter() - started)
    return 2 * num_bytes / fastest


def experts_touched(num_experts: int, experts_per_token: int, batch: int) -> float:
    """Expected number of different experts that `batch` tokens choose if each chooses K of E at random."""
    return num_experts * (1 - (1 - experts_per_token / num_experts) ** batch) if num_experts else 0.0


def step_bytes(facts: Facts, golden: Golden, batch: int, length: int) -> float:
    """Bytes that a decode step reads: the weights of every layer, of experts only those that were chosen, one row of
    the embedding for each sequence, and the cache."""
    touched = experts_touched(facts.num_experts, facts.experts_per_token, batch)
    experts = golden.expert_bytes * touched / facts.num_experts if facts.num_experts else golden.expert_bytes
    embedding = golden.embedding_bytes / facts.vocab_size * batch
    return golden.other_bytes + experts + embedding + batch * length * facts.cache_bytes_per_token


def measure_speed(
    facts: Facts, golden: Golden, provider: str, batches: Sequence[int], prompt: int, steps: int, bandwidth: float
) -> Iterator[dict[str, Any]]:
    """One row a batch size: prefill of `prompt` tokens from an empty cache, then `steps` single tokens."""
    session = open_graph(facts.folder / SERVING_GRAPH, provider)
    rng = np.random.default_rng(0)
    for batch in batches:
        decoder = Decoder(session, facts, provider, batch, prompt + WARM_UP_STEPS + steps)
        ids = rng.integers(0, facts.vocab_size, (batch, prompt))
        prefills = []
        for _ in range(1 + PREFILL_RUNS):
            decoder.length = 0
            prefills.append(timed(decoder, ids))
        times = [timed(decoder, rng.integers(0, facts.vocab_size, (batch, 1))) for _ in range(WARM_UP_STEPS + steps)]
        prefill_s, step_s = statistics.median(prefills[1:]), statistics.median(times[WARM_UP_STEPS:])
        read = step_bytes(facts, golden, batch, prompt + WARM_UP_STEPS + steps // 2)
        yield {
            "batch": batch, "prompt_tokens": prompt, "first_prefill_s": prefills[0], "prefill_s": prefill_s,
            "prefill_tokens_per_s": batch * prompt / prefill_s, "first_step_s": times[0],
            "steps": steps, "step_s": step_s, "decode_tokens_per_s": batch / step_s,
            "bytes_per_step": read, "share_of_bandwidth": read / step_s / bandwidth,
        }  # fmt: skip
        del decoder


def timed(decoder: Decoder, ids: npt.NDArray[np.int64]) -> float:
    started = time.perf_counter()
    decoder.run(ids)
    return time.perf_counter() - started


# Report.


def describe_device(provider: str) -> str:
    """The first GPU's name, driver and memory, from nvidia-smi."""
    if provider == "cpu":
        return "CPU"
    words = ["nvidia-smi", "--id=0", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown GPU"


def report_file(output: Path, what: str, device: str, moment: datetime.datetime) -> Path:
    """The path of a report; its name contains what ran, the device and the date."""
    name = "-".join("".join(c if c.isalnum() else " " for c in device.partition(",")[0]).split()).lower()
    return output / f"{what}-{name}-{moment:%Y%m%dT%H%M%SZ}.json"


def run(options: argparse.Namespace) -> int:
    if not options.output.is_dir():
        raise UsageError(f"writing into {options.output}: no such folder")
    engines = [(facts, read_golden(facts.folder / GOLDEN_FILE)) for facts in map(read_facts, options.engines)]
    for facts, _ in engines:
        if options.prompt + WARM_UP_STEPS + options.steps > facts.max_sequence:
            raise UsageError(f"measuring {facts.folder}: prompt and steps exceed its context of {facts.max_sequence}")
    check_device(options.provider)
    import onnxruntime

    bandwidth = measure_bandwidth(options.provider, int(options.copy_gb * 1e9))
    moment = datetime.datetime.now(datetime.UTC)
    device = describe_device(options.provider)
    report: dict[str, Any] = {
        "device": device, "provider": options.provider, "time": moment.isoformat(timespec="seconds"),
        "onnxruntime": onnxruntime.__version__, "bandwidth_bytes_per_s": bandwidth, "engines": [],
    }  # fmt: skip
    path = report_file(options.output, "onnxruntime_cuda", device, moment)
    failed = False
    for facts, golden in engines:
        parity = compare(facts, golden, options.provider)
        speed: list[dict[str, Any]] = []
        report["engines"].append({"model": facts.model, "precision": facts.precision, "parity": parity, "speed": speed})
        write_report(path, report)
        failed = failed or bool(parity["failures"])
        print(parity_line(facts, parity), flush=True)
        sizes = (options.batch, options.prompt, options.steps)
        for row in measure_speed(facts, golden, options.provider, *sizes, bandwidth):
            speed.append(row)
            write_report(path, report)
            print(speed_line(row), flush=True)
    print(f"{device}: {bandwidth / 1e9:.0f} GB/s; {path}")
    return 1 if failed else 0


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Write all results so far, replacing the file by rename, so that it is complete at any time."""
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)


def parity_line(facts: Facts, parity: dict[str, Any]) -> str:
    verdict = "; ".join(parity["failures"]) or "within its limits"
    return (
        f"{facts.model} {facts.precision}: KL {parity['mean_kl']:.2e} scored, {parity['mean_decoded_kl']:.2e} decoded, "
        f"top-1 {parity['top1_agreement']:.2%}, routing {parity['routing_agreement']:.2%}: {verdict}"
    )


def speed_line(row: dict[str, Any]) -> str:
    return (
        f"  batch {row['batch']:>3}: prefill {row['prefill_tokens_per_s']:.0f} tokens/s, decode "
        f"{row['decode_tokens_per_s']:.1f} tokens/s, {row['share_of_bandwidth']:.0%} of the bandwidth"
    )


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive whole number")
    return int(text)


def read_options(words: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engines", nargs="+", type=Path, metavar="ENGINE", help="engine folder with golden.npz")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for the JSON")
    parser.add_argument("--batch", nargs="+", type=positive, default=[1, 32], metavar="B")
    parser.add_argument("--prompt", type=positive, default=512, metavar="TOKENS")
    parser.add_argument("--steps", type=positive, default=64, metavar="N", help="tokens decoded after the prompt")
    parser.add_argument(
        "--copy-gb", type=float, default=2.0, metavar="GB", help="size of the buffer for measuring bandwidth"
    )
    parser.add_argument("--provider", choices=PROVIDERS, default="cuda")
    return parser.parse_args(words)


def main() -> int:
    options = read_options()
    try:
        return run(options)
    except UsageError as refusal:
        print(refusal, file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
