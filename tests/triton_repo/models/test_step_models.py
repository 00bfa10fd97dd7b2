"""The models' model.py files over stand-ins of an older and a newer Python backend, whose responses take parameters.

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
from triton_repo.contracts.ensemble import QUERY_NAMES, TOKEN_NAMES
from triton_repo.contracts.model_parameters import TextParameters
from triton_repo.errors import RepositoryError
from triton_repo.runtime.steps import answer_keys
from triton_repo.runtime.steps.answer_keys import key_tensor

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
    INVALID_ARG, INTERNAL, UNAVAILABLE = "INVALID_ARG", "INTERNAL", "UNAVAILABLE"

    def __init__(self, message, code=None):
        self.message, self.code = message, code


class Request:
    """One step's request; what is sent to it is kept."""

    def __init__(self, tensors, request_id="r", correlation_id=0, cancelled=False):
        self._inputs = [Tensor(name, array) for name, array in tensors.items()]
        self._request_id, self._correlation_id, self._cancelled = request_id, correlation_id, cancelled
        self.sent = []
        self.asked_after_end = False

    def inputs(self):
        return self._inputs

    def request_id(self):
        return self._request_id

    def correlation_id(self):
        return self._correlation_id

    def is_cancelled(self):
        self.asked_after_end |= any(flags for _, flags in self.sent)
        return self._cancelled

    def get_response_sender(self):
        return SimpleNamespace(send=lambda response=None, flags=0: self.sent.append((response, flags)))


# TensorRT-LLM's backend gives no key back and runs in a newer Triton; our engine's step does, in any.
@pytest.fixture(params=[Response, OldResponse], ids=["by correlation", "by key"])
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
    parameters = TextParameters(
        max_sequence=64, max_prompt=63, end_ids=(0,), num_ids=byte_level.size,
        echoes_keys=backend.InferenceResponse is OldResponse,
    )  # fmt: skip
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


class Begun:
    """A request that was taken to where the engine begins."""

    def __init__(self, models, request_id="r", **values) -> None:
        preprocessing, postprocessing = models
        [prepared] = preprocessing.execute([Request(query(**values), request_id)])
        self.key = prepared.tensors["ANSWER_KEY"].item().decode()
        self._request_id, self._parameters = request_id, prepared.parameters
        registered = self._request(prepared.tensors)
        postprocessing.execute([registered])
        [(response, flags)] = registered.sent
        assert flags == LAST
        # All but ANSWER passes through, on its way to the engine.
        assert set(response.tensors) == set(prepared.tensors) - {"ANSWER"}
        self.to_engine = response.tensors

    @property
    def name(self) -> str:
        """What the engine knows this request by."""
        return self._request_id if self._parameters else self.key

    def step(self, *ids, **fields) -> Request:
        """postprocessing's request for an engine's response of these tokens."""
        return self._request(tokens(*ids), **fields)

    def probe(self, **fields) -> Request:
        """The same for an engine that has nothing to say."""
        return self._request({"PROBE": np.array([[True]])}, **fields)

    def _request(self, tensors, **fields) -> Request:
        correlation_id = (self._parameters or {}).get("sequence_id", 0)
        given = tensors if self._parameters or "ANSWER" in tensors else {**tensors, "ANSWER_KEY": key_tensor(self.key)}
        return Request(given, request_id=self._request_id, correlation_id=correlation_id, **fields)


def test_requests_of_the_same_id_or_of_none_are_told_apart(models, byte_level):
    begun = [Begun(models, request_id, stream=True) for request_id in ("same", "same", "")]
    assert len({request.key for request in begun}) == 3
    for request, text in zip(begun, "abc", strict=True):
        step = request.step(*byte_level.encode(text))
        models[1].execute([step])
        [(response, _)] = step.sent
        assert response.tensors["OUTPUT"].tolist() == [text.encode()]


@pytest.mark.parametrize("backend", [OldResponse], indirect=True, ids=["older"])
def test_an_engine_that_gives_no_keys_back_takes_a_backend_with_response_parameters(backend):
    with pytest.raises(RepositoryError, match="loading m: this Triton's Python backend has no response parameters"):
        answer_keys.require_response_parameters(backend, "m")


def test_a_response_without_a_piece_is_nothing_but_its_end(models, byte_level):
    half = Begun(models, stream=True).step(byte_level.encode("語")[0])
    models[1].execute([half])
    assert half.sent == [(None, LAST)]


def test_a_stop_word_sends_the_last_piece_and_then_stops_the_engine(backend, models, byte_level):
    begun = Begun(models, stream=True, stop_words=["lo w"])
    sent = []
    for token in byte_level.encode("hello world"):
        step = begun.step(token)
        models[1].execute([step])
        sent += step.sent
    reasons = [response.tensors["FINISH_REASON"].tolist() for response, _ in sent if response]
    assert reasons[-1] == [[b"stop"]]
    assert backend.stopped == [begun.name]


