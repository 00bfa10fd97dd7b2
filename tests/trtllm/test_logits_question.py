"""The second question: ranks that compute in float16 keep its limits, and faults of what they are given are seen.

The ranks are those of the stand-in, on faulty rank files; the reference has the weights of the sound ones. So a fault
stands for a network that computes something else than the rank files say.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
from mixtral_checkpoints import write_mixtral_checkpoint
from trtllm.rank_faults import FAULTS, PARTICULAR, with_fault
from trtllm.ranks import Ranks, understood

from export.reference.model import Reference
from export.trtllm.checkpoint import CheckpointOptions, plan_checkpoint
from export.trtllm.parallel import Parallelism
from trt_build.trtllm.questions.logits import LOGITS_LIMITS, ask_about_logits, judged_differences
from trt_build.trtllm.questions.rank_weights import open_rank_weights

IDS = np.random.default_rng(4).integers(0, 250, 64).tolist()
MIXTRAL = {"hidden_size": 256, "num_heads": 8, "num_kv_heads": 2, "head_dim": 64, "ffn_size": 256, "num_layers": 3}
VOCAB = {"phixtral": 257, "mixtral": 372}  # ids that stand for text
# Within what float16 loses; the first question finds them.
TOO_SMALL = {
    "one value of the norm off by a bit", "rotary base off by one", "another epsilon", "router times 1.03",
    "more of a head turned", "a key that is not expected",  # the stand-in reads neither
}  # fmt: skip
pytestmark = pytest.mark.usefixtures("network")


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory):
    folder = tmp_path_factory.mktemp("packable") / "mixtral"
    return write_mixtral_checkpoint(folder, seed=6, num_experts=4, vocab_size=372, dtype="float16", **MIXTRAL)


@pytest.fixture
def asked(rank_files, packable_phixtral, mixtral):
    """(family, CheckpointOptions' fields) -> rank files, and a function that asks of rank files in a folder."""

    def asked(family, dtype="float16", **options):
        source = {"phixtral": packable_phixtral, "mixtral": mixtral}[family]
        options["mask_from"] = VOCAB[family] if family == "phixtral" else None
        if options["precision"] != "fp32":
            options["dtype"] = dtype
        folder, ids = rank_files(source, **options), slice(VOCAB[family])
        plan = plan_checkpoint(understood(source), CheckpointOptions(**options))
        model = dataclasses.replace(plan.model, weights=open_rank_weights(plan, folder))
        expected, routers = next(Reference(model).run([IDS]))

        def ask(ranks):
            found = Ranks(ranks).logits(IDS)[:, ids]
            return ask_about_logits([judged_differences(found, expected[:, ids], routers, 2, dtype)], len(IDS), dtype)

        return folder, ask

    return asked


@pytest.mark.parametrize("family", ["phixtral", "mixtral"])
@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        ("fp32", "float32"), ("fp16", "float16"), ("bf16", "bfloat16"), ("int8", "float16"), ("int4", "bfloat16"),
        ("int4_gptq", "float16"), ("int4_awq", "float16"),
    ],
)  # fmt: skip
def test_sound_ranks_keep_the_limits_of_their_dtype(asked, monkeypatch, family, precision, dtype):
    folder, ask = asked(family, dtype, precision=precision)
    monkeypatch.setenv("STANDIN_ACTIVATIONS", dtype)
    answer = ask(folder)
    assert answer.failures == ()
    least = {"float32": 1e-8, "float16": 1e-4, "bfloat16": 1e-3}[dtype]
    assert least < answer.figures["mean"] < LOGITS_LIMITS[dtype].mean / 2
    assert answer.figures["num_tokens"] >= 8


@pytest.mark.parametrize(
    ("family", "precision"), [("phixtral", "int4"), ("mixtral", "int8"), ("phixtral", "fp16"), ("mixtral", "int4_gptq")]
)
def test_faults_are_seen_through_the_rounding_of_float16(asked, tmp_path, monkeypatch, family, precision):
    folder, ask = asked(family, precision=precision, parallel=Parallelism(tp_size=2))
    monkeypatch.setenv("STANDIN_ACTIVATIONS", "float16")
    missed, seen = [], 0
    for number, (name, fault) in enumerate({**FAULTS, **PARTICULAR}.items()):
        faulty = with_fault(folder, tmp_path / str(number), fault)
        if faulty is None or name in TOO_SMALL:
            continue
        try:
            answer = ask(faulty)
        except (AssertionError, KeyError, NotImplementedError, RuntimeError, TypeError, ValueError):
            seen += 1  # the library refuses it
            continue
        seen += not answer.passed
        if answer.passed:
            missed.append((name, answer.figures["logits"], answer.figures["mean"]))
    assert missed == []
    assert seen >= 28
