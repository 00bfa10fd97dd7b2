"""TensorRT-LLM checkpoints of weights that other tools packed: groups keep their codes where the form has them."""

from __future__ import annotations

import numpy as np
import pytest
from checkpoints import write_phixtral_checkpoint
from mixtral_checkpoints import write_mixtral_checkpoint
from packed_checkpoints import pack_gptq
from trtllm.ranks import understood

from export.checkpoint.tensor_table import Role
from export.trtllm.checkpoint import CheckpointOptions, plan_checkpoint
from export.trtllm.parallel import Parallelism
from trt_build.trtllm.questions.rank_weights import open_rank_weights
from trt_build.trtllm.questions.weights import RankFolder, ask_about_weights

PACKED = (Role.ATTENTION, Role.EXPERT)


def write_phixtral(folder):
    return write_phixtral_checkpoint(
        folder, seed=3, num_experts=4, experts_per_token=2, hidden_size=128, num_heads=4, rotary_dim=16, ffn_size=256,
        num_layers=2, dtype="float16",
    )  # fmt: skip


def write_mixtral(folder):
    return write_mixtral_checkpoint(
        folder, seed=1, spelling="published", hidden_size=128, ffn_size=256, num_experts=4, num_heads=8, num_kv_heads=4,
        vocab_size=372, dtype="float16",
    )  # fmt: skip


def rank_folder(rank_files, checkpoint, **options):
    plan = plan_checkpoint(understood(checkpoint), CheckpointOptions(**options))
    return RankFolder(plan=plan, folder=rank_files(checkpoint, **options), max_sequence=64)


def errors(found):
    """|e| / |w| of each row that the checkpoint packs, and the largest |e| in units of the last place of float16."""
    weights = found.plan.model.weights
    stored = open_rank_weights(found.plan, found.folder)
    for name, spec in weights.table.items():
        if spec.role in PACKED:
            wanted = weights.load(name)
            error = np.abs(stored.load(name) - wanted)
            yield np.linalg.norm(error) / np.linalg.norm(wanted), (error / np.abs(wanted).max()).max()


@pytest.mark.parametrize("write", [write_phixtral, write_mixtral])
@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize(
    ("options", "precision"),
    [
        ({"sym": True, "group_size": 64}, "int4_gptq"),
        ({"sym": False, "group_size": 64}, "int4_gptq"),
        ({"sym": False, "bits": 3, "group_size": 128}, "int4_gptq"),
        ({"sym": True, "group_size": 64}, "int4_awq"),
    ],
)
def test_groups_keep_their_codes(tmp_path, rank_files, write, tp, options, precision):
    checkpoint = pack_gptq(write(tmp_path / "packed"), **options)
    found = rank_folder(
        rank_files, checkpoint, precision=precision, sm=80, group_size=64, parallel=Parallelism(tp_size=tp)
    )
    assert ask_about_weights(found).failures == ()
    # A zero is (8 - zero point) * scale, rounded to float16: half a unit in the last place of at most 8 scales.
    for relative, largest in errors(found):
        assert relative < (1e-3 if not options["sym"] else 1e-7)
        assert largest < (2.0**-10 if not options["sym"] else 1e-7)


@pytest.mark.parametrize(
    ("options", "precision"),
    [
        ({"sym": False, "group_size": 64}, "int4_awq"),  # no zero points there
        ({"sym": False, "group_size": 32}, "int4_gptq"),
        ({"sym": False, "group_size": 64, "ordered": True}, "int4_gptq"),
        ({"sym": False, "group_size": 64}, "int4"),  # one scale a row
        ({"sym": False, "group_size": 64}, "int8"),
    ],
)
def test_others_are_quantised_anew(tmp_path, rank_files, options, precision):
    checkpoint = pack_gptq(write_phixtral(tmp_path / "packed"), **options)
    grouped = {"group_size": 64} if "_" in precision else {}
    found = rank_folder(rank_files, checkpoint, precision=precision, sm=80, **grouped)
    assert ask_about_weights(found).failures == ()
    assert all(relative > 1e-3 for relative, _ in errors(found))
