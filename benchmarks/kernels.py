"""One layer's experts on the CPU, by rows: our kernels and ONNX Runtime's QMoE beside the rate of reading memory.

    python benchmarks/kernels.py --output benchmarks/results/kernels-PROCESSOR.json

The layer is a phixtral-4x2_8's: H 2560, F 10240, 4 experts of which 2 are chosen, int4 in blocks of 64. Every row
chooses the same two, so that the bytes read are those of one row whatever their number; calls choose the one and the
other two in turn, so that no cache holds them. A round measures the bandwidth and every contender. As in McCalpin's
STREAM the fastest of the rounds counts, of reading and of every contender alike; medians and quartiles are kept beside
it. A picture is drawn beside the JSON file where matplotlib is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt

from decode.machine import describe
from export.quantize.layout import LAYOUT, MatrixLayout
from trt_build.bandwidth import measure_read_bandwidth
from trt_build.ort.kernels import DOMAIN, LEVEL_VARIABLE, library

HIDDEN, WIDTH, EXPERTS, CHOSEN, BITS, BLOCK = 2560, 10240, 4, 2, 4, 64
WEIGHTS = 2 * HIDDEN * WIDTH * CHOSEN  # that one row is multiplied by
SHAPES = {"fc1": (WIDTH, HIDDEN), "fc2": (HIDDEN, WIDTH)}
BANDWIDTH_BYTES = 1 << 28
MANY_ROWS = 16
ROWS = (1, 2, 4, 8, 16, 32, 128, 512)
Arrays = dict[str, tuple[npt.DTypeLike, tuple[int, ...]]]


def our_arrays() -> Arrays:
    """Initializers of one layer in our layout, by name."""
    arrays: Arrays = {}
    for name, (rows, features) in SHAPES.items():
        layout = MatrixLayout(rows=rows, features=features, bits=BITS, block_size=BLOCK)
        arrays[f"{name}_codes"] = (np.uint8, (EXPERTS, *layout.codes_shape))
        arrays[f"{name}_scales"] = (np.float16, (EXPERTS, *layout.scales_shape))
    return arrays


def their_arrays() -> Arrays:
    """Those of QMoE."""
    arrays: Arrays = {}
    for name, (rows, features) in SHAPES.items():
        arrays[f"{name}_codes"] = (np.uint8, (EXPERTS, rows, features * BITS // 8))
        arrays[f"{name}_scales"] = (np.float32, (EXPERTS, rows, features // BLOCK))
    return arrays


def our_node(names: Mapping[str, str], output: str) -> Any:  # noqa: ANN401 - an onnx.NodeProto
    from onnx import helper

    inputs = ["x", "router", names["fc1_codes"], names["fc1_scales"], "", "", names["fc2_codes"], names["fc2_scales"]]
    return helper.make_node(
        "Experts", inputs, [output], domain=DOMAIN, layout=LAYOUT, bits=BITS, block_size=BLOCK, activations="int8",
        hidden_size=HIDDEN, expert_size=WIDTH, experts=EXPERTS, k=CHOSEN, activation="gelu", activation_alpha=1.0,
        activation_beta=0.0, activation_limit=float("inf"),
    )  # fmt: skip


def their_node(names: Mapping[str, str], output: str) -> Any:  # noqa: ANN401 - an onnx.NodeProto
    from onnx import helper

    inputs = ["x", "router", names["fc1_codes"], names["fc1_scales"], "", names["fc2_codes"], names["fc2_scales"]]
    return helper.make_node(
        "QMoE", inputs, [output], domain="com.microsoft", k=CHOSEN, activation_type="gelu", swiglu_fusion=0,
        normalize_routing_weights=1, use_sparse_mixer=0, expert_weight_bits=BITS, block_size=BLOCK, quant_type="int",
        accuracy_level=4,
    )  # fmt: skip


def session(arrays: Arrays, node: Callable[..., Any], folder: Path, threads: int, level: str = "") -> tuple[Any, int]:
    """A graph of one layer on mapped random weights; also the bytes of the chosen experts."""
    import onnxruntime
    from onnx import TensorProto, helper

    data, draw = folder / f"{node.__name__}.bin", np.random.default_rng(0)
    fresh = not data.exists()
    types = {"uint8": TensorProto.UINT8, "float16": TensorProto.FLOAT16, "float32": TensorProto.FLOAT}
    tensors, position = [], 0
    with data.open("ab") as file:
        for name, (dtype, shape) in arrays.items():
            kind, count = np.dtype(dtype), int(np.prod(shape))
            if fresh:
                random = draw.integers(0, 256, count, dtype=np.uint8) if kind == np.uint8 else draw.random(count)
                file.write((random if kind == np.uint8 else random * 0.01).astype(kind).tobytes())
            tensor = TensorProto(name=name, data_type=types[kind.name], dims=shape, data_location=1)
            places = {"location": data.name, "offset": position, "length": count * kind.itemsize}
            for key, place in places.items():
                tensor.external_data.add(key=key, value=str(place))
            tensors.append(tensor)
            position += count * kind.itemsize
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node({name: name for name in arrays}, "y")], "layer",
        [value("x", TensorProto.FLOAT, ["t", HIDDEN]), value("router", TensorProto.FLOAT, None)],
        [value("y", TensorProto.FLOAT, None)], tensors,
    )  # fmt: skip
    opsets = [helper.make_opsetid(*opset) for opset in (("", 21), ("com.microsoft", 1), (DOMAIN, 1))]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    # The threads of one session must not wait for work on the cores that the next one needs.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
    options.register_custom_ops_library(str(library()))
    with mock.patch.dict(os.environ, {LEVEL_VARIABLE: level}):
        opened = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return opened, position * CHOSEN // EXPERTS


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Seconds of a layer by contender and rows, and bytes per second of reading, round by round."""
    sessions, num_bytes = {}, {}
    for level in options.levels.split(","):
        name = f"moeship {level}".strip()
        sessions[name], num_bytes[name] = session(our_arrays(), our_node, folder, options.threads, level)
    name = "onnxruntime QMoE"
    sessions[name], num_bytes[name] = session(their_arrays(), their_node, folder, options.threads)
    seconds: dict[str, dict[int, list[float]]] = {name: {rows: [] for rows in options.rows} for name in sessions}
    bandwidth, draw = [], np.random.default_rng(1)
    order = np.arange(EXPERTS, dtype=np.float32)
    for _ in range(options.rounds):
        bandwidth.append(measure_read_bandwidth(BANDWIDTH_BYTES, options.threads))
        for rows in options.rows:
            x = draw.normal(size=(rows, HIDDEN)).astype(np.float32)
            for name, opened in sessions.items():
                for logits in [order, order[::-1]] * (1 if rows > MANY_ROWS else 3):
                    feeds = {"x": x, "router": np.tile(logits, (rows, 1))}
                    started = time.perf_counter()
                    opened.run(None, feeds)
                    seconds[name][rows].append(time.perf_counter() - started)
    return {
        "machine": describe(),
        "threads": options.threads,
        "rounds": options.rounds,
        "bandwidth": _spread(bandwidth),
        "bytes_of_two_experts": num_bytes,
        "seconds": {name: {rows: _spread(found) for rows, found in by.items()} for name, by in seconds.items()},
    }


