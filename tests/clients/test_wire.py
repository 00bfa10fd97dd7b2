"""Messages are those that tritonclient itself would build and read; broken ones are refused with the reason."""

from __future__ import annotations

import numpy as np
import pytest
from fake_triton import empty_final, piece
from tritonclient.grpc import InferInput, InferResult
from tritonclient.grpc import service_pb2 as pb

from clients import wire
from clients.errors import RequestRejected, StreamBroken

ALL_FIELDS = {
    "temperature": 0.8, "top_k": 40, "top_p": 0.9, "min_length": 2, "repetition_penalty": 1.1, "presence_penalty": 0.0,
    "frequency_penalty": 0.5, "random_seed": 2**64 - 1, "stop_words": ("\n\n", "Ende – 終"), "bad_words": ("x",),
    "end_id": 50256, "pad_id": 0, "beam_width": 1, "return_log_probs": True, "exclude_input_in_output": False,
    "min_p": 0.1, "logit_bias": {50: -2.5, 7: 4}, "num_log_probs": 3, "return_prompt_log_probs": True,
    "num_return_sequences": 2, "return_routed_experts": True,
}  # fmt: skip


def tensor_of(message: pb.ModelInferRequest, name: str) -> tuple[str, list[int], bytes]:
    index = [tensor.name for tensor in message.inputs].index(name)
    return message.inputs[index].datatype, list(message.inputs[index].shape), message.raw_input_contents[index]


def test_a_request_holds_only_the_tensors_that_were_given(request_of):
    message = wire.build_request(request_of(request_id="r1"), stream=True)
    assert [tensor.name for tensor in message.inputs] == ["text_input", "max_tokens", "stream"]
    assert (message.model_name, message.id) == ("phixtral", "r1")


def test_a_request_asks_for_the_empty_final_response(request_of):
    message = wire.build_request(request_of(), stream=True)
    assert message.parameters["triton_enable_empty_final_response"].bool_param


def test_a_request_without_an_id_bears_another_whenever_it_is_sent(request_of):
    request = request_of()
    ids = {wire.build_request(request, stream=True).id for _ in range(3)}
    assert len(ids) == 3
    assert all(ids)


def test_the_bytes_of_a_small_request_are_those_worked_out_by_hand(request_of):
    message = wire.build_request(request_of(prompt="é", max_tokens=258, temperature=-0.5), stream=False)
    assert tensor_of(message, "text_input") == ("BYTES", [1, 1], b"\x02\x00\x00\x00\xc3\xa9")
    assert tensor_of(message, "max_tokens") == ("INT32", [1, 1], b"\x02\x01\x00\x00")
    assert tensor_of(message, "stream") == ("BOOL", [1, 1], b"\x00")
    assert tensor_of(message, "temperature") == ("FP32", [1, 1], b"\x00\x00\x00\xbf")


@pytest.mark.parametrize(
    ("name", "datatype", "values"),
    [
        ("temperature", "FP32", np.array([[0.8]], np.float32)),
        ("top_k", "INT32", np.array([[40]], np.int32)),
        ("seed", "UINT64", np.array([[2**64 - 1]], np.uint64)),
        ("return_log_probs", "BOOL", np.array([[True]])),
        ("logit_bias_ids", "INT32", np.array([[50, 7]], np.int32)),
        ("logit_bias_values", "FP32", np.array([[-2.5, 4]], np.float32)),
        ("stop_words", "BYTES", np.array([[b"\n\n", "Ende – 終".encode()]], np.object_)),
    ],
)
def test_every_kind_of_tensor_is_as_tritonclients_own_input_would_send_it(request_of, name, datatype, values):
    theirs = InferInput(name, list(values.shape), datatype)
    theirs.set_data_from_numpy(values)
    message = wire.build_request(request_of(**ALL_FIELDS), stream=True)
    assert tensor_of(message, name) == (datatype, list(values.shape), theirs._get_content())


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        ({"temperature": 0.7}, {"temperature", "top_p"}),
        ({"temperature": 0.7, "top_k": 0}, {"temperature", "top_k", "top_p"}),
        ({"temperature": 0.7, "top_k": 5}, {"temperature", "top_k"}),
        ({"temperature": 0.0}, {"temperature"}),
        ({"top_k": 5}, {"top_k"}),
        ({}, set()),
    ],
)
def test_a_temperature_is_sent_with_what_makes_the_server_sample(request_of, given, sent):
    message = wire.build_request(request_of(**given), stream=True)
    assert {tensor.name for tensor in message.inputs} == {"text_input", "max_tokens", "stream", *sent}
    if "top_p" in sent:
        assert tensor_of(message, "top_p") == ("FP32", [1, 1], b"\x00\x00\x80\x3f")


