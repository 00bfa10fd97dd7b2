"""Write a synthetic checkpoint again in GPTQ's layout, with random codes: for measuring what building from it costs.

    python benchmarks/synthetic_checkpoint.py --like phixtral-4x2_8 --layers 2 --output floats
    python benchmarks/pack_synthetic.py floats packed [--group-size 128]
    python benchmarks/conversion.py --checkpoint packed --work FOLDER

Nothing can be said of quality with it. Exit status 0 done, 2 wrong input.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from export.checkpoint.folder import open_checkpoint
from export.checkpoint.shard_writer import PlannedTensor, write_sharded
from export.checkpoint.tensor_table import Role
from export.command import run_command
from export.families import read_model

PACKED_ROLES = (Role.ATTENTION, Role.FFN, Role.EXPERT)
CHUNK = 1 << 22
SHARD_BYTES = 5_000_000_000


def pack(source: Path, output: Path, group_size: int) -> None:
    """Write the checkpoint `source` into the folder `output`, its linears in GPTQ's layout."""
    model = read_model(open_checkpoint(source))
    checkpoint = model.weights.checkpoint
    linears = {part.name for spec in model.weights.table.values() if spec.role in PACKED_ROLES for part in spec.parts}
    planned = []
    for name, stored in checkpoint.tensors.items():
        if name not in linears:
            planned.append(PlannedTensor(name=name, dtype=stored.dtype, shape=stored.shape))
            continue
        stem, (rows, features) = name.removesuffix(".weight"), stored.shape
        groups = -(-features // group_size)
        planned += [
            PlannedTensor(name=f"{stem}.qweight", dtype="I32", shape=(features // 8, rows)),
            PlannedTensor(name=f"{stem}.qzeros", dtype="I32", shape=(groups, rows // 8)),
            PlannedTensor(name=f"{stem}.scales", dtype="F16", shape=(groups, rows)),
            PlannedTensor(name=f"{stem}.g_idx", dtype="I32", shape=(features,)),
        ]
    rng = np.random.default_rng(0)

    def chunks(tensor: PlannedTensor) -> Iterator[npt.NDArray[Any]]:
        if tensor.name in checkpoint.tensors:
            yield checkpoint.read(tensor.name)
        elif tensor.name.endswith(".g_idx"):
            yield (np.arange(tensor.shape[0]) // group_size).astype(np.int32)
        elif tensor.name.endswith(".scales"):
            yield rng.uniform(2e-3, 4e-3, tensor.shape).astype(np.float16)
        elif tensor.name.endswith(".qzeros"):
            yield np.full(tensor.shape, 0x77777777, dtype=np.int32)  # 8 less one
        else:
            for start in range(0, tensor.num_elements, CHUNK):
                size = min(CHUNK, tensor.num_elements - start)
                yield rng.integers(-(1 << 31), 1 << 31, size, dtype=np.int32)

    output.mkdir(parents=True)
    write_sharded(output, planned, chunks, max_shard_bytes=SHARD_BYTES)
    for path in source.iterdir():
        if path.suffix == ".json" and not path.name.endswith("index.json"):
            shutil.copy(path, output)
    settings = {"quant_method": "gptq", "bits": 4, "group_size": group_size, "sym": True, "desc_act": False}
    config = {**json.loads((source / "config.json").read_text()), "quantization_config": settings}
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="checkpoint with float weights")
    parser.add_argument("output", type=Path, help="folder to make")
    parser.add_argument("--group-size", type=int, default=128, help="neighbouring input features with one scale")
    arguments = parser.parse_args(argv)

    def run() -> int:
        pack(arguments.source, arguments.output, arguments.group_size)
        return 0

    return run_command(run)


if __name__ == "__main__":
    sys.exit(main())