def _spread(values: list[float]) -> dict[str, float]:
    ordered = sorted(values)
    low, high = ordered[len(ordered) // 4], ordered[(3 * len(ordered)) // 4]
    return {"median": statistics.median(ordered), "low": low, "high": high, "least": ordered[0], "most": ordered[-1]}


def report(result: Mapping[str, Any]) -> str:
    """The figures as a table."""
    read = result["bandwidth"]["most"]
    lines = [f"read {read / 1e9:.1f} GB/s on {result['threads']} threads: {result['machine']['processor']}"]
    for name, by_rows in result["seconds"].items():
        first = next(iter(by_rows.values()))["least"]
        for rows, found in by_rows.items():
            rate = result["bytes_of_two_experts"][name] / found["least"]
            lines.append(
                f"{name:22} {rows:4} rows {found['least'] * 1e3:8.2f} ms (median "
                f"{found['median'] * 1e3:8.2f})  {WEIGHTS * int(rows) / found['least'] / 1e9:6.1f} G weights/s  "
                f"{rate / 1e9:5.1f} GB/s = {rate / read:4.0%} of reading  {found['least'] / first:5.2f} x one row"
            )
    return "\n".join(lines)


def draw(result: Mapping[str, Any], path: Path) -> None:
    """A roofline: weights a second over rows, below the slope that the bandwidth sets and the best rate measured."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5.5), layout="constrained")
    axes = figure.subplots()
    bytes_a_weight = min(result["bytes_of_two_experts"].values()) / WEIGHTS
    best = 0.0
    for name, by_rows in result["seconds"].items():
        rows = [int(number) for number in by_rows]
        rates = [WEIGHTS * number / found["least"] / 1e9 for number, found in zip(rows, by_rows.values(), strict=True)]
        axes.plot(rows, rates, marker="o", label=name)
        best = max(best, *rates)
    slope = result["bandwidth"]["most"] / bytes_a_weight / 1e9
    ends = np.array([1.0, best / slope])
    axes.plot(ends, slope * ends, color="#c0392b", label=f"reading {result['bandwidth']['most'] / 1e9:.1f} GB/s")
    axes.set(xscale="log", yscale="log", xlabel="rows that are multiplied together", ylabel="G weights/s, times rows")
    axes.set_title(f"a phixtral layer's experts at int4: {result['machine']['processor']}, {result['threads']} threads")
    axes.legend()
    axes.grid(visible=True, which="both", alpha=0.3)
    figure.savefig(path, metadata={"Date": None})


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file to write; the picture lies beside it")
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--levels", default="", help="instruction sets, with commas between; the CPU's best by default")
    parser.add_argument("--rows", type=lambda text: [int(part) for part in text.split(",")], default=list(ROWS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = measure(options, Path(folder))
    print(report(result))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
        try:
            draw(result, options.output.with_suffix(".svg"))
        except ImportError:
            print("no picture: install matplotlib to draw it", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
