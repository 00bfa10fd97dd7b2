"""Mixtral through the library's own class in the stand-in, float32: tensor, expert and pipeline parallel ranks."""

from __future__ import annotations

import numpy as np
import pytest
from mixtral_checkpoints import write_mixtral_checkpoint
from torch_reference import load_reference
from trtllm.ranks import Ranks, largest_difference, understood
from trtllm.references import answer_of, logits_of

from export.tokenizer.loading import load_tokenizer
from export.trtllm.parallel import Parallelism

BAR = 1e-4
TEXT = "def read(self, path):\n    with open(path) as stream:\n        return stream.read()\n" * 3
# tp_size, moe_ep_size, pp_size. Two key/value heads: on four ranks each serves two.
SHARES = [(1, 1, 1), (2, 1, 1), (2, 2, 1), (4, 1, 1), (4, 2, 1), (4, 4, 1), (1, 1, 2), (1, 1, 3), (2, 2, 2)]
pytestmark = pytest.mark.usefixtures("tensorrt_llm")


def parallel(tp: int, ep: int, pp: int) -> Parallelism:
    return Parallelism(tp_size=tp, moe_ep_size=ep, pp_size=pp)


@pytest.fixture(scope="module")
def reference(trained_mixtral):
    return load_reference(understood(trained_mixtral))


@pytest.fixture(scope="module")
def token_ids(trained_mixtral):
    return load_tokenizer(trained_mixtral).encode(TEXT)


@pytest.mark.parametrize(("tp", "ep", "pp"), SHARES)
def test_logits_of_the_trained_model_are_the_references(rank_files, trained_mixtral, reference, token_ids, tp, ep, pp):
    expected = logits_of(reference, token_ids)
    ranks = Ranks(rank_files(trained_mixtral, precision="fp32", parallel=parallel(tp, ep, pp)))
    assert largest_difference(ranks.logits(token_ids), expected) <= BAR


@pytest.mark.parametrize(("tp", "ep", "pp"), [(1, 1, 1), (2, 2, 1), (4, 1, 1), (1, 1, 3), (2, 1, 2)])
def test_answers_through_the_cache_are_the_references(rank_files, trained_mixtral, reference, token_ids, tp, ep, pp):
    prompt = token_ids[:12]
    ranks = Ranks(rank_files(trained_mixtral, precision="fp32", parallel=parallel(tp, ep, pp)))
    assert ranks.greedy(prompt, 24)[0] == answer_of(reference, prompt, 24)


@pytest.mark.parametrize("spelling", ["published", "packed"])
@pytest.mark.parametrize(("tp", "ep", "pp"), [(1, 1, 1), (2, 2, 1), (6, 3, 1), (2, 1, 2)])
def test_logits_of_a_random_model_are_the_references(tmp_path, rank_files, spelling, tp, ep, pp):
    sizes = {"num_experts": 6, "ffn_size": 56, "vocab_size": 371}  # heads of 16: N * D is not H
    source = write_mixtral_checkpoint(tmp_path / spelling, seed=5, spelling=spelling, **sizes)
    ids = np.random.default_rng(4).integers(0, 371, 48).tolist()
    expected = logits_of(load_reference(understood(source)), ids)
    ranks = Ranks(rank_files(source, precision="fp32", parallel=parallel(tp, ep, pp)))
    assert largest_difference(ranks.logits(ids), expected) <= BAR


@pytest.mark.parametrize(
    "scaling",
    [
        {"type": "linear", "factor": 4.0},
        {
            "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    ],
    ids=["linear", "llama3"],
)  # fmt: skip
def test_logits_with_a_scaled_rotary_embedding_are_the_references(tmp_path, rank_files, scaling):
    sizes = {"num_experts": 6, "ffn_size": 56, "vocab_size": 371, "max_positions": 256}
    plain = write_mixtral_checkpoint(tmp_path / "plain", seed=5, **sizes)
    source = write_mixtral_checkpoint(tmp_path / "scaled", seed=5, config={"rope_scaling": scaling}, **sizes)
    ids = np.random.default_rng(4).integers(0, 371, 200).tolist()
    expected = logits_of(load_reference(understood(source)), ids)
    assert largest_difference(logits_of(load_reference(understood(plain)), ids), expected) > 10 * BAR
    ranks = Ranks(rank_files(source, precision="fp32", parallel=parallel(2, 1, 1)))
    assert largest_difference(ranks.logits(ids), expected) <= BAR
