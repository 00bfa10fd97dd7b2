"""Small engines of both families for tests of what `moeship verify` asks."""

from __future__ import annotations

from pathlib import Path

import pytest
from checkpoints import write_phixtral_checkpoint
from mixtral_checkpoints import write_mixtral_checkpoint

from export.checkpoint.folder import open_checkpoint
from export.families import read_model
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.engine import open_engine

# The window is shorter than the texts of the tests. Sizes are unequal, and blocks of 64 divide what matrices take.
SIZES = {"hidden_size": 128, "ffn_size": 192, "num_heads": 4, "num_layers": 3}
WRITTEN = {
    "mixtral": (
        write_mixtral_checkpoint,
        {"seed": 3, "num_kv_heads": 2, "head_dim": 32, "spelling": "packed", "config": {"sliding_window": 40}},
    ),
    "small-phixtral": (
        write_phixtral_checkpoint,
        {
            "seed": 7, "num_experts": 5, "experts_per_token": 2, "rotary_dim": 16, "max_positions": 640,
            "vocab_size": 352,
        },
    ),
}  # fmt: skip


@pytest.fixture(scope="session")
def built(made_once, tiny_checkpoint, tiny_engines):
    """(family, precision, kernels) -> an engine and the model that it was built from; made when first asked for. A
    recipe file stands in place of a precision. The phixtral is `tiny_checkpoint`; a smaller one is for tests that ask
    about many engines."""

    def built(family, precision, kernels, provider="cpu"):
        if family == "phixtral":
            checkpoint, folder = tiny_checkpoint, tiny_engines(precision, provider, kernels)
        else:
            write, sizes = WRITTEN[family]
            checkpoint = made_once(f"questions-{family}", lambda folder: write(folder, **SIZES, **sizes))
            stored = {"recipe": precision} if isinstance(precision, Path) else {"precision": precision}
            folder = made_once(
                f"questions-{family}-{provider}-{getattr(precision, 'stem', precision)}-{kernels}",
                lambda folder: build_engine(
                    BuildOptions(
                        checkpoint=str(checkpoint), output=folder, kernels=kernels, provider=provider, **stored
                    )
                ),
            )
        return open_engine(folder, check_digests=False), read_model(open_checkpoint(checkpoint))

    return built
