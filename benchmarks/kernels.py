"""One layer's experts on the CPU by rows: moeship, ONNX Runtime, llama.cpp, ik_llama.cpp, and the processor's limits.

    python benchmarks/kernels.py --output benchmarks/results/kernels-PROCESSOR.json

The layer is a phixtral-4x2_8's: H 2560, F 10240, 4 experts of which 2 are chosen; int4 in blocks of 64 for moeship and
ONNX Runtime's QMoE, ggml's 4-bit types for the other two, which hold as many weights. Every row chooses the same two
experts, so that the bytes read are those of one row whatever their number; calls choose the one pair and the other in
turn, so that no cache holds them.

Each contender is a process of its own and sleeps while another works. A round waits a minute at most for other programs
to leave the cores idle. It measures what no kernel can exceed, the rate of reading memory and the rate of the
processor's int8 products, and then every contender at every number of rows. Each contender first makes calls for 40 ms
that do not count, because its threads can share a core just after they woke; then 12 calls count, or 2 at more than 16
rows. The figures, and the ratios to one row, are the medians of all counted calls; the best call is printed beside
them. Either rate of a round is that of the fastest of several turns (trt_build/machine/bandwidth.py, layer/peak.py),
and the rate of the run is the median of the rounds: a share of it is stated low rather than high. A picture is drawn
beside the JSON file.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from decode.machine import describe
from decode.rounds import await_quiet
from export.command import run_command
from export.errors import ConfigError, MoeshipError
from export.files.output import replace_file
from export.optional import optional_package
from layer.peak import Peak
from layer.process import NAMES, Contender, started
from layer.shape import WEIGHTS
from trt_build.machine.bandwidth import measure_read_bandwidth

BANDWIDTH_BYTES = 1 << 28
FEW_ROWS, CALLS_OF_FEW, CALLS_OF_MANY = 16, 12, 2
ROWS = (1, 2, 4, 8, 16, 32, 128, 512)

logger = logging.getLogger(__name__)


def benchmark(options: argparse.Namespace) -> int:
    """Measure, print and write the result; returns 1 if a contender could not run."""
    with ExitStack() as stack:
        peak = None if options.no_peak else Peak(Path(stack.enter_context(tempfile.TemporaryDirectory())))
        contenders, refused = [], {}
        for name in options.contenders:
            try:
                contenders.append(stack.enter_context(started(name, options.threads)))
            except MoeshipError as error:
                refused[name] = str(error)
                logger.info("%s is left out: %s", name, error)
        if not contenders:
            raise ConfigError(f"measuring kernels: no contender can run: {next(iter(refused.values()), 'none named')}")
        result = measure(contenders, peak, options.rows, options.rounds, options.threads, wait=not options.no_wait)
    result["not_run"] = refused
    print(report(result))
    if options.output:
        replace_file(options.output, json.dumps(result, indent=1) + "\n")
        draw(result, options.output.with_suffix(".svg"))
    return 1 if refused else 0


def measure(
    contenders: Sequence[Contender],
    peak: Peak | None,
    numbers: Sequence[int],
    rounds: int,
    threads: int,
    *,
    wait: bool = True,
) -> dict[str, Any]:
    """Measure the seconds of a layer by contender and number of rows, and the processor's limits, in each round. With
    `wait` a round first waits for idle cores."""
    seconds: dict[str, dict[int, list[float]]] = {one.name: {rows: [] for rows in numbers} for one in contenders}
    bandwidth, products = [], []
    for number in range(rounds):
        if wait:
            await_quiet(f"round {number + 1} of {rounds}")
        logger.info("round %d of %d", number + 1, rounds)
        bandwidth.append(measure_read_bandwidth(BANDWIDTH_BYTES, threads))
        if peak is not None:
            products.append(peak.measure(threads))
        for rows in numbers:
            for place in range(len(contenders)):
                contender = contenders[(place + number) % len(contenders)]
                calls = CALLS_OF_FEW if rows <= FEW_ROWS else CALLS_OF_MANY
                seconds[contender.name][rows] += contender.seconds(rows, calls)
    return {
        "benchmark": "kernels",
        "machine": describe(),
        "threads": threads,
        "rounds": rounds,
        "bandwidth": _spread(bandwidth),
        "int8_products": {"instructions": peak.instructions, **_spread(products)} if peak is not None else None,
        "bytes_of_two_experts": {contender.name: contender.num_bytes for contender in contenders},
        "facts": {contender.name: contender.facts for contender in contenders},
        "seconds": {name: {rows: _spread(found) for rows, found in by.items()} for name, by in seconds.items()},
    }


def _spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    low, high = ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]
    return {"median": statistics.median(ordered), "low": low, "high": high, "least": ordered[0], "most": ordered[-1]}


def report(result: Mapping[str, Any]) -> str:
    """The figures as a table: the median and the best call of each contender."""
    read, peak = result["bandwidth"]["median"], result["int8_products"]
    lines = [f"{result['machine']['processor']}, {result['threads']} threads, medians of {result['rounds']} rounds",
             f"reads {read / 1e9:.1f} GB/s (most {result['bandwidth']['most'] / 1e9:.1f})"]  # fmt: skip
    if peak is not None:
        lines.append(
            f"multiplies {peak['median'] / 1e9:.0f} G int8 a second (most {peak['most'] / 1e9:.0f}): "
            f"{peak['instructions']}"
        )
    lines.append("every row chooses the same two experts; G weights/s count a weight once for each row")
    lines.append(f"{'':20} rows        ms  x one row  G weights/s   GB/s  of reading  of peak   best ms")
    for name, by_rows in result["seconds"].items():
        first = next(iter(by_rows.values()))["median"]
        for rows, found in by_rows.items():
            seconds = found["median"]
            rate, products = result["bytes_of_two_experts"][name] / seconds, WEIGHTS * int(rows) / seconds
            of_peak = f"{products / peak['median']:8.0%}" if peak is not None else f"{'':8}"
            lines.append(
                f"{name:20} {rows:>4}  {seconds * 1e3:8.2f}  {seconds / first:9.2f}  {products / 1e9:11.1f}  "
                f"{rate / 1e9:5.1f}  {rate / read:10.0%} {of_peak}  {found['least'] * 1e3:8.2f}"
            )
    lines += [f"{name} not run: {reason}" for name, reason in result["not_run"].items()]
    return "\n".join(lines)


def draw(result: Mapping[str, Any], path: Path) -> None:
    """Draw a roofline: weights per second against rows, below the limits of memory bandwidth (a slope) and of int8
    products (a level)."""
    with optional_package("matplotlib", "drawing the benchmark", "bench"):
        from matplotlib.figure import Figure

    figure = Figure(figsize=(8.5, 6), layout="constrained")
    axes = figure.subplots()
    best, last = 0.0, 1
    for name, by_rows in result["seconds"].items():
        numbers = [int(rows) for rows in by_rows]
        rates = [WEIGHTS * rows / found["median"] / 1e9 for rows, found in zip(numbers, by_rows.values(), strict=True)]
        axes.plot(numbers, rates, marker="o", markersize=4, linewidth=2.5 if name.startswith("moeship") else 1.2,
                  label=name)  # fmt: skip
        best, last = max(best, *rates), max(last, *numbers)
    read, peak = result["bandwidth"]["median"] / 1e9, result["int8_products"]
    top = peak["median"] / 1e9 if peak is not None else best
    slope = read * WEIGHTS / min(result["bytes_of_two_experts"].values())
    corner = top / slope
    axes.plot([1, corner], [slope, top], color="#c0392b", linestyle="--", label=f"reading {read:.1f} GB/s")
    if peak is not None:
        axes.plot([corner, max(last, corner)], [top, top], color="black", linestyle="--",
                  label=f"{top:.0f} G int8 products/s, {peak['instructions']}")  # fmt: skip
    axes.set(xscale="log", yscale="log", xlabel="rows that are multiplied together, all by the same two experts",
             ylabel="G weights/s, times rows")  # fmt: skip
    axes.set_title(
        f"a phixtral layer's experts, 4 bits unless named: {result['machine']['processor']}, {result['threads']} "
        "threads, medians"
    )
    axes.legend(fontsize=8)
    axes.grid(visible=True, which="both", alpha=0.3)
    figure.savefig(path, metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="JSON file to write; the picture is written beside it"
    )
    parser.add_argument("--rounds", type=int, default=11, metavar="N", help="default: %(default)s")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), metavar="N",
                        help="default: every core")  # fmt: skip
    parser.add_argument("--contenders", type=lambda text: text.split(","), default=list(NAMES), metavar="A,B",
                        help=f"of {', '.join(NAMES)} (default: all), or moeship with words behind it: an instruction "
                        "set, bits as q3, a block size as b128")  # fmt: skip
    parser.add_argument("--rows", type=lambda text: [int(part) for part in text.split(",")], default=list(ROWS),
                        metavar="N,N")  # fmt: skip
    parser.add_argument("--no-wait", action="store_true",
                        help="do not wait for idle cores: for a run by chrt -f 10, which takes them")  # fmt: skip
    parser.add_argument("--no-peak", action="store_true", help="do not measure int8 products, which needs a C compiler")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    return run_command(lambda: benchmark(options))


if __name__ == "__main__":
    sys.exit(main())
