"""Write golden.npz into a CUDA engine's folder: what a machine with a GPU compares the engine with.

    python ci/gpu/write_golden.py ENGINE --reference CHECKPOINT     the checkpoint, computed in float32
    python ci/gpu/write_golden.py ENGINE                            the engine's own graph through the CPU's kernels

The first judges the engine as `moeship verify` does. The second needs the engine's
memory alone (float16 matrices are widened: twice that) and, the weights being the same, is held to float16's rounding.
Runs where moeship is installed; no GPU is needed. Exit status 0 done, 2 wrong input.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import math
import sys
from pathlib import Path

import numpy as np
import numpy.typing as npt

from export.checkpoint.folder import open_checkpoint
from export.command import run_command
from export.exporter import SERVING_GRAPH
from export.families import read_model
from export.provider import PROVIDERS
from export.reference.model import Reference
from export.tokenizer.loading import load_tokenizer
from trt_build.comparison.evaluation_text import own_text
from trt_build.comparison.parity import THRESHOLDS
from trt_build.errors import EngineError
from trt_build.ort.device import Device
from trt_build.ort.engine import Engine, open_engine
from trt_build.ort.session import ScoringSession

GOLDEN_FILE = "golden.npz"
# Limits if both sides have the same weights. The differences are rounding between operations and, in Hopper's float16
# product, the erf form of GELU, which by itself costs the tiny phixtral 1e-5 nats. If two experts have nearly equal
# logits, the other expert may be chosen.
SAME_WEIGHTS = {"mean_kl": 1e-3, "mean_decoded_kl": 1e-3, "top1_agreement": 0.98, "routing_agreement": 0.99}

FloatArray = npt.NDArray[np.float32]


def through_the_cpus_kernels(engine: Engine, token_ids: list[int]) -> tuple[FloatArray, FloatArray | None]:
    """Logits [S, V] and router logits [L, S, E] of the engine's own graph and weights, computed on the CPU."""
    provider = dataclasses.replace(PROVIDERS["cuda"], runtime_name=PROVIDERS["cpu"].runtime_name, options={})
    return ScoringSession(engine, device=Device(provider=provider, kind="cpu")).run(token_ids)


def by_the_reference(engine: Engine, checkpoint: str, token_ids: list[int]) -> tuple[FloatArray, FloatArray | None]:
    """Logits [S, V] and router logits [L, S, E] of the reference. Raises EngineError if the checkpoint is of another
    model."""
    model = read_model(open_checkpoint(checkpoint), engine.manifest.architecture.experts_per_token or None)
    if model.architecture != engine.manifest.architecture:
        raise EngineError(f"writing golden logits: {checkpoint} is not the model of {engine.folder}")
    return next(Reference(model).run([token_ids]))


def limits(precision: str) -> dict[str, float]:
    """The limits of `moeship verify` for a precision, under the names used in golden.npz."""
    allowed = THRESHOLDS[precision]
    return {
        "mean_kl": allowed.mean_kl, "mean_decoded_kl": allowed.mean_kl, "top1_agreement": allowed.top1_agreement,
        "routing_agreement": allowed.routing_agreement,
    }  # fmt: skip


def weight_bytes(engine: Engine) -> dict[str, int]:
    """Bytes of the data file by the operation that reads them: experts, embedding, every other operation."""
    import onnx

    graph = onnx.load(str(engine.folder / SERVING_GRAPH), load_external_data=False).graph
    sizes = {
        tensor.name: math.prod(tensor.dims) * onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        for tensor in graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    totals = {"expert_bytes": 0, "embedding_bytes": 0, "other_bytes": 0}
    for node in graph.node:
        experts, embedding = node.op_type in ("MoE", "QMoE"), node.op_type in ("Gather", "GatherBlockQuantized")
        key = "expert_bytes" if experts else "embedding_bytes" if embedding else "other_bytes"
        totals[key] += sum(sizes.get(name, 0) for name in node.input)
    return totals


def write(folder: Path, reference: str | None, num_tokens: int) -> Path:
    """Compute and write golden.npz; returns its path. Raises EngineError if the folder is no CUDA engine."""
    engine = open_engine(folder)
    if engine.manifest.provider != "cuda":
        raise EngineError(f"writing golden logits: {folder} is built for {engine.manifest.provider}, expected cuda")
    token_ids = load_tokenizer(folder).encode(own_text().content)[: min(num_tokens, engine.manifest.max_sequence)]
    if reference is None:
        logits, routed = through_the_cpus_kernels(engine, token_ids)
        source, allowed = "the engine's graph through ONNX Runtime's CPU kernels", SAME_WEIGHTS
    else:
        logits, routed = by_the_reference(engine, reference, token_ids)
        source, allowed = f"transformers in float32 on {reference}", limits(engine.manifest.precision.name)
    path = folder / GOLDEN_FILE
    np.savez(
        path,
        token_ids=np.array(token_ids, np.int64), logits=logits, source=source, limits=json.dumps(allowed),
        router_logits=np.empty((0, len(token_ids), 0), np.float32) if routed is None else routed,
        **weight_bytes(engine),
    )  # fmt: skip
    return path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("engine", type=Path, metavar="ENGINE", help="engine folder built with --provider cuda")
    parser.add_argument("--reference", metavar="CHECKPOINT", help="the checkpoint it was built from")
    parser.add_argument("--tokens", type=int, default=128, metavar="N", help="(default: %(default)s)")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)

    def run() -> int:
        path = write(options.engine, options.reference, options.tokens)
        print(f"{path}: {path.stat().st_size / 1e6:.1f} MB")
        return 0

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
