"""genai_config.json names the tokens and the caches as onnxruntime-genai reads them."""

from __future__ import annotations

import pytest

from export.architecture import Architecture
from export.checkpoint.token_ids import TokenIds
from export.provider import provider_of
from trt_build.ort.planning.genai_config import genai_config

SMALL = Architecture(
    family="mixtral", hidden_size=64, num_layers=3, num_heads=4, num_kv_heads=2, head_size=16, ffn_size=32,
    vocab_size=300, num_experts=4, experts_per_token=2, rotary_dim=16, rope_base=1e4, norm_epsilon=1e-5,
    max_positions=64, source_dtype=None,
)  # fmt: skip


def model_of(ids):
    return genai_config(SMALL, 48, ids, provider_of("cpu"))["model"]


@pytest.mark.parametrize(
    ("ids", "tokens"),
    [
        (TokenIds(eos=(7,), bos=1, pad=0), {"eos_token_id": 7, "bos_token_id": 1, "pad_token_id": 0}),
        # As in transformers' generate: without a pad token, the first end token pads.
        (TokenIds(eos=(7, 9), bos=None, pad=None), {"eos_token_id": [7, 9], "bos_token_id": 7, "pad_token_id": 7}),
        (TokenIds(eos=(), bos=None, pad=None), {"eos_token_id": []}),
    ],
)
def test_one_end_token_is_a_number_and_several_are_a_list(ids, tokens):
    model = model_of(ids)
    assert {key: value for key, value in model.items() if key.endswith("_token_id")} == tokens


def test_sizes_and_the_caches_of_every_layer_are_named():
    config = genai_config(SMALL, 48, TokenIds(eos=(7,), bos=1, pad=0), provider_of("cpu"))
    decoder = config["model"]["decoder"]
    assert (config["model"]["vocab_size"], config["model"]["context_length"], config["search"]["max_length"]) == (
        300, 48, 48,
    )  # fmt: skip
    sizes = ("head_size", "hidden_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads")
    assert [decoder[size] for size in sizes] == [16, 64, 4, 3, 2]
    assert decoder["inputs"]["past_key_names"] == "past_key_values.%d.key"
    assert decoder["outputs"]["present_value_names"] == "present.%d.value"
    # Greedy search, one beam.
    search = config["search"]
    assert (search["do_sample"], search["num_beams"], search["top_k"], search["top_p"]) == (False, 1, 1, 1.0)
    assert (search["min_length"], search["temperature"], search["past_present_share_buffer"]) == (0, 1.0, True)
