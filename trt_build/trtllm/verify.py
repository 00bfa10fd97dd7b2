"""Verifies a TensorRT-LLM engine: asks the four questions of `questions/`, and compares its logits with those of the
reference (figures: comparison/parity.py).

Every position of a text is scored by generating one token after the prefix that ends there. In addition the engine
generates tokens after half of the text through its cache. The engine is the one that is served: no output is added to
it for the comparison, so the experts that it chooses are not known.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from export.families import Model
from export.reference.model import Reference
from export.trtllm.checkpoint import changed_sources
from trt_build.comparison.answers import Answer
from trt_build.comparison.cost import Grain
from trt_build.comparison.cost.measuring import OF_A_FAILURE, CostOptions, CostWork, prepare_cost, unasked
from trt_build.comparison.evaluation_text import EvaluationText
from trt_build.comparison.parity import (
    JUDGED_TOKENS,
    MIN_TOKENS,
    THRESHOLDS,
    WINDOW_TOKENS,
    Thresholds,
    Verification,
    WindowSums,
    combine,
    measure,
    near_ties,
    positions_of,
    split_windows,
)
from trt_build.comparison.same_tokenizer import require_same_tokenizer
from trt_build.errors import EngineError
from trt_build.machine.child import child_program
from trt_build.machine.readings import MPIRUN
from trt_build.manifest import changed_meanwhile
from trt_build.source import SourceModel
from trt_build.trtllm.engine import TrtllmEngine, open_trtllm_engine, write_trtllm_manifest
from trt_build.trtllm.questions.logits import (
    GENERATION_LIMITS,
    LOGITS_LIMITS,
    LOGITS_TOKENS,
    OF_COST,
    OF_LOGITS,
    ask_about_cost,
    ask_about_generation,
    ask_about_logits,
    judged_differences,
)
from trt_build.trtllm.questions.rank_weights import open_rank_weights
from trt_build.trtllm.questions.weights import RankFolder, ask_about_engine

# Equal to the limits of the same precisions in parity.py, with these differences: bfloat16 has 8 bits of mantissa where
# float16 has 11; with one scale per channel, int4 costs the tiny phixtral 3.7 % of perplexity on Python, with blocks of
# 64 2.5 %; its top-1 agreement is 80.6 % over 768 tokens of the held-out text (tests/trtllm/standin), and its KL 0.058.
LIMITS: dict[str, Thresholds] = {
    "fp32": THRESHOLDS["fp32"],
    "fp16": THRESHOLDS["fp16"],
    "bf16": Thresholds(
        max_logit_difference=None, mean_kl=2e-3, perplexity_increase=0.005, top1_agreement=0.97, routing_agreement=0.97,
        judged_tokens=JUDGED_TOKENS,
    ),
    "int8": THRESHOLDS["int8"],
    "int4": Thresholds(
        max_logit_difference=None, mean_kl=0.1, perplexity_increase=0.06, top1_agreement=0.74, routing_agreement=0.8,
        judged_tokens=JUDGED_TOKENS,
    ),
    "int4_gptq": THRESHOLDS["int4"],
    "int4_awq": THRESHOLDS["int4"],
}  # fmt: skip
Windows = Sequence[Sequence[int]]
FloatArray = npt.NDArray[np.float32]
Scored = Iterator[tuple[FloatArray, FloatArray | None]]  # logits [S, V] and router logits [M, S, E] of each window
_HOME = Path(__file__).resolve().parents[2]


def verify_trtllm(
    engine: TrtllmEngine,
    source: SourceModel,
    ranks: RankFolder,
    python: Path,
    text: EvaluationText,
    num_tokens: int,
    progress: Callable[[str], None],
    again: bool = True,
    cost: CostOptions | None = None,
) -> Verification:
    """Compare an engine with the float32 reference of its source over the first `num_tokens` tokens of a text. `ranks`
    are the rank files that it was built from, which may be gone; with `again` they are compared with the checkpoint
    even if the build did so. With `cost` the cost of the quantiser is told apart by layer, role and expert; without it
    this is done where a figure misses its limit, by layer and role. `python` is the Python in which TensorRT-LLM is
    installed. Raises EngineError if the engine gives no logits, the text is too short or the engine's tokenizer is not
    the source's."""
    manifest, model = engine.manifest, source.model
    tokenizer = require_same_tokenizer(engine.folder, manifest.tokenizer, manifest.eos_token_ids, source.settings)
    windows = _windows(engine, tokenizer.encode_prompt(text.content), num_tokens)
    half, ids = len(windows[0]) // 2, slice(manifest.tokenizer_size)  # the other ids stand for no text and are masked
    weights = ask_about_engine(engine, ranks, progress, again=again)
    progress(f"asking the engine for the logits of {sum(map(len, windows))} positions")
    answer = _ask(engine, python, model.family.trtllm_network().module, windows, windows[0][:half])
    own = [*windows[0][:half], *answer.decoded_ids]
    reference = Reference(model).run([*windows, own], progress)
    stored = _dequantised(engine, ranks, weights, [*windows, own], progress)
    sums, graph, whole_cost = _compare(engine, model, windows, answer.scored, reference, stored)
    after, _ = next(reference)
    rows = slice(half - 1, len(own) - 1)  # the logits of each row predict the next token
    report = combine(sums, measure(answer.decoded[:, ids], after[rows, ids], own[rows]))
    _, routers = (None, None) if isinstance(stored, str) else next(stored)
    share, k = LOGITS_LIMITS[manifest.precision.dtype].near, model.architecture.experts_per_token
    near = None if routers is None else near_ties(routers[:, rows], k, share, len(answer.decoded_ids))
    way = ask_about_generation(answer.decoded[:, ids], answer.context[:, ids], half - 1, near)
    misserved = way.failure(GENERATION_LIMITS[manifest.precision.dtype])
    missed = report.failures(LIMITS[manifest.precision.name])
    options = cost if cost is not None or not missed else OF_A_FAILURE
    parts = None if options is None else _parts_cost(engine, ranks, stored, windows, options)(progress)
    if parts is not None and missed and (dearest := parts.dearest(LIMITS[manifest.precision.name].mean_kl)) is not None:
        missed.append(dearest)
    questions = weights, graph, whole_cost
    return Verification(
        report=report,
        failures=(
            *(failure for question in questions for failure in question.failures),
            *missed,
            *([] if misserved is None else [misserved]),
        ),
        findings=report.findings(manifest.tokenizer_size, LIMITS[manifest.precision.name]),
        reference=source.checkpoint.identity,
        reference_is_the_source=not changed_sources(model.weights, manifest.source.digests),
        text=text,
        windows=tuple(map(len, windows)),
        questions=questions,
        serving=(way,),
        cost=parts,
        positions=positions_of(windows, sums),
    )