@pytest.mark.parametrize("top_p", [0.0, 1.0, 0.5])
def test_a_top_p_that_is_given_beside_a_temperature_is_kept_unless_it_is_0(request_of, top_p):
    message = wire.build_request(request_of(temperature=0.7, top_p=top_p), stream=True)
    assert np.frombuffer(tensor_of(message, "top_p")[2], np.float32).tolist() == [top_p or 1.0]


def test_every_field_that_is_given_is_sent(request_of):
    message = wire.build_request(request_of(**ALL_FIELDS), stream=True)
    renamed = {"min_length": "min_tokens", "random_seed": "seed"}
    given = {renamed.get(field, field) for field in ALL_FIELDS} - {"logit_bias"}
    given |= {"logit_bias_ids", "logit_bias_values"}
    assert {tensor.name for tensor in message.inputs} == {"text_input", "max_tokens", "stream", *given}


def test_no_stop_words_send_no_tensor_since_an_empty_one_has_no_shape_that_triton_takes(request_of):
    message = wire.build_request(request_of(stop_words=()), stream=True)
    assert "stop_words" not in {tensor.name for tensor in message.inputs}


def test_the_likeliest_tokens_the_prompts_and_the_index_are_read(request_of):
    top = (((5, -0.5), (9, -1.5)), ((7, -0.25), (5, -3.0)))
    sent = piece("ab", (5, 7), top_log_probs=top, prompt_token_ids=(1, 2), prompt_log_probs=(-4.0,), sequence_index=3,
                 prompt_top_log_probs=(((8, -0.5), (2, -4.0)),))  # fmt: skip
    found = wire.read_piece(sent.infer_response, log_probs=False)
    assert (found.top_log_probs, found.sequence_index) == (top, 3)
    assert (found.prompt_token_ids, found.prompt_log_probs) == ((1, 2), (-4.0,))
    assert found.prompt_top_log_probs == (((8, -0.5), (2, -4.0)),)


@pytest.mark.parametrize("name", ["top_token_ids", "top_log_probs", "token_ids"])
def test_likeliest_tokens_that_do_not_fit_the_tokens_break_the_stream(name):
    sent = piece("ab", (5, 7), top_log_probs=(((5, -0.5),), ((7, -0.25),))).infer_response
    index = [output.name for output in sent.outputs].index(name)
    sent.outputs[index].shape[:] = [1, 0]
    sent.raw_output_contents[index] = b""
    with pytest.raises(StreamBroken, match="top_token_ids holds [02] values and top_log_probs [02], expected as many"):
        wire.read_piece(sent, log_probs=False)


ROUTING = (
    (((0, 0.75), (3, 0.25)), ((2, 0.5), (1, 0.5)), ((1, 1.0), (0, 0.0))),
    (((3, 0.625), (2, 0.375)), ((0, 0.5), (2, 0.5)), ((1, 0.75), (3, 0.25))),
)  # of two tokens, three layers, two experts each


def test_the_experts_of_each_token_are_read():
    found = wire.read_piece(piece("ab", (5, 7), routing=ROUTING, num_experts=4).infer_response, log_probs=False)
    assert (found.routing, found.num_experts) == (ROUTING, 4)


@pytest.mark.parametrize("shape", [[1, 3, 2, 2], [1, 2, 6], [12], [1, 2, 2, 3], None], ids=str)
@pytest.mark.parametrize("name", ["routed_experts", "expert_weights"])
def test_experts_that_do_not_fit_the_tokens_break_the_stream(name, shape):
    sent = piece("ab", (5, 7), routing=ROUTING, num_experts=4).infer_response
    index = [output.name for output in sent.outputs].index(name)
    if shape is None:
        del sent.outputs[index]
        del sent.raw_output_contents[index]
    else:
        sent.outputs[index].shape[:] = shape
    with pytest.raises(
        StreamBroken, match=r"shape .*, expected both routed_experts and expert_weights, \[1, 2, layers"
    ):
        wire.read_piece(sent, log_probs=False)


