"""What preprocessing tells an engine: TensorRT-LLM's tensors, worked by hand from its rules."""

from __future__ import annotations

import numpy as np
import pytest
from wire_tensors import wire

from triton_repo.contracts.ensemble import PREPROCESSING_INPUTS, PREPROCESSING_OUTPUTS, QUERY_NAMES, STOP_REQUESTS
from triton_repo.contracts.model_parameters import TextParameters
from triton_repo.contracts.wire import COMPATIBILITY_INPUTS, INPUTS
from triton_repo.errors import RequestError
from triton_repo.runtime.answer import AnswerPlan
from triton_repo.runtime.options import plan_generation
from triton_repo.runtime.request_reading import read_options
from triton_repo.runtime.steps.preprocessing import Preprocessor, prepare_stop
from triton_repo.runtime.text.words import unpack_words

ALWAYS = {
    "INPUT_ID", "REQUEST_INPUT_LEN", "REQUEST_OUTPUT_LEN", "OUT_END_ID", "OUT_PAD_ID", "STREAMING", "RETURN_LOG_PROBS",
    "RUNTIME_TOP_K", "ANSWER",
}  # fmt: skip


@pytest.fixture
def prepare(byte_level):
    """Prepares a request of wire values for a model of 64 tokens, by default with the tokenizer's own end token."""

    def prepared(
        end_token_ids=(byte_level.eos_token_id,),
        max_prompt=63,
        num_unused_ids=0,
        one_end_id=False,
        echoes_keys=True,
        guided=True,
        **values,
    ):
        parameters = TextParameters(
            max_sequence=64, max_prompt=max_prompt, end_ids=end_token_ids, num_ids=byte_level.size + num_unused_ids,
            one_end_id=one_end_id, echoes_keys=echoes_keys, guided=guided,
        )  # fmt: skip
        preprocessor = Preprocessor(byte_level, parameters)
        tensors = wire(**{"text_input": "def ", "max_tokens": 8, **values})
        return preprocessor.prepare({QUERY_NAMES[name]: tensor for name, tensor in tensors.items()})

    return prepared


def values_of(outputs) -> dict:
    return {name: tensor.reshape(-1).tolist() for name, tensor in outputs.items() if name != "ANSWER"}


def test_the_outputs_have_the_types_and_dims_that_are_declared(prepare):
    outputs = prepare(
        temperature=0.5, top_k=4, top_p=0.9, seed=2**64 - 1, min_tokens=1, repetition_penalty=1.5, presence_penalty=0.5,
        frequency_penalty=0.25, stop_words=["a", "bc"], bad_words=["d"], return_log_probs=True, stream=True,
        min_p=0.1, num_log_probs=2, logit_bias_ids=[3], logit_bias_values=[1.5],
        num_return_sequences=3, return_prompt_log_probs=True, return_routed_experts=True,
        guided_decoding_guide_type="regex", guided_decoding_guide="a+",
    )  # fmt: skip
    dtypes = {"INT32": np.int32, "UINT64": np.uint64, "FP32": np.float32, "BOOL": np.bool_, "STRING": np.object_}
    declared = {tensor.name: tensor for tensor in PREPROCESSING_OUTPUTS}
    # The key of the answer is drawn beside these; a request to stop others has outputs of its own.
    outputs |= prepare_stop()
    assert set(outputs) == set(declared) - {"ANSWER_KEY"}
    for name, tensor in outputs.items():
        assert tensor.dtype == dtypes[declared[name].dtype]
        assert tensor.shape[0] == 1
        dims = declared[name].dims
        assert len(tensor.shape) == len(dims) + 1
        assert all(dim in (-1, size) for dim, size in zip(dims, tensor.shape[1:], strict=True))


def test_a_request_to_stop_asks_the_engine_for_one_token_after_one():
    outputs = values_of(prepare_stop())
    assert outputs == {
        "INPUT_ID": [0],
        "REQUEST_INPUT_LEN": [1],
        "REQUEST_OUTPUT_LEN": [1],
        STOP_REQUESTS: [True],
    }


def test_a_greedy_request_says_no_more_than_it_must(prepare, byte_level):
    outputs = prepare()
    assert set(outputs) == ALWAYS
    ids, end = byte_level.encode("def "), byte_level.eos_token_id
    assert values_of(outputs) == {
        "INPUT_ID": ids, "REQUEST_INPUT_LEN": [len(ids)], "REQUEST_OUTPUT_LEN": [8], "OUT_END_ID": [end],
        "OUT_PAD_ID": [end], "STREAMING": [False], "RETURN_LOG_PROBS": [False], "RUNTIME_TOP_K": [1],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({"temperature": 0.0, "top_k": 5}, {"RUNTIME_TOP_K": [1]}),
        ({"temperature": 0.5}, {"RUNTIME_TOP_K": [1]}),
        (
            {"temperature": 0.5, "top_p": 1.0},
            {"RUNTIME_TOP_K": [0], "RUNTIME_TOP_P": [1.0], "TEMPERATURE": [0.5]},
        ),
        ({"top_k": 5}, {"RUNTIME_TOP_K": [5], "RUNTIME_TOP_P": [1.0], "TEMPERATURE": [1.0]}),
        ({"top_p": 0.25}, {"RUNTIME_TOP_K": [0], "RUNTIME_TOP_P": [0.25], "TEMPERATURE": [1.0]}),
        ({"temperature": 2.0, "top_p": 0.0}, {"RUNTIME_TOP_K": [1]}),
    ],
)
def test_an_engine_that_is_greedy_unless_told_otherwise_is_told(prepare, given, expected):
    found = values_of(prepare(seed=7, **given))
    sampled = {"RUNTIME_TOP_K", "RUNTIME_TOP_P", "TEMPERATURE"} & set(found)
    assert {name: found[name] for name in sampled} == expected
    assert found.get("SEED") == (None if expected == {"RUNTIME_TOP_K": [1]} else [7])


