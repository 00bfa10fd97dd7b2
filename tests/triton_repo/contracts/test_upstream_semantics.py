"""What TensorRT-LLM 1.2 makes of a request, field by field, held against both layouts here.

Sources, all of NVIDIA/TensorRT-LLM: utils.cc is triton_backend/inflight_batcher_llm/src/utils.cc, kernels are
cpp/tensorrt_llm/kernels, defaults cpp/tensorrt_llm/layers/defaultDecodingParams.h, checks
cpp/tensorrt_llm/executor/samplingConfig.cpp.
"""

from __future__ import annotations

import numpy as np
import pytest
from wire_tensors import wire

from triton_repo.contracts.ensemble import ADDED_ENGINE_NAMES, ENGINE_NAMES, QUERY_NAMES
from triton_repo.contracts.model_parameters import TextParameters
from triton_repo.errors import RequestError
from triton_repo.runtime.options import SamplingPlan
from triton_repo.runtime.request_reading import read_options
from triton_repo.runtime.sampling import Sampler
from triton_repo.runtime.steps.preprocessing import Preprocessor
from triton_repo.runtime.steps.token_request import read_token_request

MAX_SEQUENCE = 64
# What is given, how many of 300 equally likely tokens may be drawn, and where upstream decides it. 1 is greedy.
CHOICES = [
    ({}, 1, "defaults: top_k 0, top_p 0; regularizeTopKTopP of kernels/samplingTopKKernels.h makes k 1 of both 0"),
    ({"temperature": 1.0}, 1, "the same: the temperature does not matter, and NVIDIA's clients always send 1.0"),
    ({"temperature": 5.0}, 1, "the same"),
    ({"temperature": 1.0, "top_k": 0}, 1, "the same"),
    ({"temperature": 1.0, "top_p": 0.0}, 1, "getSamplingConfigFromTensors of utils.cc: a top_p of 0 counts as absent"),
    ({"temperature": 1.0, "top_k": 0, "top_p": 0.0}, 1, "the same"),
    ({"top_k": 1}, 1, "the likeliest"),
    ({"temperature": 1.0, "top_k": 1, "top_p": 0.0}, 1, "what inflight_batcher_llm_client.py sends"),
    ({"top_k": 1, "top_p": 1.0}, 1, "the likeliest, whatever top_p"),
    ({"temperature": 0.0, "top_p": 0.9}, 1, "allowed by the checks; logits are divided by next to nothing"),
    ({"temperature": 0.0, "top_k": 40}, 1, "the same"),
    ({"top_p": 1.0}, 300, "defaults: temperature 1; top_k 0 and top_p 1 pass regularizeTopKTopP and the checks"),
    ({"temperature": 0.7, "top_p": 1.0}, 300, "the same"),
    ({"temperature": 0.7, "top_k": 0, "top_p": 1.0}, 300, "the same"),
    ({"top_p": 0.5}, 150, "half of the mass"),
    ({"top_k": 40}, 300, "regularizeTopKTopP: top_p 0 beside a top_k counts as 1; here all tie with the 40th"),
    ({"top_k": 40, "top_p": 0.5}, 150, "both limits; here all tie with the 40th"),
]


def single(byte_level, **given):
    """The sampling plan of the model without steps."""
    return SamplingPlan(options=read_options(wire(text_input="x", max_tokens=4, **given)), prompt_ids=(1,), end_ids=())


def steps(byte_level, **given):
    """The sampling plan that an ensemble's engine makes of what preprocessing sends."""
    parameters = TextParameters(
        max_sequence=MAX_SEQUENCE, max_prompt=MAX_SEQUENCE - 1, end_ids=(byte_level.eos_token_id,),
        num_ids=byte_level.size,
    )  # fmt: skip
    values = wire(text_input="x", max_tokens=4, **given)
    prepared = Preprocessor(byte_level, parameters).prepare({QUERY_NAMES[name]: v for name, v in values.items()})
    names = ENGINE_NAMES | ADDED_ENGINE_NAMES
    tensors = {names[name]: tensor for name, tensor in prepared.items() if name in names}
    return read_token_request(tensors, MAX_SEQUENCE, byte_level.size).plan


@pytest.mark.parametrize("layout", [single, steps])
@pytest.mark.parametrize(("given", "count", "source"), CHOICES)
def test_as_many_tokens_may_be_drawn_as_upstream_leaves(byte_level, layout, given, count, source):
    sampler = Sampler(layout(byte_level, seed=5, **given), num_tokens=300)
    drawn = {sampler.choose(np.zeros(300, dtype=np.float32)).token_id for _ in range(2500)}
    assert len(drawn) == count, source


@pytest.mark.parametrize(
    ("given", "source"),
    [
        ({"temperature": -0.1}, "checkTemperature"),
        ({"top_k": -1}, "checkTopK"),
        ({"top_p": 1.1}, "checkTopP"),
        ({"min_tokens": -1}, "checkMinTokens"),
        ({"repetition_penalty": 0.0}, "checkRepetitionPenalty"),
        ({"repetition_penalty": -1.0}, "checkRepetitionPenalty"),
        ({"beam_width": 0}, "checkBeamWidth"),
        ({"num_return_sequences": 0}, "checkNumReturnSequences"),
    ],
)
@pytest.mark.parametrize("layout", [single, steps])
def test_what_upstream_refuses_is_refused(byte_level, layout, given, source):
    with pytest.raises(RequestError) as caught:
        layout(byte_level, **given)
    assert f"{next(iter(given))}: found" in str(caught.value), source