def _windows(engine: TrtllmEngine, tokens: Sequence[int], num_tokens: int) -> Windows:
    """The windows of a text's tokens that the engine takes. Raises EngineError for too few tokens."""
    manifest = engine.manifest
    size = min(WINDOW_TOKENS, manifest.max_sequence - 1, manifest.max_num_tokens)
    windows = list(split_windows(tokens, size, num_tokens)) if size > 0 else []
    if not windows or len(windows[0]) < MIN_TOKENS:
        raise EngineError(
            f"verifying {engine.folder}: {min(size, num_tokens, len(tokens))} tokens to measure on, expected at least "
            f"{MIN_TOKENS}; ask for more with --verify-tokens, or build it with a longer --max-seq-len"
        )
    return windows


def _compare(
    engine: TrtllmEngine, model: Model, windows: Windows, scored: FloatArray, reference: Scored, stored: Scored | str
) -> tuple[list[WindowSums], Answer, Answer]:
    """The figures of each window of `scored` logits [positions, V] against the reference, and the answers to the second
    and the third question. `stored` is the reference on the dequantised weights, or why there is none."""
    manifest, k = engine.manifest, model.architecture.experts_per_token
    ids, first = slice(manifest.tokenizer_size), slice(LOGITS_TOKENS)
    sums: list[WindowSums] = []
    costs: list[WindowSums] = []
    judged, start = [], 0
    for window, (expected, routing) in zip(windows, reference, strict=False):  # one more window follows
        found = scored[start : start + len(window), ids]
        sums.append(measure(found, expected[:, ids], window))
        start += len(window)
        if isinstance(stored, str):
            continue
        logits, routers = next(stored)
        near = None if routers is None else routers[:, first]
        judged.append(judged_differences(found[first], logits[first, ids], near, k, manifest.precision.dtype))
        costs.append(measure(logits[:, ids], expected[:, ids], window, routers, routing, k))
    limits = LIMITS[manifest.precision.name]
    if isinstance(stored, str):
        return sums, Answer(question=OF_LOGITS, unasked=stored), Answer(question=OF_COST, unasked=stored)
    num_tokens = sum(len(window[first]) for window in windows)
    graph = ask_about_logits(judged, num_tokens, manifest.precision.dtype)
    return sums, graph, ask_about_cost(costs, limits)


