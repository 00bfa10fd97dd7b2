"""What `moeship inspect --text` measures, prints and draws: how the tokens of a text use the experts."""

from __future__ import annotations

import argparse
import logging
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from cli.progress import PROGRESS_S, every
from export.architecture import Architecture
from export.checkpoint.folder import Checkpoint
from export.errors import OutputError, named, printable
from export.families import read_model
from export.files.output import refuse_existing, replace_file
from export.reference.usage import NEAR_TIE, LayerUsage, Usage, measure_usage, require_mixture, usage_of
from export.reference.windows import text_windows
from export.tokenizer.loading import Tokenizer, load_tokenizer
from export.tokenizer.surplus import model_settings
from trt_build.comparison.evaluation_text import EvaluationText, read_texts
from trt_build.manifest import libraries
from trt_build.ort.engine import Engine
from trt_build.ort.session import ScoringSession
from trt_build.report.usage_page import UsageReport, usage_page

logger = logging.getLogger(__name__)

MOST_COLUMNS = 8  # experts whose loads are printed as numbers; of more, the bars, and the largest and the smallest
_BARS = " ▁▂▃▄▅▆▇█"
_REPORT = "the report"


@dataclass(frozen=True, kw_only=True)
class MeasuredText:
    """A text and how its tokens use the experts."""

    text: EvaluationText
    usage: Usage

    def to_json(self) -> dict[str, Any]:
        return {"text": self.text.to_json(), **self.usage.to_json()}


def measure_text(arguments: argparse.Namespace, checkpoint: Checkpoint) -> MeasuredText:
    """Route the text of `moeship inspect --text` by the reference, and write the page if one is asked for. Raises
    ConfigError for a dense model and for too little text, OutputError for a page that cannot be written."""
    _refuse_report(arguments)
    model = read_model(checkpoint, arguments.experts_per_token)
    doing = f"routing a text through {named(checkpoint.identity)}"
    require_mixture(model.architecture, checkpoint.identity, doing)
    text = read_texts(arguments.text)
    windows = _windows(arguments, text, model_settings(model).tokenizer, model.architecture.max_positions, doing)
    usage = measure_usage(model, windows, every(PROGRESS_S, logger.info))
    if arguments.report is not None:
        computed = "The checkpoint was computed in float32."
        _write_report(arguments, model.architecture, model.weights.checkpoint.folder.name, computed, usage, text)
    return MeasuredText(text=text, usage=usage)


def measure_engine(arguments: argparse.Namespace, engine: Engine) -> MeasuredText:
    """`measure_text` by the scoring graph of an engine, so with what the quantiser did to the routers' inputs. Experts
    that the build dropped count as chosen by no token."""
    _refuse_report(arguments)
    facts, longest = engine.manifest.architecture, engine.manifest.max_sequence
    doing = f"routing a text through the engine {named(engine.folder)}"
    require_mixture(facts, str(engine.folder), doing)
    text = read_texts(arguments.text)
    windows = _windows(arguments, text, load_tokenizer(engine.folder), longest, doing)
    scoring, progress, routed = ScoringSession(engine), every(PROGRESS_S, logger.info), []
    for number, window in enumerate(windows):
        progress(f"routing window {number} of {len(windows)}")
        _, logits = scoring.run(window)
        assert logits is not None  # a mixture has routers
        routed.append(logits)
    usage = usage_of(facts, np.concatenate(routed, axis=1), windows)
    if arguments.report is not None:
        computed = f"The engine computed it, at {engine.manifest.precision.name}."
        _write_report(arguments, facts, engine.folder.name, computed, usage, text)
    return MeasuredText(text=text, usage=usage)


def _refuse_report(arguments: argparse.Namespace) -> None:
    """Raise OutputError if the page cannot be written, before anything is computed."""
    if arguments.report is None:
        return
    if arguments.report.is_dir():
        raise OutputError(
            f"writing {_REPORT}: {named(arguments.report)} is a folder, expected the name of an HTML file in it"
        )
    refuse_existing(arguments.report, _REPORT)


def _windows(
    arguments: argparse.Namespace, text: EvaluationText, tokenizer: Tokenizer, longest: int, doing: str
) -> list[list[int]]:
    from cli.inspect import DEFAULT_TOKENS

    wanted = DEFAULT_TOKENS if arguments.tokens is None else arguments.tokens
    return text_windows(tokenizer.encode_prompt(text.content), wanted, longest, doing)


