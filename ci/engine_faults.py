"""Put every fault of tests/engine_faults.py into engines of the trained examples, and ask what `moeship verify` asks:

    python ci/engine_faults.py --work /tmp/faults --output faults.json        # the faults
    python ci/engine_faults.py --work /tmp/sound --sound 20                   # sound engines of 20 seeds instead

Both examples, both kinds of kernels, fp32, int8 and int4. A fault's margin is the largest figure of a question over its
limit; "exact" where what differs must not differ at all. Prints one line an engine, then the table of docs/quality.md:
each fault, the question that has the larger margin, and the least margin of all engines. Exit status 1 for a margin
below 10, and for a sound engine that fails.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402 - found through the path above
from checkpoints import write_phixtral_checkpoint  # noqa: E402
from engine_faults import FAULTS, SERVING_FAULTS, with_fault  # noqa: E402
from mixtral_checkpoints import write_mixtral_checkpoint  # noqa: E402

from export.checkpoint.folder import open_checkpoint  # noqa: E402
from export.families import Model, read_model  # noqa: E402
from export.merge.config import read_merge_config  # noqa: E402
from export.merge.merge import merge  # noqa: E402
from trt_build.comparison.answers import Answer  # noqa: E402
from trt_build.comparison.serving_ways import SERVING_LIMITS, Way  # noqa: E402
from trt_build.ort.build import BuildOptions, build_engine  # noqa: E402
from trt_build.ort.engine import Engine, open_engine  # noqa: E402
from trt_build.ort.kernels import is_usable  # noqa: E402
from trt_build.ort.questions.graph import ask_about_graph  # noqa: E402
from trt_build.ort.questions.weights import ask_about_weights  # noqa: E402
from trt_build.ort.served_as_scored import compare_serving  # noqa: E402

KINDS = (
    ("fp32", "onnxruntime"), ("int8", "onnxruntime"), ("int4", "onnxruntime"), ("int8", "moeship"), ("int4", "moeship")
)  # fmt: skip
NUM_TOKENS = 96
SERVED_TOKENS = 512
LEAST_MARGIN = 10.0
WEIGHTS, GRAPH, SERVING = "weights", "graph", "serving"
SIZES = {
    "phixtral": {
        "hidden_size": 192, "num_heads": 6, "ffn_size": 448, "num_layers": 3, "rotary_dim": 16, "max_positions": 640,
        "vocab_size": 352, "num_experts": 5, "experts_per_token": 2,
    },
    "mixtral": {"hidden_size": 192, "ffn_size": 448, "num_heads": 6, "num_kv_heads": 2, "head_dim": 32},
}  # fmt: skip


def of_weights(answer: Answer) -> float:
    """The largest figure over its limit; infinite where something differs that must be equal."""
    if answer.figures["num_inexact"]:
        return math.inf
    largest, limits = answer.figures["largest"], answer.figures["limits"]
    return max((largest[name][key] / limits[name][key] for name in largest for key in limits[name]), default=0.0)


def of_graph(answer: Answer) -> float:
    """The largest figure over its limit; infinite where the graph cannot be run."""
    if "logits" not in answer.figures:
        return math.inf if answer.failures else 0.0
    figures = (answer.figures["logits"], *answer.figures["routers"].values())
    return float(np.nan_to_num(max(figures), nan=math.inf) / answer.figures["allowed"])


def of_serving(ways: Iterable[Way], precision: str) -> float:
    """The largest figure of a way over its limit."""
    bounds = [(way, way.limits(SERVING_LIMITS[precision])) for way in ways]
    return max((max(way.mean / most.mean, way.largest / most.largest) for way, most in bounds), default=0.0)


def margins(engine: Engine, model: Model, tokens: Sequence[int]) -> dict[str, float]:
    """The margins of the first two questions."""
    return {
        WEIGHTS: of_weights(ask_about_weights(engine, model)),
        GRAPH: of_graph(ask_about_graph(engine, model, tokens[:NUM_TOKENS])),
    }


def of_faults(engine: Engine, model: Model, work: Path) -> dict[str, dict[str, float]]:
    """The margins of each fault, put into a copy of `engine`."""
    network, precision = model.family.network(model.weights.checkpoint.config), engine.manifest.judged_as
    tokens = random_tokens(model)
    has_bias = f"{network.head}.bias" in model.weights.table
    found = {}
    for name, fault in FAULTS.items():
        if has_bias or not fault.needs_bias:
            found[name] = margins(with_fault(engine, work / "faulty", fault, network), model, tokens)
    for name, fault in SERVING_FAULTS.items():
        wrong = with_fault(engine, work / "faulty", fault, network)
        found[f"serving alone: {name}"] = {SERVING: of_serving(compare_serving(wrong, tokens, quiet), precision)}
    return found


def random_tokens(model: Model) -> list[int]:
    count = min(SERVED_TOKENS, model.architecture.max_positions)
    return np.random.default_rng(3).integers(0, 256, count).tolist()


def quiet(_text: str) -> None:
    pass


def trained(work: Path) -> list[Path]:
    """The checkpoints of the trained examples."""
    merge(read_merge_config(ROOT / "examples/tiny-phixtral/merge.yml"), work / "phixtral")
    return [work / "phixtral", ROOT / "examples/tiny-mixtral/checkpoint"]


def engines(checkpoint: Path, work: Path) -> Iterable[tuple[Engine, Model]]:
    """Engines of every kind, one at a time."""
    model = read_model(open_checkpoint(checkpoint))
    for precision, kernels in KINDS:
        if kernels == "moeship" and not is_usable():
            continue
        folder = work / f"{model.family.name}-{precision}-{kernels}"
        build_engine(BuildOptions(checkpoint=str(checkpoint), output=folder, precision=precision, kernels=kernels))
        yield open_engine(folder), model
        shutil.rmtree(folder)


def ask_about_faults(work: Path, output: Path | None) -> int:
    """Exit status after all faults of the trained examples."""
    every: dict[str, dict[str, dict[str, float]]] = {}
    for checkpoint in trained(work):
        for engine, model in engines(checkpoint, work):
            sound = {**margins(engine, model, random_tokens(model)), SERVING: served(engine, model)}
            found = {"none": sound, **of_faults(engine, model, work)}
            small = {
                name: best(all_of)[1]
                for name, all_of in found.items()
                if name != "none" and best(all_of)[1] < LEAST_MARGIN
            }
            print(f"{engine.folder.name}: sound {sound}, small {small}", flush=True)
            every[engine.folder.name] = found
    if output:
        output.write_text(json.dumps(every, indent=1) + "\n")
    print("\n".join(table(every)))
    small = [
        name for found in every.values() for name, by in found.items() if name != "none" and best(by)[1] < LEAST_MARGIN
    ]
    failing = [name for name, found in every.items() if not best(found["none"])[1] <= 1]
    return 1 if small or failing else 0


def served(engine: Engine, model: Model) -> float:
    return of_serving(compare_serving(engine, random_tokens(model), quiet), engine.manifest.judged_as)


def best(found: Mapping[str, float]) -> tuple[str, float]:
    """The question with the largest margin, and the margin."""
    name = max(found, key=lambda question: found[question])
    return name, found[name]


def table(every: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[str]:
    """The rows of docs/quality.md: a fault, which question catches it, the least margin of all engines."""
    names = list(dict.fromkeys(name for found in every.values() for name in found if name != "none"))
    rows = ["| fault | caught by | least margin |", "|---|---|---:|"]
    for name in names:
        found = [best(faults[name]) for faults in every.values() if name in faults]
        by = sorted({question for question, _ in found})
        least = min(margin for _, margin in found)
        rows.append(f"| {name} | {', '.join(by)} | {'exact' if math.isinf(least) else f'{least:,.0f}'} |")
    return rows


def ask_sound_engines(work: Path, seeds: Iterable[int]) -> int:
    """Exit status after engines of random weights: 1 if one fails a question."""
    worst: dict[tuple[str, str], float] = {}
    status = 0
    for seed in seeds:
        for family, write in (("phixtral", write_phixtral_checkpoint), ("mixtral", write_mixtral_checkpoint)):
            folder = work / f"{family}-{seed}"
            write(folder, seed=seed, **SIZES[family])
            for engine, model in engines(folder, work):
                tokens = random_tokens(model)
                found = {**margins(engine, model, tokens), SERVING: served(engine, model)}
                found["serving, float32 activations"] = of_serving(
                    [way for way in compare_serving(engine, tokens, quiet) if way.exact], engine.manifest.judged_as
                )
                for question, margin in found.items():
                    key = (engine.folder.name, question)
                    worst[key] = max(worst.get(key, 0.0), margin)
                    if not margin <= 1:
                        print(f"a sound engine fails: seed {seed}, {engine.folder.name}, {question}, {margin:.3g}")
                        status = 1
            shutil.rmtree(folder)
        print(f"seed {seed} done", flush=True)
    for (name, question), margin in worst.items():
        print(f"{name}: {question} at most {margin:.2g} of the limit")
    return status


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="a folder that does not exist yet")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write all margins as JSON")
    parser.add_argument("--sound", type=int, metavar="N", help="ask sound engines of random weights, of N seeds")
    parser.add_argument("--first", type=int, default=0, metavar="SEED", help="the first seed (default: %(default)s)")
    arguments = parser.parse_args(argv)
    arguments.work.mkdir(parents=True)
    if arguments.sound:
        return ask_sound_engines(arguments.work, range(arguments.first, arguments.first + arguments.sound))
    return ask_about_faults(arguments.work, arguments.output)


if __name__ == "__main__":
    sys.exit(main())