def test_numbers_of_numpy_are_taken_like_pythons_own(request_of):
    numbers = {"max_tokens": np.int64(8), "temperature": np.float32(0.5), "return_log_probs": np.True_}
    numpy_request = request_of(request_id="r1", **numbers)
    own_request = request_of(request_id="r1", **{name: number.item() for name, number in numbers.items()})
    assert wire.build_request(numpy_request, stream=True) == wire.build_request(own_request, stream=True)


@pytest.mark.parametrize(
    ("fields", "text"),
    [
        ({"max_tokens": 2**31}, "max_tokens is .2147483648., which INT32 cannot hold: out of range"),
        ({"random_seed": -1}, "seed is .-1., which UINT64 cannot hold: out of range"),
        ({"max_tokens": 1.5}, "max_tokens is .1.5., which INT32 cannot hold: 1.5 is of another type"),
        ({"max_tokens": True}, "INT32 cannot hold: True is of another type"),
        ({"return_log_probs": 1}, "BOOL cannot hold: 1 is of another type"),
        ({"temperature": "warm"}, "FP32 cannot hold: 'warm' is of another type"),
        ({"temperature": 1e300}, "FP32 cannot hold: overflow"),
        ({"stop_words": (5,)}, "stop_words is .5., which STRING cannot hold: 5 is not a text"),
        ({"prompt": "\udc80"}, "text_input is .*surrogates not allowed"),
    ],
)
def test_a_value_that_its_tensor_cannot_hold_is_refused_before_sending(request_of, fields, text):
    with pytest.raises(RequestRejected, match=text):
        wire.build_request(request_of(**fields), stream=True)


def test_a_piece_is_read_as_it_was_written():
    sent = piece("dé\n終", (5, 51199), num_output=2, log_probs=True)
    found = wire.read_piece(sent.infer_response, log_probs=True)
    assert (found.text, found.token_ids, found.finish_reason) == ("dé\n終", (5, 51199), None)
    assert (found.num_input_tokens, found.num_output_tokens) == (3, 2)
    assert (found.cum_log_prob, found.log_probs) == (-0.5, (-0.5, -0.5))


def test_a_piece_holds_what_tritonclients_own_result_reads():
    response = piece("終 def", (5, 6), finish_reason="stop", num_output=9, log_probs=True).infer_response
    theirs, ours = InferResult(response), wire.read_outputs(response)
    assert ours["text_output"] == [theirs.as_numpy("text_output").item().decode()]
    for name in ("cum_log_probs", "output_log_probs", "token_ids", "num_input_tokens", "num_output_tokens"):
        assert ours[name] == theirs.as_numpy(name).ravel().tolist()


def test_log_probabilities_that_were_not_asked_for_are_left_out():
    found = wire.read_piece(piece("x", (5,), log_probs=True).infer_response, log_probs=False)
    assert (found.cum_log_prob, found.log_probs) == (None, ())


def test_a_server_that_sends_text_alone_leaves_the_rest_unknown():
    response = piece("x", (5,)).infer_response
    del response.outputs[1:], response.raw_output_contents[1:]
    found = wire.read_piece(response, log_probs=True)
    assert (found.text, found.token_ids, found.finish_reason, found.num_input_tokens) == ("x", (), None, None)


def test_an_output_that_the_contract_does_not_know_is_left_alone():
    response = piece("x", (5,)).infer_response
    response.outputs.add(name="generation_logits", datatype="FP16", shape=[1, 7])
    response.raw_output_contents.append(b"odd")
    assert wire.read_piece(response, log_probs=False).text == "x"


def test_the_empty_final_response_is_no_piece():
    assert wire.read_piece(empty_final().infer_response, log_probs=False) is None


def broken(index: int, *, datatype: str | None = None, shape=None, raw: bytes | None = None) -> pb.ModelInferResponse:
    response = piece("x", (5, 6)).infer_response
    if datatype is not None:
        response.outputs[index].datatype = datatype
    if shape is not None:
        response.outputs[index].shape[:] = shape
    if raw is not None:
        response.raw_output_contents[index] = raw
    return response