def _write_report(
    arguments: argparse.Namespace,
    facts: Architecture,
    model: str,
    computed: str,
    usage: Usage,
    text: EvaluationText,
) -> None:
    words = [arguments.checkpoint, *(["--revision", arguments.revision] if arguments.revision else [])]
    for name in arguments.text:
        words += ["--text", str(name)]
    for flag in ("tokens", "experts_per_token", "report"):
        value = getattr(arguments, flag)
        words += [] if value is None else [f"--{flag.replace('_', '-')}", str(value)]
    report = UsageReport(
        model=model,
        computed=computed,
        facts=(
            ("checkpoint or engine", arguments.checkpoint),
            ("family", facts.family),
            ("layers with experts", f"{facts.num_mixtures} of {facts.num_layers}"),
            ("experts", f"{facts.num_experts}, {facts.experts_per_token} per token"),
            ("text", f"{usage.num_tokens} tokens of {', '.join(text.names)}"),
        ),
        usage=usage,
        text=text,
        versions=libraries(),
        command=shlex.join(["moeship", "inspect", *words]),
    )
    path: Path = arguments.report
    try:
        replace_file(path, usage_page(report))
    except OSError as error:
        raise OutputError(f"writing {_REPORT} to {path}: {error.strerror}") from error
    logger.info("the report is in %s", path)


def print_usage(measured: MeasuredText) -> None:
    """Print the use of experts as a table with a line a layer."""
    usage, text = measured.usage, measured.text
    print(
        printable(
            f"use of experts: {usage.num_tokens} tokens in {usage.num_windows} "
            f"window{'s' if usage.num_windows > 1 else ''} of {', '.join(text.names)} (SHA-256 {text.sha256[:12]}…)"
        )
    )
    for line in usage_lines(usage):
        print(f"  {line}")


def usage_lines(usage: Usage) -> list[str]:
    """The table: shares of the places and of the weights, entropy, ties, and the pair furthest from independence."""
    experts = usage.num_experts
    few = experts <= MOST_COLUMNS
    titles = [name.ljust(width) for name, width in _titles(experts, few)]
    head = ["layer", *titles, "entropy", "  ties", "pair, times chance"]
    lines = ["  ".join(head)]
    for layer in usage.layers:
        cells = _numbers(layer) if few else _extremes(layer)
        cells = [f"{cell:<{len(title)}}" for cell, title in zip(cells, titles, strict=True)]
        ties = f"{layer.near_ties / layer.num_tokens:6.1%}"
        row = [f"{layer.layer:>5}", *cells, f"{layer.relative_entropy:7.0%}", ties, _pair(layer)]
        lines.append("  ".join(row).rstrip())
    equal = sum(layer.equal for layer in usage.layers)
    lines.append(
        f"entropy of the router as a share of ln {experts}; ties: tokens whose last chosen and next logit differ by at "
        f"most {NEAR_TIE:g}" + (f", {equal} of them by nothing" if equal else "")
    )
    return lines


def _numbers(layer: LayerUsage) -> list[str]:
    largest = float(layer.load.max())
    load = "".join(f"{_bar(share, largest)}{100 * share:5.1f} " for share in layer.load.tolist())
    return [load, "".join(f"{100 * share:3.0f} " for share in layer.weight_shares.tolist())]


def _extremes(layer: LayerUsage) -> list[str]:
    load = layer.load.tolist()
    largest = max(load)
    ends = [max(range(len(load)), key=load.__getitem__), min(range(len(load)), key=load.__getitem__)]
    bars = "".join(_bar(share, largest) for share in load)
    return [bars, *(f"e{expert} {100 * load[expert]:.1f} %".rjust(11) for expert in ends)]


def _bar(share: float, largest: float) -> str:
    """A bar of one character; only a share of zero has none."""
    return _BARS[0] if share == 0 else _BARS[max(1, round(share / largest * (len(_BARS) - 1)))]


def _pair(layer: LayerUsage) -> str:
    pair = layer.strongest_pair()
    return "none" if pair is None else f"e{pair[0]}+e{pair[1]} {pair[2]:.2g}"


def _titles(experts: int, few: bool) -> list[tuple[str, int]]:
    """The names of the columns of loads, with their widths."""
    if few:
        return [(f"load of e0 to e{experts - 1}, %", 7 * experts), ("of the weights, %", 4 * experts)]
    return [("load", experts), ("most".rjust(11), 11), ("least".rjust(11), 11)]
