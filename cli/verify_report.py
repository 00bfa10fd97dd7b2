"""Gathers what `moeship verify --report` writes, and the engines that one report is about."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from export.checkpoint.folder import open_checkpoint
from export.errors import ConfigError, OutputError, named
from export.families import read_model
from export.files.output import refuse_existing, replace_file
from export.reference.model import Reference
from export.tokenizer.surplus import model_settings
from trt_build.comparison.evaluation_text import EvaluationText
from trt_build.comparison.verified import Verified
from trt_build.errors import EngineError
from trt_build.manifest import TRTLLM_BACKEND, engine_backend, libraries
from trt_build.ort.engine import Engine, open_engine
from trt_build.ort.questions.greedy import greedy_answers
from trt_build.report.contents import Report, ReportedEngine, Rows
from trt_build.report.page import page
from trt_build.report.places import differing_places, greedy_texts
from trt_build.report.visible import bytes_text

if TYPE_CHECKING:
    from trt_build.trtllm.engine import TrtllmEngine

    AnyEngine = Engine | TrtllmEngine

NUM_PROMPTS, PROMPT_TOKENS, ANSWER_TOKENS = 3, 24, 48
_REPORT = "the report"


def refuse_output(path: Path) -> None:
    """Raise OutputError if a report cannot be written to `path`: a folder that does not exist, or a name that is
    taken."""
    if path.is_dir():
        raise OutputError(f"writing {_REPORT}: {named(path)} is a folder, expected the name of an HTML file in it")
    refuse_existing(path, _REPORT)


def open_engines(folders: Sequence[Path]) -> list[AnyEngine]:
    """Open engines of one model, of either backend. Raises EngineError for engines of different checkpoints, and
    ConfigError for one that is named twice."""
    found: dict[Path, Path] = {}
    for folder in folders:
        if folder.resolve() in found:
            raise ConfigError(f"verifying engines: {named(folder)} is named twice; name each engine once")
        found[folder.resolve()] = folder
    engines = [_open(folder) for folder in folders]
    for engine in engines[1:]:
        _require_same_source(engines[0], engine)
    return engines


def _open(folder: Path) -> AnyEngine:
    if engine_backend(folder) == TRTLLM_BACKEND:
        from trt_build.trtllm.engine import open_trtllm_engine

        return open_trtllm_engine(folder, check_digests=False)  # its verification checks them
    return open_engine(folder)


def _require_same_source(first: AnyEngine, other: AnyEngine) -> None:
    """Raise EngineError if two engines were built from different checkpoints, by the digests of the files, or take
    different numbers of experts. Engines of earlier formats may have other digests of shards, so there config.json
    decides."""
    takes = [engine.manifest.architecture.experts_per_token for engine in (first, other)]
    if takes[0] != takes[1]:
        raise EngineError(
            f"verifying {first.folder} and {other.folder} together: the first takes {takes[0]} experts per token and "
            f"the second {takes[1]}, so they have different references; verify them one by one"
        )
    one, two = (dict(engine.manifest.source.digests) for engine in (first, other))
    if any(isinstance(engine, Engine) and engine.old for engine in (first, other)):
        one, two = ({name: digests[name] for name in digests if name == "config.json"} for digests in (one, two))
    for name in sorted(one.keys() | two.keys()):
        if one.get(name) != two.get(name):
            raise EngineError(
                f"verifying {first.folder} and {other.folder} together: they were built from different checkpoints "
                f"({named(name, 80)} has the digest {_short(one.get(name))} in the first and {_short(two.get(name))} "
                "in the second); verify engines of one model together"
            )


def _short(digest: str | None) -> str:
    return "none" if digest is None else f"{digest[:12]}…"


def write_report(
    path: Path,
    engines: Sequence[AnyEngine],
    results: Sequence[Verified | None],
    reference: str,
    text: EvaluationText,
    words: Sequence[str],
    progress: Callable[[str], None],
) -> None:
    """Write the page on engines and their results; None for an engine that cannot run here. Raises OutputError
    if the page cannot be written."""
    content = page(_gather(engines, results, reference, text, words, progress))
    refuse_existing(path, _REPORT)
    try:
        replace_file(path, content)
    except OSError as error:
        raise OutputError(f"writing {_REPORT} to {path}: {error.strerror}") from error


def _gather(
    engines: Sequence[AnyEngine],
    results: Sequence[Verified | None],
    reference: str,
    text: EvaluationText,
    words: Sequence[str],
    progress: Callable[[str], None],
) -> Report:
    model = read_model(open_checkpoint(reference), engines[0].manifest.architecture.experts_per_token or None)
    tokenizer = model_settings(model).tokenizer
    positions = [None if one is None else one.verification.positions for one in results]
    scored = next((one for one in positions if one is not None), None)
    prompts = [] if scored is None else _prompts([token for window in scored.windows for token in window])
    answers: list[list[list[int]] | None] = []
    for engine, own in zip(engines, positions, strict=True):
        progress(f"greedy text of {engine.folder}")
        runs = isinstance(engine, Engine) and own is not None
        answers.append(greedy_answers(engine, prompts, ANSWER_TOKENS) if runs else None)  # type: ignore[arg-type]
    progress("the reference reads the greedy texts")
    facts = engines[0].manifest.architecture
    names = _names([engine.folder for engine in engines])
    return Report(
        model=model.weights.checkpoint.folder.name,
        facts=_model_facts(engines[0], reference),
        engines=tuple(_reported(name, engine, one) for name, engine, one in zip(names, engines, results, strict=True)),
        places=differing_places(positions, tokenizer),
        texts=greedy_texts(prompts, answers, Reference(model), tokenizer) if prompts else (),
        text=text,
        num_tokens=next((sum(one.verification.windows) for one in results if one is not None), 0),
        mixture_layers=tuple(facts.mixture_layers),
        versions=libraries(),
        command=shlex.join(["moeship", "verify", *words]),
    )


def _prompts(token_ids: Sequence[int]) -> list[list[int]]:
    """Beginnings from NUM_PROMPTS places of a text; fewer of a text that is too short for them."""
    size = max(1, min(PROMPT_TOKENS, len(token_ids) // NUM_PROMPTS))
    starts = [turn * len(token_ids) // NUM_PROMPTS for turn in range(NUM_PROMPTS)]
    return [list(token_ids[start : start + size]) for start in starts]


def _names(folders: Sequence[Path]) -> list[str]:
    """The names of folders, or their paths as they were given where two have the same name."""
    short = [folder.resolve().name for folder in folders]
    return short if len(set(short)) == len(short) else list(map(str, folders))


def _model_facts(engine: AnyEngine, reference: str) -> Rows:
    facts = engine.manifest.architecture
    experts = (("experts", f"{facts.num_experts}, {facts.experts_per_token} per token"),) if facts.is_moe else ()
    return (
        ("checkpoint", reference),
        ("family", facts.family),
        ("layers, hidden size", f"{facts.num_layers}, {facts.hidden_size}"),
        *experts,
        ("vocabulary", f"{facts.vocab_size:,} tokens"),
        ("digest of config.json", f"SHA-256 {engine.manifest.source.digests.get('config.json', 'unknown')}"),
    )


def _reported(name: str, engine: AnyEngine, verified: Verified | None) -> ReportedEngine:
    manifest = engine.manifest
    precision = manifest.precision
    facts: list[tuple[str, str]] = [("precision", precision.name), ("backend", manifest.backend)]
    if isinstance(engine, Engine):
        facts += [("provider", engine.manifest.provider), ("kernels", engine.manifest.kernels)]
        sizes = {size for role in engine.manifest.precision.roles.values() for size in role.block_sizes}
        facts += [("blocks", ", ".join(map(str, sorted(sizes))) or "none")]
    else:
        facts += [("GPU", engine.manifest.gpu.name or "unknown")]
    facts += [
        ("bits per weight", f"{precision.average_bits_per_weight:.2f}"),
        ("size", bytes_text(engine.num_bytes)),
        ("longest sequence", f"{manifest.max_sequence} tokens"),
        ("format", str(manifest.format_version)),
    ]
    if verified is not None:
        positions = verified.verification.positions
        return ReportedEngine(
            name=name,
            facts=tuple(facts),
            record=verified.verification.to_json(),
            limits=verified.limits,
            serving=verified.serving_limits,
            kl=None if positions is None else positions.kl,
        )
    assert not isinstance(engine, Engine)
    from trt_build.trtllm.questions.logits import GENERATION_LIMITS
    from trt_build.trtllm.verify import LIMITS

    record = manifest.verification
    return ReportedEngine(
        name=name,
        facts=tuple(facts),
        record=record,
        limits=LIMITS[precision.name],
        serving=GENERATION_LIMITS[engine.manifest.precision.dtype],
        note=(
            "it needs TensorRT-LLM and a GPU, which are not here; "
            + ("the figures are those that engine.json recorded" if record else "engine.json records no result")
        ),
    )
