"""Ask what `moeship verify` asks of TensorRT-LLM engines, of sound rank files and of faulty ones:

    python ci/rank_faults.py --work /tmp/faults --seeds 20

Random models of both families in each precision. The stand-in of tests/trtllm computes what
the ranks hold, and rounds what operations hand on to the dtype of the engine. Prints one line for each kind of sound
rank files, with the largest figures of all seeds, then one line for each fault: whether the first question finds it,
and the logits' difference of the second. Exit status 1 for a sound engine that fails, and for a missed fault.
"""

from __future__ import annotations

import argparse
import dataclasses
import logging
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests/trtllm/standin")]

import numpy as np  # noqa: E402 - found through the path above
from checkpoints import write_phixtral_checkpoint  # noqa: E402
from mixtral_checkpoints import write_mixtral_checkpoint  # noqa: E402
from trtllm.rank_faults import FAULTS, PARTICULAR, with_fault  # noqa: E402
from trtllm.ranks import FloatArray, Ranks, understood  # noqa: E402

import trt_build.trtllm.phixtral  # noqa: E402, F401 - registers the network
from export.reference.model import Reference  # noqa: E402
from export.trtllm.checkpoint import CheckpointOptions, write_checkpoint  # noqa: E402
from export.trtllm.parallel import Parallelism  # noqa: E402
from trt_build.comparison.answers import Answer  # noqa: E402
from trt_build.trtllm.questions.logits import (  # noqa: E402
    GENERATION_LIMITS,
    ask_about_generation,
    ask_about_logits,
    judged_differences,
)
from trt_build.trtllm.questions.rank_weights import open_rank_weights  # noqa: E402
from trt_build.trtllm.questions.weights import RankFolder, ask_about_weights  # noqa: E402

PHIXTRAL = {
    "hidden_size": 256, "num_heads": 4, "ffn_size": 384, "num_layers": 2, "rotary_dim": 24, "max_positions": 96,
    "vocab_size": 277, "dtype": "float16",
}  # fmt: skip
MIXTRAL = {
    "hidden_size": 256, "num_heads": 8, "num_kv_heads": 2, "head_dim": 64, "ffn_size": 256, "num_layers": 3,
    "vocab_size": 372, "dtype": "float16",
}  # fmt: skip
KINDS = (
    ("fp32", "float32"), ("fp16", "float16"), ("int8", "float16"), ("int4", "float16"), ("int4_gptq", "float16"),
    ("int4_awq", "float16"), ("bf16", "bfloat16"), ("int4", "bfloat16"),
)  # fmt: skip
FAULTY = ("fp16", "int8", "int4", "int4_gptq", "int4_awq")
TEXT_IDS = {"phixtral": 257, "mixtral": 372}  # the phixtral's other ids stand for no text
NUM_TOKENS, GENERATED = 80, 16


class Engine:
    """Rank files of a model, and the reference on what they hold."""

    def __init__(self, source: Path, folder: Path, family: str, options: dict[str, Any]) -> None:
        self.dtype = options.get("dtype") or "float32"
        self.ids = slice(TEXT_IDS[family])
        mask_from = TEXT_IDS[family] if family == "phixtral" else None
        plan = write_checkpoint(understood(source), CheckpointOptions(mask_from=mask_from, **options), folder)
        self.ranks = RankFolder(plan=plan, folder=folder, max_sequence=64)
        self.tokens = np.random.default_rng(3).integers(0, 250, NUM_TOKENS).tolist()
        stored = dataclasses.replace(plan.model, weights=open_rank_weights(plan, folder))
        logits, self.routers = next(Reference(stored).run([self.tokens]))
        self.expected: FloatArray = logits[:, self.ids]

    def weights(self, folder: Path) -> Answer:
        return ask_about_weights(dataclasses.replace(self.ranks, folder=folder))

    def logits(self, folder: Path) -> Answer:
        found = Ranks(folder).logits(self.tokens)[:, self.ids]
        judged = judged_differences(found, self.expected, self.routers, 2, self.dtype)
        return ask_about_logits([judged], NUM_TOKENS, self.dtype)

    def generation(self) -> tuple[float, float, str | None]:
        """Mean and largest difference of generated tokens, and what is wrong with them."""
        ranks, prompt = Ranks(self.ranks.folder), self.tokens[:GENERATED]
        tokens, decoded = ranks.greedy(prompt, GENERATED)
        context = ranks.logits([*prompt, *tokens])[GENERATED - 1 : 2 * GENERATED - 1]
        way = ask_about_generation(decoded[:, self.ids], context[:, self.ids], GENERATED)
        return way.mean, way.largest, way.failure(GENERATION_LIMITS[self.dtype])


