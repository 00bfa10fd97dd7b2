"""Put every fault of tests/engine_faults.py into engines of the trained examples, and ask what `moeship verify` asks:

    python ci/engine_faults.py --work /tmp/faults

Both examples, both kinds of kernels, fp32, int8 and int4. Prints one line an engine, and each fault that both
questions missed. Exit status 1 for a missed fault, and for a sound engine that fails.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import numpy as np  # noqa: E402 - found through the path above
from engine_faults import FAULTS, with_fault  # noqa: E402

from export.checkpoint.folder import open_checkpoint  # noqa: E402
from export.families import Model, read_model  # noqa: E402
from export.merge.config import read_merge_config  # noqa: E402
from export.merge.merge import merge  # noqa: E402
from trt_build.ort.build import BuildOptions, build_engine  # noqa: E402
from trt_build.ort.engine import Engine, open_engine  # noqa: E402
from trt_build.ort.kernels import is_usable  # noqa: E402
from trt_build.ort.questions.graph import ask_about_graph  # noqa: E402
from trt_build.ort.questions.weights import ask_about_weights  # noqa: E402

KINDS = (
    ("fp32", "onnxruntime"), ("int8", "onnxruntime"), ("int4", "onnxruntime"), ("int8", "moeship"), ("int4", "moeship")
)  # fmt: skip
NUM_TOKENS = 96


def failures(engine: Engine, model: Model, tokens: Sequence[int]) -> list[str]:
    """What the two questions say; the second is asked only where the first finds nothing, as it takes longer."""
    found = list(ask_about_weights(engine, model).failures)
    return found or list(ask_about_graph(engine, model, tokens).failures)


def missed_faults(engine: Engine, model: Model, work: Path) -> list[str]:
    """The faults that neither question finds in a copy of `engine`, and what is wrong with the engine itself."""
    network = model.family.network(model.weights.checkpoint.config)
    tokens = np.random.default_rng(3).integers(0, 256, NUM_TOKENS).tolist()
    missed = [f"a sound engine: {failure}" for failure in failures(engine, model, tokens)]
    has_bias = f"{network.head}.bias" in model.weights.table
    for name, fault in FAULTS.items():
        if fault.needs_bias and not has_bias:
            continue
        wrong = with_fault(engine, work / "faulty", fault, network)
        if not failures(wrong, model, tokens):
            missed.append(name)
    return missed


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True, metavar="DIR", help="a folder that does not exist yet")
    work = parser.parse_args(argv).work
    work.mkdir(parents=True)
    phixtral = work / "phixtral"
    merge(read_merge_config(ROOT / "examples/tiny-phixtral/merge.yml"), phixtral)
    status = 0
    for checkpoint in (phixtral, ROOT / "examples/tiny-mixtral/checkpoint"):
        model = read_model(open_checkpoint(checkpoint))
        for precision, kernels in KINDS:
            if kernels == "moeship" and not is_usable():
                continue
            folder = work / f"{model.family.name}-{precision}-{kernels}"
            build_engine(BuildOptions(checkpoint=str(checkpoint), output=folder, precision=precision, kernels=kernels))
            missed = missed_faults(open_engine(folder), model, work)
            print(f"{folder.name}: {len(missed)} missed {missed or ''}", flush=True)
            status = 1 if missed else status
    return status


if __name__ == "__main__":
    sys.exit(main())