def test_a_minimum_that_tensorrt_llm_would_not_keep_is_refused(prepare, byte_level):
    end = byte_level.eos_token_id
    message = f"min_tokens: found 3 beside the end tokens {end}, 7, expected 0: .* name one in end_id"
    with pytest.raises(RequestError, match=message):
        prepare(min_tokens=3, end_token_ids=(end, 7), one_end_id=True)
    for allowed in ({"end_id": 7}, {"end_id": -1}, {"min_tokens": 0}, {"one_end_id": False}, {"end_token_ids": (end,)}):
        asked = {"min_tokens": 3, "end_token_ids": (end, 7), "one_end_id": True, **allowed}
        assert prepare(**asked)["REQUEST_OUTPUT_LEN"].item() == 8


def test_a_seed_is_drawn_for_a_sample_without_one_since_an_engine_would_take_0(prepare):
    seeds = {int(prepare(top_p=1.0)["SEED"][0, 0]) for _ in range(5)}
    assert len(seeds) == 5


def test_end_tokens_beyond_the_first_are_stop_words_of_one_token(prepare, byte_level):
    spelled = tuple(byte_level.encode("stop"))
    outputs = prepare(end_token_ids=(3, 5, 9), stop_words=["stop"])
    assert outputs["OUT_END_ID"].tolist() == [[3]]
    words = unpack_words(outputs["STOP_WORDS_IDS"])
    assert words[-2:] == ((5,), (9,))
    assert spelled in words
    assert AnswerPlan.from_json(outputs["ANSWER"][0, 0].decode()).end_ids == (3, 5, 9)


def test_no_end_token_is_minus_one_which_an_engine_never_meets(prepare):
    outputs = prepare(end_id=-1)
    assert outputs["OUT_END_ID"].tolist() == [[-1]]
    assert outputs["OUT_PAD_ID"].tolist() == [[0]]


def test_the_output_is_cut_to_the_room_that_the_prompt_leaves(prepare, byte_level):
    room = 64 - len(byte_level.encode("def "))
    assert prepare(max_tokens=1000)["REQUEST_OUTPUT_LEN"].tolist() == [[room]]


@pytest.mark.parametrize(
    ("given", "streaming"),
    [({}, False), ({"stream": True}, True), ({"stop_words": ["a"]}, True), ({"stream": False}, False)],
)
def test_an_engine_streams_where_each_token_is_looked_at(prepare, given, streaming):
    assert prepare(**given)["STREAMING"].tolist() == [[streaming]]


def test_a_stop_word_that_could_begin_in_the_prompt_is_left_to_the_text(prepare, byte_level):
    ids = byte_level.encode("def ")
    word = byte_level.decode([ids[-1], *byte_level.encode("q")])
    assert byte_level.encode(word)[:1] == [ids[-1]]
    outputs = prepare(stop_words=[word])
    words = unpack_words(outputs["STOP_WORDS_IDS"]) if "STOP_WORDS_IDS" in outputs else ()
    assert all(sequence[0] != ids[-1] for sequence in words)
    assert AnswerPlan.from_json(outputs["ANSWER"][0, 0].decode()).stop_words == (word,)


def test_bad_words_are_spelled(prepare, byte_level):
    words = unpack_words(prepare(bad_words=["語"])["BAD_WORDS_IDS"])
    assert tuple(byte_level.encode("語")) in words


def test_ids_that_stand_for_no_text_are_bad_words_where_the_engine_does_not_mask_them(prepare, byte_level):
    size = byte_level.size
    words = unpack_words(prepare(num_unused_ids=3, bad_words=["q"])["BAD_WORDS_IDS"])
    assert words[-3:] == ((size,), (size + 1,), (size + 2,))
    assert tuple(byte_level.encode("q")) in words
    assert "BAD_WORDS_IDS" not in prepare()


GUIDES = [
    ("json", ""), ("json_schema", '{"x-a": 1}'), ("regex", "(?=a)b"), ("ebnf_grammar", "root ::= [a]"),
]  # fmt: skip


