"""Small engines of both families for tests of what `moeship verify` asks."""

from __future__ import annotations

from pathlib import Path

import pytest
from mixtral_checkpoints import write_mixtral_checkpoint

from export.checkpoint.folder import open_checkpoint
from export.families import read_model
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.engine import open_engine

# The window is shorter than the texts of the tests. Sizes are unequal, and blocks of 64 divide what matrices take.
MIXTRAL = {
    "hidden_size": 192, "ffn_size": 448, "num_heads": 6, "num_kv_heads": 2, "head_dim": 32, "num_layers": 3,
    "spelling": "packed", "config": {"sliding_window": 40},
}  # fmt: skip


@pytest.fixture(scope="session")
def built(made_once, tiny_checkpoint, tiny_engines):
    """(family, precision, kernels) -> an engine and the model that it was built from; made when first asked for. A
    recipe file stands in place of a precision."""

    def built(family, precision, kernels, provider="cpu"):
        stored = {"recipe": precision} if isinstance(precision, Path) else {"precision": precision}
        checkpoint = tiny_checkpoint
        if family == "mixtral":
            checkpoint = made_once(
                "windowed-mixtral", lambda folder: write_mixtral_checkpoint(folder, seed=3, **MIXTRAL)
            )
            folder = made_once(
                f"windowed-mixtral-{provider}-{getattr(precision, 'stem', precision)}-{kernels}",
                lambda folder: build_engine(
                    BuildOptions(
                        checkpoint=str(checkpoint), output=folder, kernels=kernels, provider=provider, **stored
                    )
                ),
            )
        else:
            folder = tiny_engines(precision, provider, kernels)
        return open_engine(folder, check_digests=False), read_model(open_checkpoint(checkpoint))

    return built