@pytest.mark.parametrize(
    ("response", "text"),
    [
        (broken(4, datatype="INT64"), "token_ids is INT64, expected INT32"),
        (broken(4, shape=[1, 3]), r"token_ids holds 2 values, its shape is \[1, 3\]"),
        (broken(4, raw=b"abc"), "token_ids cannot be decoded"),
        (broken(0, raw=b"\x01\x00"), "text_output cannot be decoded"),
        (broken(0, raw=b"\x01\x00\x00\x00\xff"), "text_output cannot be decoded: 'utf-8' codec"),
    ],
)
def test_a_response_that_breaks_the_contract_is_refused_with_the_tensors_name(response, text):
    with pytest.raises(StreamBroken, match=f"a response of phixtral: {text}"):
        wire.read_piece(response, log_probs=False)


def test_a_response_without_raw_contents_is_refused():
    response = piece("x", (5,)).infer_response
    del response.raw_output_contents[:]
    with pytest.raises(StreamBroken, match="found 0 raw contents for 7 outputs"):
        wire.read_piece(response, log_probs=False)


def test_a_response_without_text_is_refused():
    response = piece("x", (5,)).infer_response
    del response.outputs[0], response.raw_output_contents[0]
    with pytest.raises(StreamBroken, match="has no text_output; it has sequence_index"):
        wire.read_piece(response, log_probs=False)


def reader() -> wire.StreamReader:
    return wire.StreamReader(wire.doing("phixtral", "here:1"), log_probs=False)


def test_a_stream_is_whole_when_its_last_response_is_marked_final():
    stream = reader()
    assert [found.text for found in stream.read(piece("a", (1,)))] == ["a"]
    assert stream.read(empty_final()) == ()
    assert stream.finish() == ()


def test_the_piece_with_the_finish_reason_is_kept_until_the_stream_has_ended():
    stream = reader()
    assert stream.read(piece("a", (1,), finish_reason="stop", final=True)) == ()
    assert [found.finish_reason for found in stream.finish()] == ["stop"]


def test_pieces_keep_their_order_even_if_one_comes_after_the_finish_reason():
    stream = reader()
    assert stream.read(piece("a", (1,), finish_reason="stop")) == ()
    assert [found.text for found in stream.read(piece("b", (2,), final=True))] == ["a", "b"]
    assert stream.finish() == ()


def test_a_stream_without_a_final_response_is_broken():
    stream = reader()
    stream.read(piece("a", (1,)))
    with pytest.raises(StreamBroken, match="phixtral at here:1: the stream ended after 1 pieces without a final one"):
        stream.finish()


@pytest.mark.parametrize(
    ("text", "status", "details"),
    [
        ("out of pages", "UNKNOWN", "out of pages"),
        ("INVALID_ARGUMENT: top_p: found 7", "INVALID_ARGUMENT", "top_p: found 7"),
        ("reading the request: top_p", "UNKNOWN", "reading the request: top_p"),
        ("in ensemble 'phixtral', INVALID_ARGUMENT: top_p: found 7", "INVALID_ARGUMENT", "top_p: found 7"),
        ("in ensemble 'phixtral', out of pages", "UNKNOWN", "out of pages"),
    ],
)
def test_an_error_text_is_raised_at_the_end_with_the_status_that_it_starts_with(text, status, details):
    stream = reader()
    assert stream.read(pb.ModelStreamInferResponse(error_message=text)) == ()
    with pytest.raises(wire.ErrorText) as found:
        stream.finish()
    assert (found.value.status, found.value.details) == (status, details)


@pytest.mark.parametrize(
    ("version", "asked"),
    [("2.68.0", True), ("2.73.0dev", True), ("3.0.0", True), ("2.67.0", False), ("2.51.0", False), ("odd", False)],
)
def test_errors_as_statuses_are_asked_only_of_a_triton_that_survives_it(version, asked):
    assert wire.server_traits(version).metadata == ((("triton_grpc_error", "true"),) if asked else ())


@pytest.mark.parametrize(
    ("version", "safely"), [("2.56.9", False), ("2.57.0", True), ("2.100", True), ("3.0", True), ("", False)]
)
def test_a_server_before_2_57_and_one_that_does_not_say_are_taken_not_to_survive_cancelled_calls(version, safely):
    assert wire.server_traits(version).cancels_safely == safely


def test_a_request_to_stop_bears_the_id_and_dummies_of_the_required_inputs():
    message = wire.build_stop("phixtral", "7")
    assert (message.model_name, message.id) == ("phixtral", "7")
    sent = dict(zip((tensor.name for tensor in message.inputs), message.raw_input_contents, strict=True))
    assert sent == {"text_input": bytes(4), "max_tokens": bytes([1, 0, 0, 0]), "stop": b"\x01"}