def options_of(precision: str, dtype: str) -> dict[str, Any]:
    return {"precision": precision, **({} if precision == "fp32" else {"dtype": dtype})}


def make_phixtral(folder: Path, seed: int) -> Path:
    return write_phixtral_checkpoint(folder, seed=seed, num_experts=4, experts_per_token=2, **PHIXTRAL)


def make_mixtral(folder: Path, seed: int) -> Path:
    return write_mixtral_checkpoint(folder, seed=seed, num_experts=4, **MIXTRAL)


FAMILIES: dict[str, Callable[[Path, int], Path]] = {"phixtral": make_phixtral, "mixtral": make_mixtral}


def sound_engines(work: Path, seeds: range) -> int:
    """Print the largest figures of sound rank files of each kind; the number of false alarms."""
    alarms = 0
    for family, make in FAMILIES.items():
        for precision, dtype in KINDS:
            os.environ["STANDIN_ACTIVATIONS"] = dtype
            figures = []
            for seed in seeds:
                source = make(work / "source", seed)
                engine = Engine(source, work / "ranks", family, options_of(precision, dtype))
                answers = engine.weights(engine.ranks.folder), engine.logits(engine.ranks.folder)
                mean, largest, misserved = engine.generation()
                failures = [*(text for answer in answers for text in answer.failures), *([misserved or ""])]
                alarms += any(failures)
                for text in filter(None, failures):
                    print(f"FALSE ALARM: {family} {precision} {dtype}, seed {seed}: {text}")
                found = answers[1].figures
                behind = found.get("behind_near_ties", NUM_TOKENS) / NUM_TOKENS
                figures.append((found.get("logits", 0.0), found.get("mean", 0.0), behind, largest, mean))
                shutil.rmtree(work / "ranks")
                shutil.rmtree(source)
            names = ("logits largest", "mean", "behind near ties", "generation largest", "mean")
            worst = ", ".join(f"{name} {value:.2g}" for name, value in zip(names, np.max(figures, axis=0), strict=True))
            print(f"sound {family} {precision} {dtype}: {worst}", flush=True)
    return alarms


def faulty_engines(work: Path, families: Sequence[str], precisions: Sequence[str]) -> int:
    """Print what the two questions say of each fault; the number of those that neither finds."""
    missed = 0
    os.environ["STANDIN_ACTIVATIONS"] = "float16"
    for family in families:
        source = FAMILIES[family](work / "source", 11)
        for precision in precisions:
            if (family, precision) == ("phixtral", "int4_awq"):
                continue  # laid out as the Mixtral's
            options = {**options_of(precision, "float16"), "parallel": Parallelism(tp_size=2)}
            engine = Engine(source, work / "ranks", family, options)
            for name, fault in {**FAULTS, **PARTICULAR}.items():
                folder = with_fault(engine.ranks.folder, work / "faulty", fault)
                if folder is not None:
                    first = engine.weights(folder).passed
                    second = of_logits(engine, folder)
                    missed += bool(first) and second.startswith("passed")
                    print(f"{family} {precision} {name}: {'MISSED' if first else 'found'} | {second}", flush=True)
                shutil.rmtree(work / "faulty")
            shutil.rmtree(work / "ranks")
        shutil.rmtree(source)
    return missed


def of_logits(engine: Engine, folder: Path) -> str:
    try:
        answer = engine.logits(folder)
    except (AssertionError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        return f"refused by the library: {type(error).__name__}"
    found = answer.figures
    verdict = "passed" if answer.passed else "found"
    return f"{verdict}, largest {found['logits']:.2g}, mean {found['mean']:.2g}"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="a folder that does not exist yet")
    parser.add_argument("--seeds", type=int, default=20, metavar="N", help="sound engines of each kind")
    parser.add_argument("--only", choices=["sound", "faulty"], help="leave out the other half")
    parser.add_argument("--family", choices=FAMILIES, help="faults of this family alone; a run takes minutes")
    parser.add_argument("--precision", choices=FAULTY, help="faults of this precision alone")
    arguments = parser.parse_args(argv)
    logging.disable(logging.CRITICAL)
    arguments.work.mkdir(parents=True)
    alarms = 0 if arguments.only == "faulty" else sound_engines(arguments.work, range(arguments.seeds))
    missed = (
        0
        if arguments.only == "sound"
        else faulty_engines(
            arguments.work,
            [arguments.family] if arguments.family else list(FAMILIES),
            [arguments.precision] if arguments.precision else FAULTY,
        )
    )
    print(f"{alarms} false alarms, {missed} faults missed")
    return 1 if alarms or missed else 0


if __name__ == "__main__":
    sys.exit(main())
