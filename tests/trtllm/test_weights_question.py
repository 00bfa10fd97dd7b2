"""The first question of rank files: sound ones pass in every form and share, and each seeded fault is found."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from mixtral_checkpoints import write_mixtral_checkpoint
from trtllm.rank_faults import FAULTS, PARTICULAR, with_fault
from trtllm.ranks import understood
from trtllm.references import channelwise, groupwise
from trtllm.test_packing import bytes_by_steps, random_codes

from export.floats import widen
from export.trtllm.checkpoint import CheckpointOptions, options_of, plan_checkpoint
from export.trtllm.packing import pack_pairs, unpack, unpack_pairs
from export.trtllm.parallel import Parallelism
from trt_build.comparison.weights.sums import nearest_of_rows
from trt_build.errors import EngineError
from trt_build.trtllm.questions.rank_weights import open_rank_weights
from trt_build.trtllm.questions.weights import RankFolder, ask_about_weights

MIXTRAL = {"hidden_size": 256, "num_heads": 8, "num_kv_heads": 2, "head_dim": 64, "ffn_size": 256, "num_layers": 3}
PARALLEL = {
    "one": Parallelism(),
    "two": Parallelism(tp_size=2),
    "four": Parallelism(tp_size=4, moe_ep_size=2, pp_size=2),
}
MASK_FROM = 257


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    """Two key/value heads, which four ranks hold twice."""
    folder = tmp_path_factory.mktemp("packable") / "mixtral"
    return write_mixtral_checkpoint(folder, seed=6, num_experts=4, vocab_size=372, dtype="float16", **MIXTRAL)


@pytest.fixture
def ranks(rank_files, packable_phixtral, mixtral):
    """(family, CheckpointOptions' fields) -> rank files with their plan."""

    def ranks(family, **options):
        source = {"phixtral": packable_phixtral, "mixtral": mixtral}[family]
        if family == "phixtral":
            options["mask_from"] = MASK_FROM
        plan = plan_checkpoint(understood(source), CheckpointOptions(**options))
        return RankFolder(plan=plan, folder=rank_files(source, **options), max_sequence=64)

    return ranks


# The packed layouts, taken apart --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(64, 64), (64, 448), (448, 64), (128, 192)])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("interleaved", [True, False])
def test_the_bytes_of_the_converters_own_steps_are_unpacked(shape, bits, interleaved):
    codes = random_codes(np.random.default_rng(bits), *shape, bits)
    packed = np.frombuffer(bytes_by_steps(codes, bits, interleaved), dtype=np.uint8).reshape(shape[1], -1)
    found = unpack(packed, bits, interleave=interleaved)
    assert np.array_equal(found.T.astype(int) - 2 ** (bits - 1), codes)
    few = unpack(packed[4:12], bits, interleave=interleaved)
    assert np.array_equal(few.T.astype(int) - 2 ** (bits - 1), codes[:, 4:12])


def test_pairs_of_rows_are_unpacked():
    codes = np.random.default_rng(1).integers(0, 16, (8, 64), dtype=np.uint8)
    assert np.array_equal(unpack_pairs(pack_pairs(codes)), codes)
    assert unpack_pairs(np.array([[0x8F]], dtype=np.uint8)).tolist() == [[7], [0]]  # -1 and -8


def test_the_nearest_values_of_a_row():
    rows = np.float32([[-8, 0.5, -0.5, 1.49, 7.6, 8, np.nextafter(np.float32(0.5), np.float32(0))], [0] * 7])
    assert nearest_of_rows(rows, 4).tolist() == [[-8, 1, -1, 1, 7, 7, 0], [0] * 7]


# Sound rank files -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["phixtral", "mixtral"])
@pytest.mark.parametrize("precision", ["fp32", "fp16", "bf16", "int8", "int4", "int4_gptq", "int4_awq"])
def test_sound_rank_files_pass(ranks, family, precision):
    shared = {"phixtral": ["one", "two"], "mixtral": ["one", "four"]}[family]
    for number, parallel in enumerate(shared):
        options = {"dtype": "bfloat16"} if number and precision.startswith("int") else {}
        found = ranks(family, precision=precision, parallel=PARALLEL[parallel], sm=(80, 90)[number], **options)
        answer = ask_about_weights(found)
        assert answer.failures == ()
        assert answer.figures["num_weights"] >= sum(
            spec.num_elements for spec in found.plan.model.weights.table.values()
        )
        assert answer.figures["asked_of"].keys() == {
            "config.json",
            *(f"rank{rank}.safetensors" for rank in found.plan.headers),
        }


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_plain_weights_are_compared_exactly(ranks, precision):
    answer = ask_about_weights(ranks("phixtral", precision=precision, plain=True))
    assert (answer.failures, answer.figures["largest"]) == ((), {})


@pytest.mark.parametrize("precision", ["int8", "int4", "int4_gptq", "int4_awq"])
@pytest.mark.parametrize("parallel", ["one", "four"])
def test_what_is_read_back_is_what_quantising_gives(ranks, precision, parallel):
    """The references' own rounding in torch; queries, a cut second matrix, and gate and up by themselves."""
    import torch

    found = ranks("mixtral", precision=precision, parallel=PARALLEL[parallel])
    stored, weights = open_rank_weights(found.plan, found.folder), found.plan.model.weights
    bits = {"int8": 8, "int4": 4}.get(precision)
    rounding = channelwise(bits) if bits else groupwise(found.plan.config["quantization"]["group_size"])
    for name, group in (("attn.q", 0), ("fc1", 2), ("fc2", 3)):
        row = next((row for row in weights.table if row.startswith("model.layers.1.") and name in row), None)
        if row is None:
            continue
        parts = weights.table[row].groups[group]
        pieces = [stored.part_rows(row, group, *rows) for rows in ((0, 37), (37, parts[0].shape[0]))]
        for turn, part in enumerate(parts):
            whole = torch.from_numpy(widen(part.read(weights.checkpoint)).copy())
            own = np.concatenate([piece[turn] for piece in pieces])
            np.testing.assert_allclose(own, rounding(whole, 1).numpy(), rtol=1e-6, atol=0)


def test_experts_that_are_left_out_are_not_asked_for(ranks):
    found = ranks("phixtral", precision="int8", left_out=(1,))
    assert ask_about_weights(found).failures == ()
    stored = open_rank_weights(found.plan, found.folder)
    name = next(name for name, spec in stored.table.items() if spec.stacks_experts and name.endswith("weight"))
    with pytest.raises(EngineError, match="expert 1 is asked for, and they do without it"):
        stored.part_rows(name, 1, 0, 16)


# Faults ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "precision", "parallel"),
    [
        ("phixtral", "int4", "two"), ("phixtral", "int8", "one"), ("phixtral", "fp16", "two"),
        ("phixtral", "int4_gptq", "two"), ("mixtral", "int4_awq", "one"), ("mixtral", "int8", "two"),
    ],
)  # fmt: skip
def test_each_fault_is_found(ranks, tmp_path, family, precision, parallel):
    found = ranks(family, precision=precision, parallel=PARALLEL[parallel])
    missed, asked = [], 0
    for number, (name, fault) in enumerate({**FAULTS, **PARTICULAR}.items()):
        folder = with_fault(found.folder, tmp_path / str(number), fault)
        if folder is None:
            continue
        asked += 1
        if ask_about_weights(dataclasses.replace(found, folder=folder)).passed:
            missed.append(name)
    assert missed == []
    assert asked >= 35