def test_tokens_that_cannot_be_written_are_refused_and_stop_the_engine(backend, models):
    begun = Begun(models, stream=True, return_log_probs=True)
    step = begun.step(5)
    models[1].execute([step])
    [(response, flags)] = step.sent
    assert (response.error.code, flags) == ("INTERNAL", LAST)
    assert backend.stopped == [begun.name]


def test_an_engine_that_cannot_be_told_to_stop_changes_no_answer(backend, models, byte_level):
    def no_engine(decoupled):
        raise RuntimeError("tensorrt_llm is not ready")

    backend.InferenceRequest = lambda **_: SimpleNamespace(exec=no_engine)
    begun = Begun(models, stream=True, stop_words=["lo w"])
    steps = [begun.step(token) for token in byte_level.encode("hello world")]
    broken = Begun(models, "other", stream=True, return_log_probs=True)
    steps.append(broken.step(5))
    models[1].execute(steps)
    *answered, (last, _) = [sent for step in steps for sent in step.sent]
    assert [response.tensors["FINISH_REASON"].tolist() for response, _ in answered if response][-1] == [[b"stop"]]
    assert "the engine gave 0 log-probabilities for 1 tokens" in last.error.message
    assert backend.warnings == [
        f"the engine did not stop the request {name}: tensorrt_llm is not ready" for name in (begun.name, broken.name)
    ]


@pytest.mark.parametrize("gone", [True, False])
def test_a_probe_is_answered_by_nothing_and_stops_the_engine_of_a_client_that_has_gone(backend, models, gone):
    begun = Begun(models)
    probe = begun.probe(cancelled=gone)
    models[1].execute([probe])
    assert probe.sent == [(None, LAST)]
    assert backend.stopped == [begun.name] * gone
    # Triton 2.51 crashes where that is asked of a request whose last response was sent.
    assert not probe.asked_after_end


def test_a_request_to_stop_goes_to_the_engine_and_its_own_answer_is_a_piece_of_nothing(backend, models):
    begun = Begun(models, "mine", stream=True)
    stop = Begun(models, "mine", stop=True, text_input="", max_tokens=0)
    assert stop.to_engine["STOP_REQUESTS"].tolist() == [[True]]
    # What the engine sends to both, which TensorRT-LLM's backend does to the first alone.
    ended = begun.step()
    models[1].execute([ended])
    assert ended.sent[0][0].tensors["FINISH_REASON"].tolist() == [[b"cancelled"]]
    if backend.InferenceResponse is OldResponse:
        answer = stop.step()
        models[1].execute([answer])
        [(response, _)] = answer.sent
        assert response.tensors["FINISH_REASON"].tolist() == [[b"cancelled"]]
        assert response.tensors["NUM_INPUT_TOKENS"].tolist() == [[0]]
    assert len(models[1]._postprocessor) == 0


def test_a_request_to_stop_without_an_id_is_refused(models):
    [refused] = models[0].execute([Request(query(stop=True), "")])
    assert refused.error.code == "INVALID_ARG"
    assert "send the id of the request to end" in refused.error.message


def test_the_answers_under_way_are_reported_where_the_engine_has_no_heartbeat(backend, models, byte_level):
    reported = []
    models[1]._heartbeat = SimpleNamespace(report=lambda **numbers: reported.append(numbers["running"]))
    begun = [Begun(models, request_id) for request_id in ("a", "b")]
    for request in begun:
        models[1].execute([request.step(*byte_level.encode("x"))])
    assert reported == ([] if backend.InferenceResponse is OldResponse else [1, 2, 1, 0])


def test_while_the_server_stops_new_requests_are_refused_and_requests_to_stop_pass(models):
    preprocessing, _ = models
    preprocessing._draining.set()
    [refused, stop] = preprocessing.execute([Request(query()), Request(query(stop=True))])
    assert refused.error.code == "UNAVAILABLE"
    assert refused.error.message == (
        "UNAVAILABLE: answering the request: the server is stopping; send the request to another server or again later"
    )
    assert stop.tensors["STOP_REQUESTS"].tolist() == [[True]]


def test_a_refused_request_does_not_keep_others_from_their_answers(models):
    responses = models[0].execute([Request(query(max_tokens=0)), Request(query())])
    assert [response.has_error() for response in responses] == [True, False]
    assert responses[0].error.message.startswith("INVALID_ARGUMENT: reading the request:")


def test_keys_are_drawn_anew():
    assert answer_keys.draw_key() != answer_keys.draw_key()
