"""Compare an engine with the reference: the checkpoint that it was built from, computed in float32.

Exit status 0 within the thresholds of the engine's precision, 1 past them. The result is written into engine.json.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from trt_build.comparison.answers import Answer
from trt_build.comparison.cost import Grain
from trt_build.comparison.evaluation_text import read_texts
from trt_build.comparison.parity import THRESHOLDS, Verification
from trt_build.comparison.serving_ways import SERVING_LIMITS
from trt_build.comparison.verified import Verified
from trt_build.errors import EngineError, VerificationFailed
from trt_build.manifest import ORT_BACKEND, TRTLLM_BACKEND, engine_backend
from trt_build.ort.engine import open_engine
from trt_build.ort.questions.cost import CostOptions
from trt_build.ort.verify import record, verify_engine

logger = logging.getLogger(__name__)

PROGRESS_S = 5.0  # seconds between two progress messages


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("engine", type=Path, metavar="ENGINE", help="engine directory")
    parser.add_argument("--reference", required=True, metavar="CHECKPOINT", help="the checkpoint it was built from")
    parser.add_argument("--text", type=Path, action="append", default=[], metavar="FILE",
                        help="measure on this text; repeatable (default: moeship's own held-out text)")  # fmt: skip
    parser.add_argument("--tokens", type=int, default=2048, metavar="N", help="tokens to score (default: %(default)s)")
    parser.add_argument("--cost", nargs="?", const="auto", metavar="GRAIN", choices=["auto", *Grain],
                        help="say what the quantiser cost by 'layers' (each layer's attention and experts) or also by "
                        "'experts'; without a word, experts where the model is small enough")  # fmt: skip
    parser.add_argument("--cost-tokens", type=int, metavar="N",
                        help="tokens for --cost (default: what a bound on time and memory allows)")  # fmt: skip
    parser.add_argument("--trtllm-checkpoint", type=Path, metavar="DIR",
                        help="rank files of a TensorRT-LLM engine (default: ENGINE.checkpoint)")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Verify an engine and print the report. Raises VerificationFailed if a figure misses its threshold."""
    verified = _verify(arguments)
    verification = verified.verification
    if not verification.reference_is_the_source:
        logger.warning(
            "%s was not built from these files of %s: the figures hold for the two as they are",
            arguments.engine,
            arguments.reference,
        )
    if arguments.json:
        print(json.dumps(verification.to_json(), indent=2))
    else:
        print("\n".join(answer_lines(verification.questions)))
        print(text_line(verification))
        print(table(verified))
        if verification.cost is not None:
            print("\n".join(verification.cost.lines()))
        for finding in verification.findings:
            print(f"finding: {finding}")
    verified.record()
    if verification.failures:
        raise VerificationFailed(
            f"verifying {arguments.engine} ({verified.precision}) against {arguments.reference}: "
            f"{'; '.join(verification.failures)}"
        )
    return 0


def _verify(arguments: argparse.Namespace) -> Verified:
    """Verify an engine by its backend. Raises EngineError for a flag that only the other backend has."""
    text, progress = read_texts(arguments.text), every(PROGRESS_S, logger.info)
    cost = cost_options(arguments)
    if engine_backend(arguments.engine) == TRTLLM_BACKEND:
        from trt_build.trtllm.command import verify

        if cost is not None:
            raise EngineError(f"reading the flags: --cost: for engines of {ORT_BACKEND} only; leave it out")
        return verify(
            arguments.engine, arguments.reference, arguments.trtllm_checkpoint, text, arguments.tokens, progress
        )
    if arguments.trtllm_checkpoint is not None:
        raise EngineError(f"reading the flags: --trtllm-checkpoint: for engines of {TRTLLM_BACKEND} only; leave it out")
    engine = open_engine(arguments.engine)
    precision = engine.manifest.precision.name
    verification = verify_engine(engine, arguments.reference, text, arguments.tokens, progress, cost)
    return Verified(
        verification=verification,
        precision=precision,
        limits=THRESHOLDS[precision],
        serving_limits=SERVING_LIMITS[precision],
        record=lambda: record(engine, verification),
    )


def cost_options(arguments: argparse.Namespace) -> CostOptions | None:
    """What the flags ask of the quantiser's cost; None if they ask nothing."""
    if arguments.cost is None and arguments.cost_tokens is None:
        return None
    grain = None if arguments.cost in (None, "auto") else Grain(arguments.cost)
    return CostOptions(grain=grain, tokens=arguments.cost_tokens)