@pytest.mark.parametrize("guide", GUIDES, ids=str)
def test_guides_go_to_tensorrt_llm_as_they_are(prepare, guide):
    found = prepare(echoes_keys=False, guided_decoding_guide_type=guide[0], guided_decoding_guide=guide[1])
    assert found["GUIDED_DECODING_GUIDE_TYPE"].tolist() == [[guide[0].encode()]]
    assert found.get("GUIDED_DECODING_GUIDE", np.array([[b""]])).tolist() == [[guide[1].encode()]]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"guided": False},
            "guided_decoding_guide_type: found json_schema, expected none; .*--guided-decoding-backend",
        ),
        ({"guided_decoding_guide": "{"}, "guided_decoding_guide: found no JSON"),
        ({"end_id": -1}, "end_id: found none beside a guide"),
        ({"end_id": 3}, "end_id: found 3 beside a guide"),
    ],
    ids=str,
)
def test_guides_that_tensorrt_llm_would_not_follow_are_refused(prepare, values, said):
    given = {"guided_decoding_guide_type": "json_schema", "guided_decoding_guide": "{}", **values}
    with pytest.raises(RequestError, match=said):
        prepare(echoes_keys=False, **given)


def test_a_prompt_longer_than_the_engine_reads_at_a_time_is_refused(prepare, byte_level):
    size = len(byte_level.encode("def "))
    assert prepare(max_prompt=size)
    with pytest.raises(RequestError, match=f"found a prompt of {size} tokens, expected at most {size - 1}, which the"):
        prepare(max_prompt=size - 1)


def test_biases_of_ids_and_of_words_come_as_one_number_for_each_token(prepare, byte_level):
    a, b = byte_level.encode("ab")
    outputs = prepare(
        logit_bias_ids=[a, 0], logit_bias_values=[1.5, -2.0],
        embedding_bias_words=["ab", "", "b"], embedding_bias_weights=[0.25, 7.0, 3.0],
    )  # fmt: skip
    expected = np.zeros(byte_level.size, dtype=np.float32)
    expected[[a, 0, b]] = 1.75, -2.0, 3.25
    assert np.array_equal(outputs["EMBEDDING_BIAS"], expected[None])


FEATURES = {
    "min_p": ({"min_p": 0.5}, "found 0.5, expected 0.0"),
    "logit_bias_ids": ({"logit_bias_ids": [1, 2], "logit_bias_values": [1.0, 1.0]}, "found 2 ids, expected 0 ids"),
    "embedding_bias_words": (
        {"embedding_bias_words": ["a"], "embedding_bias_weights": [1.0]}, "found 1 words, expected 0 words",
    ),
    "num_log_probs": ({"num_log_probs": 5}, "found 5, expected 0"),
    "return_prompt_log_probs": ({"return_prompt_log_probs": True}, "found true, expected false"),
    "return_routed_experts": ({"return_routed_experts": True}, "found true, expected false"),
    "num_return_sequences": ({"num_return_sequences": 2}, "found 2, expected 1"),
}  # fmt: skip


@pytest.mark.parametrize("name", FEATURES)
def test_what_an_engine_of_tensorrt_llm_is_not_asked_for_is_refused_by_name(prepare, name):
    given, problem = FEATURES[name]
    with pytest.raises(RequestError) as caught:
        prepare(echoes_keys=False, **given)
    assert f"{name}: {problem}; TensorRT-LLM's engine does not serve it: leave it out" in str(caught.value)
    assert caught.value.kind == "INVALID_ARG"


def test_the_answers_plan_survives_its_json(prepare):
    text = prepare(
        text_input="naïve 😀 ",
        stop_words=["語", "\n"],
        exclude_input_in_output=False,
        return_log_probs=True,
    )["ANSWER"][0, 0].decode()
    plan = AnswerPlan.from_json(text)
    assert (plan.prefix, plan.stop_words, plan.most_tokens) == ("naïve 😀 ", ("語", "\n"), 8)
    assert plan.to_json() == text
    with pytest.raises(ValueError, match="keys missing or unknown: num_input_tokens"):
        AnswerPlan.from_json(text.replace("num_input_tokens", "other"))


@pytest.mark.parametrize(
    "bad", [{"max_tokens": 0, "top_p": 7.0}, {"text_input": ""}, {"end_id": 99999}, {"text_input": "x" * 200}]
)
def test_a_refusal_is_word_for_word_that_of_a_model_without_steps(prepare, byte_level, bad):
    def plan():
        options = read_options(wire(**{"text_input": "def ", "max_tokens": 8, **bad}))
        plan_generation(options, byte_level, max_sequence=64, end_token_ids=(byte_level.eos_token_id,))

    with pytest.raises(RequestError) as single:
        plan()
    with pytest.raises(RequestError) as first_step:
        prepare(**bad)
    assert str(first_step.value) == str(single.value)


def test_every_tensor_of_the_wire_has_a_name_here():
    assert [tensor.name for tensor in PREPROCESSING_INPUTS] == [
        QUERY_NAMES[tensor.name] for tensor in (*INPUTS, *COMPATIBILITY_INPUTS)
    ]
    assert len(set(QUERY_NAMES.values())) == len(QUERY_NAMES)
