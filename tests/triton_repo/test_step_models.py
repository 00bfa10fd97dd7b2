"""The steps' model.py files over a stand-in of a newer Python backend, whose responses take parameters.

triton-inference-server/python_backend, src/pb_stub.cc: InferenceResponse(output_tensors, error, parameters), and
correlation_id() of a request, which is what a step before it gave as `sequence_id`.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
from wire_tensors import wire

import triton_repo.models
from triton_repo.errors import RequestError
from triton_repo.runtime import answer_keys
from triton_repo.runtime.parameters import TextParameters
from triton_repo.token_contract import QUERY_NAMES, TOKEN_NAMES

LAST = 1


class Tensor:
    def __init__(self, name, array):
        self._name, self._array = name, array

    def name(self):
        return self._name

    def as_numpy(self):
        return self._array


class Response:
    def __init__(self, output_tensors=(), error=None, parameters=None):
        self.tensors = {tensor.name(): tensor.as_numpy() for tensor in output_tensors}
        self.error, self.parameters = error, parameters

    def has_error(self):
        return self.error is not None


class OldResponse(Response):
    """As Triton 2.51's, which knows no parameters."""

    def __init__(self, output_tensors=(), error=None):
        super().__init__(output_tensors, error)


class Error:
    INVALID_ARG, INTERNAL = "INVALID_ARG", "INTERNAL"

    def __init__(self, message, code=None):
        self.message, self.code = message, code


class Request:
    """One step's request; what is sent to it is kept."""

    def __init__(self, tensors, request_id="r", correlation_id=0, cancelled=False):
        self._inputs = [Tensor(name, array) for name, array in tensors.items()]
        self._request_id, self._correlation_id, self._cancelled = request_id, correlation_id, cancelled
        self.sent = []

    def inputs(self):
        return self._inputs

    def request_id(self):
        return self._request_id

    def correlation_id(self):
        return self._correlation_id

    def is_cancelled(self):
        return self._cancelled

    def get_response_sender(self):
        return SimpleNamespace(send=lambda response=None, flags=0: self.sent.append((response, flags)))