NAMED = {
    "experts' second times 1.03": ["layer 1, expert, expert 0", "found them 1.03", "within 0.000498"],
    "two experts swapped": ["layer 1, expert, expert 0", "relative error 1."],
    "codes off by one": ["layer 1, expert, expert 0", "rows 0, 1"],
    "one bias of zero": ["layer 1, bias", "row 3: found 0, expected", "exactly"],
    "one expert less per token": ["config.json: moe: top_k is 1, expected 2"],
    "rotary base off by one": ["config.json: rotary_base is 10001.0, expected 10000.0"],
    "a key that is not expected": ["config.json: q_scaling is 0.97, expected None"],
    "the norm of the second rank alone": ["layer 1, norm", ", rank 1, rows 0"],
    "an id that stands for no text not masked": ["lm_head.bias", "found 0, expected -10000"],
}  # fmt: skip


def test_a_failure_names_what_is_wrong_where(ranks, tmp_path):
    found = ranks("phixtral", precision="int4", parallel=PARALLEL["two"])
    for number, (name, words) in enumerate(NAMED.items()):
        folder = with_fault(found.folder, tmp_path / str(number), {**FAULTS, **PARTICULAR}[name])
        text = "\n".join(ask_about_weights(dataclasses.replace(found, folder=folder)).failures)
        assert [word for word in words if word not in text] == [], text


def test_a_window_that_the_librarys_network_does_not_have_is_found(rank_files, tmp_path):
    source = write_mixtral_checkpoint(
        tmp_path / "windowed", seed=6, num_experts=4, dtype="float16", config={"sliding_window": 40}, **MIXTRAL
    )
    options = CheckpointOptions(precision="int8")
    found = RankFolder(
        plan=plan_checkpoint(understood(source), options), folder=rank_files(source, precision="int8"), max_sequence=41
    )
    assert ask_about_weights(found).failures[0] == (
        "layer 0, attention: sees 40 positions, and the engine's network sees all of 41"
    )
    assert ask_about_weights(dataclasses.replace(found, max_sequence=40)).failures == ()


def test_a_file_that_is_missing_or_cut_is_one_error(ranks, tmp_path):
    found = ranks("phixtral", precision="int8")
    with pytest.raises(EngineError, match=r"reading the rank file .*rank0.safetensors: .*; write the TensorRT-LLM"):
        ask_about_weights(dataclasses.replace(found, folder=tmp_path))


@pytest.mark.parametrize("parallel", PARALLEL)
def test_options_are_read_back_from_a_checkpoints_settings(ranks, parallel):
    from export.trtllm.checkpoint import checkpoint_settings

    plan = ranks("mixtral", precision="int4_gptq", parallel=PARALLEL[parallel], sm=90).plan
    again = plan_checkpoint(plan.model, options_of(checkpoint_settings(plan)))
    assert checkpoint_settings(again) == checkpoint_settings(plan)
