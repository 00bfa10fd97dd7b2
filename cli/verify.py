"""Compare engines with the reference: the checkpoint that they were built from, computed in float32.

Exit status 0 within the thresholds of each engine's precision, 1 past them. The results are written into engine.json.
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cli.progress import PROGRESS_S, every
from cli.verify_report import open_engines, refuse_output, write_report
from export.families import Model
from export.reference.kept import KeptLogits
from export.reference.model import Reference
from trt_build.comparison.answers import Answer
from trt_build.comparison.cost import Grain
from trt_build.comparison.cost.measuring import CostOptions
from trt_build.comparison.evaluation_text import EvaluationText, read_texts
from trt_build.comparison.parity import MIN_TOKENS, Verification
from trt_build.comparison.serving_ways import serving_limits
from trt_build.comparison.verified import Verified
from trt_build.errors import EngineError, LibraryMissing, VerificationFailed
from trt_build.manifest import TRTLLM_BACKEND
from trt_build.ort.engine import Engine
from trt_build.ort.verify import Scorer, record, verify_engine

if TYPE_CHECKING:
    from cli.verify_report import AnyEngine

logger = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("engine", type=Path, nargs="+", metavar="ENGINE",
                        help="engine directory; several must be of one model")  # fmt: skip
    parser.add_argument(
        "--reference", required=True, metavar="CHECKPOINT", help="the checkpoint that the engines were built from"
    )
    parser.add_argument("--text", type=Path, action="append", default=[], metavar="FILE",
                        help="measure on this text; repeatable (default: moeship's own held-out text)")  # fmt: skip
    parser.add_argument("--tokens", type=int, default=2048, metavar="N",
                        help=f"tokens to score, {MIN_TOKENS} or more (default: %(default)s)")  # fmt: skip
    parser.add_argument("--cost", nargs="?", const="auto", metavar="GRAIN", choices=["auto", *Grain],
                        help="say what the quantiser cost by 'layers' (each layer's attention and experts) or also by "
                        "'experts'; without a word, experts where the model is small enough")  # fmt: skip
    parser.add_argument("--cost-tokens", type=int, metavar="N",
                        help="tokens for --cost (default: what a bound on time and memory allows)")  # fmt: skip
    parser.add_argument("--trtllm-checkpoint", type=Path, metavar="DIR",
                        help="rank files of a TensorRT-LLM engine (default: ENGINE.checkpoint)")  # fmt: skip
    parser.add_argument("--report", type=Path, metavar="OUT.html",
                        help="write a page that shows the engines side by side; asks for --cost too")  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the results as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Verify engines, print their results and write the report. Raises VerificationFailed if a figure of an engine
    misses its threshold."""
    report, text = arguments.report, read_texts(arguments.text)
    if report is not None:
        refuse_output(report)
    engines = open_engines(arguments.engine)
    _refuse_flags(arguments, engines)
    progress = every(PROGRESS_S, logger.info)
    with KeptLogits() as kept:
        reference = kept.reference if len(engines) > 1 else Reference
        results = [_verify_and_print(arguments, engine, text, progress, reference) for engine in engines]
    if arguments.json:
        _print_json(engines, results)
    if report is not None:
        write_report(report, engines, results, arguments.reference, text, command_words(arguments), progress)
        logger.info("the report is in %s", report)
    failures = [_failures(engine, one) for engine, one in zip(engines, results, strict=True)]
    failed = [
        f"verifying {engine.folder} ({engine.manifest.precision.name}) against {arguments.reference}: {'; '.join(own)}"
        for engine, own in zip(engines, failures, strict=True)
        if own
    ]
    if failed:
        raise VerificationFailed("\n".join(failed))
    return 0


def _refuse_flags(arguments: argparse.Namespace, engines: Sequence[AnyEngine]) -> None:
    """Raise EngineError for a flag that none of the engines' backends has, and for one that several would share."""
    of_trtllm = sum(not isinstance(engine, Engine) for engine in engines)
    if arguments.trtllm_checkpoint is not None and not of_trtllm:
        raise EngineError(f"reading the flags: --trtllm-checkpoint: for engines of {TRTLLM_BACKEND} only; leave it out")
    if arguments.trtllm_checkpoint is not None and of_trtllm > 1:
        raise EngineError(
            f"reading the flags: --trtllm-checkpoint: found {of_trtllm} engines of {TRTLLM_BACKEND}, expected one; "
            "verify them one by one"
        )


def _verify_and_print(
    arguments: argparse.Namespace,
    engine: AnyEngine,
    text: EvaluationText,
    progress: Callable[[str], None],
    reference: Callable[[Model], Scorer],
) -> Verified | None:
    """Verify one engine, print the result as text and write it into engine.json. None for an engine for TensorRT-LLM
    that cannot run here; the report shows what its engine.json has recorded."""
    try:
        verified = _verify(arguments, engine, text, progress, reference)
    except LibraryMissing as error:
        if arguments.report is None:
            raise
        logger.warning("%s; the report shows what engine.json recorded", error)
        return None
    verification = verified.verification
    if not verification.reference_is_the_source:
        logger.warning(
            "%s was not built from these files of %s: the figures hold for the two as they are",
            engine.folder,
            arguments.reference,
        )
    if not arguments.json:
        if len(arguments.engine) > 1:
            print(f"{engine.folder} ({verified.precision})")
        print("\n".join(answer_lines(verification.questions)))
        print(text_line(verification))
        print(table(verified))
        if verification.cost is not None:
            print("\n".join(verification.cost.lines()))
        for finding in verification.findings:
            print(f"finding: {finding}")
    _log_seconds(engine.folder, verification.seconds)
    verified.record()
    return verified