@pytest.fixture(params=[Response, OldResponse], ids=["newer", "older"])
def backend(request, monkeypatch):
    """The stand-in as `triton_python_backend_utils`; `stopped` are the requests that the engine was told to stop,
    `warnings` what was logged."""
    module = ModuleType("triton_python_backend_utils")
    module.Tensor, module.InferenceResponse, module.TritonError = Tensor, request.param, Error
    module.TRITONSERVER_RESPONSE_COMPLETE_FINAL = LAST
    module.stopped, module.warnings = [], []
    module.Logger = SimpleNamespace(log_info=lambda text: None, log_warn=module.warnings.append)

    def infer(model_name, request_id, inputs, requested_output_names):
        tensors = {tensor.name(): tensor.as_numpy() for tensor in inputs}
        assert model_name == "tensorrt_llm"
        assert tensors["stop"].tolist() == [[True]]
        assert {"input_ids", "input_lengths", "request_output_len"} <= set(tensors)
        return SimpleNamespace(exec=lambda decoupled: module.stopped.append(request_id) or [Response()])

    module.InferenceRequest = infer
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.fixture
def models(backend, tmp_path, byte_level):
    """preprocessing and postprocessing, initialised beside a tokenizer as Triton does."""
    folder = tmp_path / "1" / "tokenizer"
    folder.mkdir(parents=True)
    byte_level.backend.save(str(folder / "tokenizer.json"))
    parameters = TextParameters(max_sequence=64, max_prompt=63, end_ids=(0,), num_ids=byte_level.size)
    config = {"name": "m", "parameters": {key: {"string_value": text} for key, text in parameters.to_texts().items()}}
    made = []
    for name in ("preprocessing", "postprocessing"):
        path = Path(triton_repo.models.__file__).parent / f"{name}.py"
        spec = importlib.util.spec_from_file_location(f"served_{name}", path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        model = module.TritonPythonModel()
        model.initialize(
            {
                "model_config": json.dumps(config),
                "model_repository": str(tmp_path),
                "model_version": "1",
                "model_name": name,
                "model_instance_name": f"{name}_0_0",
            }
        )
        made.append(model)
    return made


def query(**values):
    return {
        QUERY_NAMES[name]: tensor for name, tensor in wire(**{"text_input": "def ", "max_tokens": 8, **values}).items()
    }


def tokens(*ids):
    return {
        TOKEN_NAMES["output_ids"]: np.array([[ids]], np.int32),
        TOKEN_NAMES["sequence_length"]: np.array([[len(ids)]], np.int32),
    }


def begin(models, request_id="r", **values):
    """Takes a request to where the engine begins; returns the keyword arguments of its later steps' requests."""
    preprocessing, postprocessing = models
    [prepared] = preprocessing.execute([Request(query(**values), request_id)])
    key = {"request_id": request_id, "correlation_id": (prepared.parameters or {}).get("sequence_id", 0)}
    registered = Request(prepared.tensors, **key)
    postprocessing.execute([registered])
    [(response, flags)] = registered.sent
    assert flags == LAST
    # All but ANSWER passes through, on its way to the engine.
    assert set(response.tensors) == set(prepared.tensors) - {"ANSWER"}
    return key


@pytest.mark.parametrize("backend", [Response], indirect=True, ids=["newer"])
def test_requests_of_the_same_id_or_of_none_are_told_apart_where_responses_take_parameters(backend, models, byte_level):
    keys = [begin(models, request_id, stream=True) for request_id in ("same", "same", "")]
    assert len({key["correlation_id"] for key in keys}) == 3
    for key, text in zip(keys, "abc", strict=True):
        step = Request(tokens(*byte_level.encode(text)), **key)
        models[1].execute([step])
        [(response, _)] = step.sent
        assert response.tensors["OUTPUT"].tolist() == [text.encode()]


@pytest.mark.parametrize("backend", [OldResponse], indirect=True, ids=["older"])
def test_an_older_backend_refuses_a_request_without_an_id_and_a_second_one_of_an_id(backend, models):
    preprocessing, postprocessing = models
    [refused] = preprocessing.execute([Request(query(), "")])
    assert refused.error.code == "INVALID_ARG"
    assert "found no request id" in refused.error.message
    begin(models)
    [prepared] = preprocessing.execute([Request(query())])
    second = Request(prepared.tensors)
    postprocessing.execute([second])
    assert "which a request under way bears" in second.sent[0][0].error.message


def test_a_response_without_a_piece_is_nothing_but_its_end(backend, models, byte_level):
    key = begin(models, stream=True)
    half = Request(tokens(byte_level.encode("語")[0]), **key)
    models[1].execute([half])
    assert half.sent == [(None, LAST)]


def test_a_stop_word_sends_the_last_piece_and_then_stops_the_engine(backend, models, byte_level):
    key = begin(models, stream=True, stop_words=["lo w"])
    sent = []
    for token in byte_level.encode("hello world"):
        step = Request(tokens(token), **key)
        models[1].execute([step])
        sent += step.sent
    reasons = [response.tensors["FINISH_REASON"].tolist() for response, _ in sent if response]
    assert reasons[-1] == [[b"stop"]]
    assert backend.stopped == ["r"]


def test_tokens_that_cannot_be_written_are_refused_and_stop_the_engine(backend, models):
    key = begin(models, stream=True, return_log_probs=True)
    step = Request(tokens(5), **key)
    models[1].execute([step])
    [(response, flags)] = step.sent
    assert (response.error.code, flags) == ("INTERNAL", LAST)
    assert backend.stopped == ["r"]


def test_an_engine_that_cannot_be_told_to_stop_changes_no_answer(backend, models, byte_level):
    def no_engine(decoupled):
        raise RuntimeError("tensorrt_llm is not ready")

    backend.InferenceRequest = lambda **_: SimpleNamespace(exec=no_engine)
    key = begin(models, stream=True, stop_words=["lo w"])
    steps = [Request(tokens(token), **key) for token in byte_level.encode("hello world")]
    broken = begin(models, "other", stream=True, return_log_probs=True)
    steps.append(Request(tokens(5), **broken))
    models[1].execute(steps)
    *answered, (last, _) = [sent for step in steps for sent in step.sent]
    assert [response.tensors["FINISH_REASON"].tolist() for response, _ in answered if response][-1] == [[b"stop"]]
    assert "the engine gave 0 log-probabilities for 1 tokens" in last.error.message
    assert backend.warnings == [
        f"the engine did not stop the request {request_id}: tensorrt_llm is not ready" for request_id in ("r", "other")
    ]


def test_a_refused_request_does_not_keep_others_from_their_answers(models):
    responses = models[0].execute([Request(query(max_tokens=0)), Request(query())])
    assert [response.has_error() for response in responses] == [True, False]
    assert responses[0].error.message.startswith("INVALID_ARGUMENT: reading the request:")


def test_keys_are_drawn_anew_and_an_id_is_asked_for():
    assert answer_keys.draw_key() != answer_keys.draw_key()
    with pytest.raises(RequestError, match="send an id with the request, such as a UUID"):
        answer_keys.require_request_id("")
    answer_keys.require_request_id("7")