def _dequantised(
    engine: TrtllmEngine, ranks: RankFolder, answer: Answer, windows: Windows, progress: Callable[[str], None]
) -> Scored | str:
    """The logits of each window, and its router logits, by the reference on the dequantised weights of rank files; or
    why there are none."""
    present = ranks.digests()
    if not present or answer.figures.get("asked_of", present) != present:
        return f"the rank files that {engine.folder.name} was built from are not in {ranks.folder}"
    stored = open_rank_weights(ranks.plan, ranks.folder)
    missing = next((problem for name in stored.table if (problem := stored.misfit(name))), None)
    if missing is not None:
        return missing
    model, left_out = ranks.plan.model, list(ranks.plan.options.left_out)

    def choose(_mixture: int, logits: FloatArray) -> npt.NDArray[np.int64]:
        """The experts [T, K] of router logits [T, E] among those that the rank files have."""
        kept = logits.copy()
        kept[:, left_out] = -np.inf
        return np.argsort(-kept, axis=-1, kind="stable")[:, : model.architecture.experts_per_token]

    reference = Reference(dataclasses.replace(model, weights=stored))
    return reference.run(windows, progress, choose=choose if left_out else None)


def _parts_cost(
    engine: TrtllmEngine, ranks: RankFolder, reference: Scored | str, windows: Windows, options: CostOptions
) -> CostWork:
    """What measures the cost of each part of rank files; `reference` is why they cannot be read, if they cannot."""
    manifest, model, grain = engine.manifest, ranks.plan.model, options.grain or Grain.LAYERS
    if isinstance(reference, str):
        return unasked(grain, reference)
    if ranks.plan.options.left_out:
        return unasked(grain, "experts are left out of the rank files; build with --keep-all-experts")
    token_ids = [token for window in windows for token in window]
    return prepare_cost(
        open_rank_weights(ranks.plan, ranks.folder),
        model,
        token_ids,
        options,
        longest=manifest.max_sequence,
        precision=manifest.precision.name,
        num_ids=manifest.tokenizer_size,
    )


def record_trtllm(engine: TrtllmEngine, verification: Verification) -> None:
    """Write the result of a verification into engine.json, in place of an earlier result. Raises EngineError if
    engine.json changed after the engine was opened."""
    if open_trtllm_engine(engine.folder, check_digests=False).manifest != engine.manifest:
        raise changed_meanwhile(engine.folder)
    manifest = dataclasses.replace(engine.manifest, verification=verification.to_json())
    write_trtllm_manifest(engine.folder, manifest)


@dataclass(frozen=True, kw_only=True)
class _Answer:
    """Logits [positions, V] of all windows, ids [n] and logits [n, V] of the tokens generated after a prompt, and the
    logits [n, V] of the same tokens in a prompt."""

    scored: npt.NDArray[np.float32]
    decoded_ids: list[int]
    decoded: npt.NDArray[np.float32]
    context: npt.NDArray[np.float32]


def _ask(
    engine: TrtllmEngine, python: Path, module: str | None, windows: Sequence[Sequence[int]], prompt: Sequence[int]
) -> _Answer:
    """Run the engine with TensorRT-LLM's Python, one process for each rank, and read its logits. After `prompt` the
    engine generates as many tokens as the prompt has. `module` defines the engine's network if the library lacks it."""
    world_size = engine.manifest.parallel.world_size
    prefixes = [window[:length] for window in windows for length in range(1, len(window) + 1)]
    with tempfile.TemporaryDirectory(prefix="moeship-verify-") as name:
        requests, answers = Path(name) / "requests.npz", Path(name) / "answers.npz"
        np.savez(
            requests,
            lengths=np.array([len(prefix) for prefix in prefixes], dtype=np.int64),
            tokens=np.concatenate([np.array(prefix, dtype=np.int32) for prefix in prefixes]),
            decoded=np.array(prompt, dtype=np.int32),
            steps=np.int64(len(prompt)),
        )
        words = ["-m", "trt_build.trtllm.logits", str(engine.folder.resolve()), str(requests), str(answers)]
        program = [str(python), *words, *([] if module is None else [module])]
        if world_size > 1:
            program = [MPIRUN, "--allow-run-as-root", "-n", str(world_size), *program]
        path = os.pathsep.join(filter(None, [str(_HOME), os.environ.get("PYTHONPATH")]))
        with child_program(program, stdout=sys.stderr, env={**os.environ, "PYTHONPATH": path}) as process:
            status = process.wait()
        if status or not answers.is_file():
            raise EngineError(
                f"verifying {engine.folder}: the process that runs the engine ended with status {status} and "
                "wrote no logits; see its output above"
            )
        with np.load(answers) as found:
            return _Answer(
                scored=found["scored"],
                decoded_ids=found["decoded_ids"].tolist(),
                decoded=found["decoded_logits"],
                context=found["context_logits"],
            )