def _verify(
    arguments: argparse.Namespace,
    engine: AnyEngine,
    text: EvaluationText,
    progress: Callable[[str], None],
    reference: Callable[[Model], Scorer],
) -> Verified:
    """Verify an engine by its backend."""
    if not isinstance(engine, Engine):
        from trt_build.trtllm.command import verify

        return verify(
            engine.folder,
            arguments.reference,
            arguments.trtllm_checkpoint,
            text,
            arguments.tokens,
            progress,
            cost_options(arguments),
        )
    precision = engine.manifest.judged_as
    verification = verify_engine(
        engine, arguments.reference, text, arguments.tokens, progress, cost_options(arguments), reference
    )
    return Verified(
        verification=verification,
        precision=precision,
        limits=engine.manifest.thresholds,
        serving_limits=serving_limits(precision, engine.manifest.provider),
        record=lambda: record(engine, verification),
    )


def _failures(engine: AnyEngine, verified: Verified | None) -> tuple[str, ...]:
    """What an engine missed in this run, or in the one that its engine.json records if it cannot run here."""
    if verified is not None:
        return verified.verification.failures
    recorded = (engine.manifest.verification or {}).get("failures", ())
    return tuple(f"{failure} (recorded in engine.json)" for failure in recorded)


def _print_json(engines: Sequence[AnyEngine], results: Sequence[Verified | None]) -> None:
    """One object for one engine; for several, an object whose `engines` has one for each."""
    found = [
        engine.manifest.verification if one is None else one.verification.to_json()
        for engine, one in zip(engines, results, strict=True)
    ]
    several = [{"engine": str(engine.folder), "verification": one} for engine, one in zip(engines, found, strict=True)]
    print(json.dumps(found[0] if len(found) == 1 else {"engines": several}, indent=2))


def command_words(arguments: argparse.Namespace) -> list[str]:
    """The words behind `moeship verify` that mean what the arguments mean."""
    words = [*map(str, arguments.engine), "--reference", arguments.reference, "--tokens", str(arguments.tokens)]
    for name in arguments.text:
        words += ["--text", str(name)]
    words += ["--cost", arguments.cost] if arguments.cost is not None else []
    words += ["--cost-tokens", str(arguments.cost_tokens)] if arguments.cost_tokens is not None else []
    if arguments.trtllm_checkpoint is not None:
        words += ["--trtllm-checkpoint", str(arguments.trtllm_checkpoint)]
    return [*words, "--report", str(arguments.report)]


def cost_options(arguments: argparse.Namespace) -> CostOptions | None:
    """What the flags ask of the quantiser's cost; None if they ask nothing. A report asks for it."""
    if arguments.cost is None and arguments.cost_tokens is None and arguments.report is None:
        return None
    grain = None if arguments.cost in (None, "auto") else Grain(arguments.cost)
    return CostOptions(grain=grain, tokens=arguments.cost_tokens)


def _log_seconds(folder: Path, seconds: Mapping[str, float]) -> None:
    """Say what took how long, where it took long enough for progress to be shown."""
    total = sum(seconds.values())
    if total >= PROGRESS_S:
        parts = ", ".join(f"{part} {took:.0f}" for part, took in seconds.items())
        logger.info("verified %s in %.0f s: %s", folder, total, parts)


def answer_lines(answers: Sequence[Answer]) -> list[str]:
    """The questions with their answers and figures, one a line, and their failures."""
    lines = []
    for answer in answers:
        kept, missed = ("within its limits", "PAST ITS LIMITS") if answer.question.startswith("What") else ("yes", "NO")
        said = {True: kept, False: missed, None: f"not asked: {answer.unasked}"}[answer.passed]
        asked = f", asked {answer.figures['asked']}" if "asked" in answer.figures else ""
        lines.append(f"{answer.question} {said}{asked}")
        if "other_search" in answer.figures:
            lines.append(f"  {answer.figures['other_search']}")
        for name, figures in answer.figures.get("largest", {}).items():
            limits = answer.figures.get("limits", {}).get(name, {})
            shown = ", ".join(f"{key} {value:.2g} ({limits[key]:.2g})" for key, value in figures.items())
            lines.append(f"  {name}: off by at most (allowed) {shown}")
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
        lines += _cache_lines(answer.figures["int8_cache"]) if "int8_cache" in answer.figures else []
        lines += [f"  {failure}" for failure in answer.failures]
    return lines


def _cache_lines(found: Mapping[str, Any]) -> list[str]:
    """What keys and values in int8 cost, against the same engine with floats."""
    exact = found.get("kl_float32_activations")
    own = "" if exact is None else f"; with float32 activations {exact:.1e}"
    return [
        f"  {found['num_tokens']} tokens: KL {found['kl']:.1e} ± {found['kl_error']:.0e} on average, p99 "
        f"{found['p99_kl']:.1e}, at most {found['max_kl']:.1e} nats; top-1 {found['top1']:.1%}{own}, allowed "
        f"{found['allowed']:.0e}"
    ]


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
    for way in verified.verification.serving:
        most = way.limits(verified.serving_limits)
        found, bound = (way.mean, most.mean) if way.exact else (way.largest, most.largest)
        rows.append((f"served in {way.name}{'' if way.exact else ' as scored'}", f"{found:.1e}", f"<= {bound:.1e}"))
    return "\n".join(f"{name:<40}{found:>16}  {allowed}".rstrip() for name, found, allowed in rows)
