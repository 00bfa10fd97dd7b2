"""Describe a checkpoint: family, dimensions, parameters, bytes by role, and what its gates show about its routing.

Reads only the headers and the gates of a folder, so it answers at once for any size. A hub id is downloaded first.
With --text the reference, the checkpoint computed in float32, routes a text: which experts its tokens use, how sure the
routers are, which experts go together. That reads every weight once.
Of an engine for ONNX Runtime it shows how each role is stored, and its recipe; with --text the engine routes the text.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from cli.rows import print_rows
from export.errors import ConfigError, named
from export.files.reading import is_there
from export.reference.windows import MIN_TOKENS
from export.rows import Rows, in_units
from trt_build.manifest import MANIFEST_FILE

if TYPE_CHECKING:
    from export.architecture import Router
    from export.inspection import CheckpointReport
    from export.routing import RoutingReport

DEFAULT_TOKENS = 2048


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", metavar="CHECKPOINT", help="a checkpoint folder, a hub id, a GGUF file or an engine"
    )
    parser.add_argument(
        "--revision", metavar="REV", help="branch, tag or commit of a hub id (default: its main branch)"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--experts-per-token", type=int, metavar="K", help="override the config's num_experts_per_tok")
    parser.add_argument("--text", type=Path, action="append", default=[], metavar="FILE",
                        help="measure how this text uses the experts; repeatable")  # fmt: skip
    parser.add_argument("--tokens", type=int, metavar="N",
                        help=f"tokens to route, {MIN_TOKENS} or more (default: {DEFAULT_TOKENS})")  # fmt: skip
    parser.add_argument("--report", type=Path, metavar="OUT.html",
                        help="write a page that shows how the text uses the experts")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    if is_there(Path(arguments.checkpoint) / MANIFEST_FILE):
        return _inspect_engine(arguments)
    from export.checkpoint.folder import open_checkpoint
    from export.inspection import describe

    if not arguments.text:
        _refuse_without_text(arguments)
        report = describe(open_checkpoint(arguments.checkpoint, arguments.revision), arguments.experts_per_token)
        if arguments.json:
            print(json.dumps(report.to_json(), indent=2, allow_nan=False))
        else:
            _print_report(report)
        return 0
    from cli.inspect_text import measure_text, print_usage  # imports ONNX Runtime's backend

    checkpoint = open_checkpoint(arguments.checkpoint, arguments.revision)
    report = describe(checkpoint, arguments.experts_per_token)
    measured = measure_text(arguments, checkpoint)
    if arguments.json:
        print(json.dumps(report.to_json() | {"usage": measured.to_json()}, indent=2, allow_nan=False))
    else:
        _print_report(report)
        print_usage(measured)
    return 0


def _inspect_engine(arguments: argparse.Namespace) -> int:
    """Describe an engine, and with --text how it routes the text. Raises ConfigError for flags that are for
    checkpoints."""
    from cli.inspect_text import measure_engine, print_usage
    from trt_build.ort.command import describe
    from trt_build.ort.engine import open_engine

    given = [name for name in ("revision", "experts_per_token") if getattr(arguments, name)]
    if given:
        flags = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ConfigError(
            f"inspecting the engine {named(arguments.checkpoint)}: {flags} is for checkpoints; leave it out"
        )
    if not arguments.text:
        _refuse_without_text(arguments)
    engine = open_engine(arguments.checkpoint, check_digests=False)
    measured = measure_engine(arguments, engine) if arguments.text else None
    if arguments.json:
        manifest = (engine.folder / MANIFEST_FILE).read_text(encoding="utf-8")
        added = {} if measured is None else {"usage": measured.to_json()}
        print(json.dumps({**json.loads(manifest), **added}, indent=2) if added else manifest, end="")
        return 0
    for heading, rows in describe(engine):
        print_rows(heading, rows)
    if measured is not None:
        print_usage(measured)
    return 0


def _refuse_without_text(arguments: argparse.Namespace) -> None:
    """Raise ConfigError for a flag that means nothing without a text."""
    given = [f"--{name}" for name in ("tokens", "report") if getattr(arguments, name) is not None]
    if given:
        raise ConfigError(
            f"inspecting {named(arguments.checkpoint)}: {' and '.join(given)} "
            f"{'belong' if len(given) > 1 else 'belongs'} to a text; name one with --text FILE, or leave "
            f"{'them' if len(given) > 1 else 'it'} out"
        )


def _print_report(report: CheckpointReport) -> None:
    from export.routing import warnings

    print_rows(report.location, _size_rows(report))
    shares = [
        (
            role.value,
            f"{size.num_parameters:>15,}  {in_units(size.num_bytes):>10}  {size.num_bytes / report.num_bytes:6.1%}",
        )
        for role, size in sorted(report.roles.items(), key=lambda item: -item[1].num_bytes)
    ]
    print_rows("by role: parameters, bytes as stored, share", shares)
    if report.routing:
        print_rows("routing", _routing_rows(report.routing, report.architecture.router))
        print_rows("warnings", [("", sentence) for sentence in warnings(report.routing)])


def _size_rows(report: CheckpointReport) -> Rows:
    from export.architecture import Scales, SwiGlu

    facts = report.architecture
    rows = [
        ("family", facts.family),
        ("layers", f"{facts.num_layers}"),
        ("hidden size", f"{facts.hidden_size}"),
        ("heads", f"{facts.num_heads} of size {facts.head_size}, {facts.num_kv_heads} key/value"),
        ("rotary", f"{facts.rotary_dim} dimensions of a head, base {facts.rope_base:g}"),
        *([("rotary scaling", facts.rotary_scaling.described)] if facts.rotary_scaling else []),
        ("ffn size", f"{facts.ffn_size}" + (" of one expert" if facts.is_moe else "")),
        ("vocabulary", f"{facts.vocab_size}"),
        ("positions", f"{facts.max_positions}"),
    ]
    if facts.sliding_window:
        few = f", in {facts.num_layers - len(facts.full_layers)} layers" if facts.full_layers else ""
        rows.append(("sliding window", f"{facts.sliding_window}{few}"))
    if facts.is_moe:
        rows.append(("experts", f"{facts.num_experts}, {facts.experts_per_token} per token"))
    if facts.shared_ffn_size:
        rows.append(("shared expert", f"ffn size {facts.shared_ffn_size}, for all tokens"))
    if facts.dense_layers:
        width = facts.dense_ffn_size or facts.ffn_size
        rows.append(("dense layers", f"{len(facts.dense_layers)} of {facts.num_layers}, ffn size {width}"))
    if facts.scales != Scales():
        scales = {**asdict(facts.scales), "attention": facts.attention_scale}
        rows.append(("scales", ", ".join(f"{name} {value:g}" for name, value in scales.items())))
    if not facts.qkv.is_plain:
        norms = {"width": ["normalised over their whole width"], "head": ["each head normalised"]}
        clips = [f"clipped to {facts.qkv.clip:g}, values too"] if facts.qkv.clip else []
        said = norms.get(facts.qkv.norm or "", []) + clips
        rows.append(("queries and keys", ", ".join(said)))
    if facts.swiglu != SwiGlu():
        rows.append(("activation", facts.swiglu.described))
    dtypes = ", ".join(f"{dtype} {in_units(count)}" for dtype, count in report.dtype_bytes.items())
    return [
        *rows,
        ("parameters", f"{report.total_parameters:,}"),
        ("active per token", f"{report.active_parameters:,}"),
        ("tensors", f"{report.num_tensors}"),
        ("stored as", dtypes),
        ("files", f"{len(report.shard_bytes)}, {in_units(sum(report.shard_bytes.values()))}"),
    ]


def _routing_rows(report: RoutingReport, router: Router) -> Rows:
    from export.routing import experts_of_layers, left_out_by_layer

    dead = {layer.layer: layer.never_chosen for layer in report.layers if layer.never_chosen}
    without = "; engines do without them" if left_out_by_layer(report, router) else ""
    repeated = {group for layer in report.layers for group in layer.duplicate_groups}
    return [
        ("condition number", _span(layer.condition_number for layer in report.layers)),
        ("of row differences", _span(layer.difference_condition_number for layer in report.layers)),
        ("spread of the rows", _span(layer.spread for layer in report.layers)),
        ("equal rows", "; ".join(f"experts {', '.join(map(str, group))}" for group in sorted(repeated)) or "none"),
        ("near-equal pairs", f"{sum(len(layer.near_duplicates) for layer in report.layers)}"),
        ("never chosen", f"{experts_of_layers(report, dead)}{without}" if dead else "none proved"),
    ]


def _span(values: Iterable[float | None]) -> str:
    """The smallest and the largest value over the layers as text; None stands for infinity."""
    every = [float("inf") if value is None else value for value in values]
    return " to ".join("infinite" if value == float("inf") else f"{value:.3g}" for value in (min(every), max(every)))