def every(seconds: float, tell: Callable[[str], None]) -> Callable[[str], None]:
    """A function that calls `tell` only if `seconds` have passed since it was made or since its last call of `tell`."""
    last = time.monotonic()

    def throttled(text: str) -> None:
        nonlocal last
        if time.monotonic() - last >= seconds:
            last = time.monotonic()
            tell(text)

    return throttled


def answer_lines(answers: Sequence[Answer]) -> list[str]:
    """The questions with their answers and figures, one a line, and their failures."""
    lines = []
    for answer in answers:
        said = {True: "yes", False: "NO", None: f"not asked: {answer.unasked}"}[answer.passed]
        asked = f", asked {answer.figures['asked']}" if "asked" in answer.figures else ""
        lines.append(f"{answer.question} {said}{asked}")
        for name, figures in answer.figures.get("largest", {}).items():
            shown = ", ".join(f"{key} {value:.2g}" for key, value in figures.items())
            lines.append(f"  {name}: off by at most {shown}")
        if "logits" in answer.figures:
            lines.append(
                f"  {answer.figures['num_tokens']} tokens: logits off by {answer.figures['logits']:.1e} of the "
                f"largest, allowed {answer.figures['allowed']:.0e}"
            )
        if "mean_kl" in answer.figures:
            found = answer.figures
            lines.append(
                f"  {found['num_tokens']} tokens: KL {found['mean_kl']:.1e} on average, p99 {found['p99_kl']:.1e}, at "
                f"most {found['max_kl']:.1e} nats; top-1 {found['top1_agreement']:.1%} ({found['near_ties']} near "
                f"ties), perplexity {found['perplexity_increase']:+.2%}"
            )
        lines += [f"  {failure}" for failure in answer.failures]
    return lines


def text_line(verification: Verification) -> str:
    """The text that was measured on, in one line."""
    text, windows = verification.text, verification.windows
    return (
        f"{sum(windows)} tokens in {len(windows)} window{'s' if len(windows) > 1 else ''} of {', '.join(text.names)} "
        f"(SHA-256 {text.sha256[:12]}…)"
    )


def table(verified: Verified) -> str:
    """The result as a table of text: figure, found, allowed."""
    report, limits = verified.verification.report, verified.limits
    limit = limits.max_logit_difference
    clear = report.clear_top1_agreement
    allowed = f"<= {limit:.1e}" if limit is not None else "reported"
    rows = [
        ("tokens scored / decoded one by one", f"{report.num_tokens} / {report.num_decoded_tokens}", ""),
        ("mean KL, nats, scored", f"{report.mean_kl:.2e}", f"<= {limits.mean_kl:.1e}"),
        ("mean KL, nats, decoded", f"{report.mean_decoded_kl:.2e}", f"<= {limits.mean_kl:.1e}"),
        ("99th percentile / max KL, scored", f"{report.p99_kl:.2e} / {report.max_kl:.2e}", "reported"),
        ("top-1 agreement", f"{report.top1_agreement:.2%}", f">= {limits.top1_agreement:.2%}"),
        (f"  without {report.near_ties} near ties", "none" if clear is None else f"{clear:.2%}", "reported"),
        ("perplexity of reference / engine", f"{report.reference_perplexity:.3f} / {report.engine_perplexity:.3f}", ""),
        ("perplexity increase", f"{report.perplexity_increase:+.3%}", f"<= {limits.perplexity_increase:+.3%}"),
        ("max |logit difference|, scored", f"{report.max_logit_difference:.2e}", allowed),
        ("max |logit difference|, decoded", f"{report.max_decoded_difference:.2e}", allowed),
        ("mean |logit difference|", f"{report.mean_logit_difference:.2e}", "reported"),
    ]
    if report.routing_agreement is not None:
        rows.append(("same experts chosen", f"{report.routing_agreement:.2%}", f">= {limits.routing_agreement:.2%}"))
        rows.append(("tied routings", str(report.tied_routings), "reported"))
    most = verified.serving_limits.largest
    rows += [
        (f"served in {way.name} as scored", f"{way.largest:.1e}", f"<= {most:.1e}")
        for way in verified.verification.serving
    ]
    return "\n".join(f"{name:<36}{found:>16}  {allowed}".rstrip() for name, found, allowed in rows)
