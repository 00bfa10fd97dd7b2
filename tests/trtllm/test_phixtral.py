"""phixtral's network in the stand-in, float32: the reference's logits, on one rank and on several, and its answers."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from decoding import greedy
from torch_reference import load_reference
from trtllm.ranks import Ranks, largest_difference, shares, understood
from trtllm.references import answer_of, logits_of

from export.tokenizer.loading import load_tokenizer
from trt_build.ort.build import BuildOptions, build_engine
from trt_build.ort.session import ScoringSession, Session

BAR = 1e-4  # the largest absolute difference of a logit
TEXT = '''class Reader:
    """Reads records from a file."""

    def __init__(self, path, size=512):
        self.path = path
        self._buffer = bytearray(size)

    def read(self):
        with open(self.path, "rb") as stream:
            return stream.read()


def main(argv=None):
    for name in argv or []:
        print(len(Reader(name).read()))
'''
PROMPTS = ("def main(", "class Queue:\n    def ", "Return the ")
# moe_tp_size x moe_ep_size, whose product the six heads divide among; the random model's four heads take 2 x 2.
TRAINED_SHARES = [(1, 1), (2, 1), (1, 2), (3, 2)]
pytestmark = pytest.mark.usefixtures("network")


@pytest.fixture(scope="module")
def reference(trained_phixtral):
    return load_reference(understood(trained_phixtral))


@pytest.fixture(scope="module")
def tokenizer(trained_phixtral):
    return load_tokenizer(trained_phixtral)


@pytest.fixture(scope="module")
def token_ids(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert len(ids) > 100
    return ids


@pytest.fixture(scope="module")
def expected(reference, token_ids):
    return logits_of(reference, token_ids)


@pytest.fixture(scope="module")
def onnx_engine(tmp_path_factory, trained_phixtral):
    folder = tmp_path_factory.mktemp("onnx") / "fp32"
    return build_engine(BuildOptions(checkpoint=str(trained_phixtral), output=folder, precision="fp32"))


@pytest.fixture(scope="module")
def expected_answers(reference, tokenizer):
    return [answer_of(reference, tokenizer.encode(prompt), 32) for prompt in PROMPTS]


@pytest.mark.parametrize(("moe_tp", "moe_ep"), TRAINED_SHARES)
def test_logits_of_the_trained_model_are_the_references(
    rank_files, trained_phixtral, token_ids, expected, onnx_engine, moe_tp, moe_ep
):
    ranks = Ranks(rank_files(trained_phixtral, precision="fp32", parallel=shares(moe_tp, moe_ep)))
    found = ranks.logits(token_ids)
    assert largest_difference(found, expected) <= BAR
    assert largest_difference(found, ScoringSession(onnx_engine).run(token_ids)[0]) <= BAR


@pytest.mark.parametrize(("moe_tp", "moe_ep"), TRAINED_SHARES)
def test_answers_through_the_cache_are_the_references(
    rank_files, trained_phixtral, tokenizer, reference, expected_answers, moe_tp, moe_ep
):
    ranks = Ranks(rank_files(trained_phixtral, precision="fp32", parallel=shares(moe_tp, moe_ep)))
    for prompt, answer in zip(PROMPTS, expected_answers, strict=True):
        ids = tokenizer.encode(prompt)
        tokens, logits = ranks.greedy(ids, len(answer))
        assert tokens == answer
        whole = logits_of(reference, ids + answer)
        assert largest_difference(logits, whole[len(ids) - 1 : -1]) <= BAR


def test_answers_are_those_of_the_onnx_engine(rank_files, trained_phixtral, tokenizer, onnx_engine):
    ranks = Ranks(rank_files(trained_phixtral, precision="fp32"))
    session = Session(onnx_engine)
    for prompt in PROMPTS:
        ids = tokenizer.encode(prompt)
        assert ranks.greedy(ids, 32)[0] == greedy(session, ids, 32)


@pytest.mark.parametrize(("moe_tp", "moe_ep"), [(1, 1), (2, 1), (1, 2), (2, 2), (4, 1), (1, 4)])
def test_logits_of_a_random_model_are_the_references(rank_files, packable_phixtral, moe_tp, moe_ep):
    ids = np.random.default_rng(3).integers(0, 277, 64).tolist()  # 277: the head is filled up to the ranks
    expected = logits_of(load_reference(understood(packable_phixtral)), ids)
    ranks = Ranks(rank_files(packable_phixtral, precision="fp32", parallel=shares(moe_tp, moe_ep)))
    assert expected.std() > 1
    assert largest_difference(ranks.logits(ids), expected) <= BAR


@pytest.mark.parametrize("sharding_dim", [0, 1])
def test_a_cut_embedding_gives_the_same_logits(tmp_path, rank_files, packable_phixtral, sharding_dim):
    # What --use_parallel_embedding of upstream's converters writes: the library cuts the layer, the file its tensor.
    from safetensors.torch import load_file, save_file

    whole = rank_files(packable_phixtral, precision="fp32", parallel=shares(2, 1))
    folder = shutil.copytree(whole, tmp_path / "cut")
    config = json.loads((folder / "config.json").read_text())
    config |= {"use_parallel_embedding": True, "embedding_sharding_dim": sharding_dim}
    (folder / "config.json").write_text(json.dumps(config))
    for rank in range(2):
        path, name = folder / f"rank{rank}.safetensors", "transformer.vocab_embedding.weight"
        tensors = load_file(path)
        table = torch.nn.functional.pad(tensors[name], (0, 0, 0, 1 - sharding_dim))  # 277 rows, filled up to 278
        save_file(tensors | {name: table.chunk(2, sharding_dim)[rank].contiguous()}, path)
    ids = list(range(0, 276, 5))
    assert largest_difference(Ranks(folder).logits(ids), Ranks(whole).logits(ids)) <= 1e-5


def config_of(**changes):
    values = {
        "architecture": "PhixtralForCausalLM", "dtype": "float32", "hidden_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 4, "vocab_size": 277, "hidden_act": "gelu_new", "intermediate_size": 384,
        "norm_epsilon": 1e-5, "position_embedding_type": "rope_gpt_neox", "max_position_embeddings": 96,
        "rotary_pct": 0.375, "rotary_base": 10000.0, "rotary_scaling": None,
        "moe": {"num_experts": 4, "top_k": 2, "normalization_mode": 1},
    }  # fmt: skip
    return {name: value for name, value in (values | changes).items() if value is not ...}


def test_a_config_survives_json_with_its_mixture(tmp_path):
    from tensorrt_llm.layers import MoeConfig
    from tensorrt_llm.models import PretrainedConfig

    config = PretrainedConfig.from_dict(config_of())
    config.to_json_file(str(tmp_path / "config.json"))
    again = PretrainedConfig.from_json_file(str(tmp_path / "config.json"))
    assert again.to_dict() == config.to_dict()
    assert again.moe == MoeConfig(num_experts=4, top_k=2)
    assert (again.rotary_embedding_dim, type(again).__name__) == (12, "PhixtralConfig")


def test_a_mixture_may_be_given_as_the_librarys_own_class(network):
    from tensorrt_llm.layers import MoeConfig

    moe = MoeConfig(num_experts=4, top_k=2)
    assert network.PhixtralConfig(**config_of(moe=moe)).to_dict()["moe"] == moe.to_dict()


@pytest.mark.parametrize("missing", ["rotary_pct", "rotary_base", "moe"])
def test_a_config_without_what_has_no_default_is_refused(missing):
    from tensorrt_llm.models import PretrainedConfig

    with pytest.raises(TypeError, match=f"missing 1 required keyword-only argument: '{missing}'"):
        PretrainedConfig.from_dict(config_of(**{missing: ...}))


def test_pipeline_parallelism_is_refused_with_what_to_do(network):
    mapping = {"world_size": 2, "pp_size": 2}
    with pytest.raises(ValueError, match=r"found pp_size 2 and cp_size 1, expected 1 of both.*moe_ep_size"):
        network.PhixtralForCausalLM(network.PhixtralConfig(**config_of(mapping=mapping)))


def test_importing_the_network_registers_it(network):
    from tensorrt_llm.models import MODEL_MAP

    assert MODEL_MAP["PhixtralForCausalLM"] is network.PhixtralForCausalLM
    assert network.PhixtralForCausalLM.config_class is network.PhixtralConfig
