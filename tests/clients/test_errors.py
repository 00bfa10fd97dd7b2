"""Every gRPC status becomes one of our errors, and each message says what was done, what was found and what to do."""

from __future__ import annotations

import inspect

import grpc
import pytest

from clients import errors
from clients.errors import ClientError, error_of
from export.errors import MoeshipError
from triton_repo.contracts.model_state import ModelState
from triton_repo.runtime.responses import failure, server_stopping

DOING = "generating with phixtrl at 127.0.0.1:8001"
READY = ModelState(name="phixtral", version="1", state="READY")
FAILED = ModelState(name="phixtral", version="1", state="UNAVAILABLE", reason="engine.json is missing")


@pytest.mark.parametrize("status", [status for status in grpc.StatusCode if status is not grpc.StatusCode.OK])
def test_every_grpc_status_but_ok_becomes_one_of_our_errors(status):
    error = error_of(doing=DOING, status=status.name, details="the server's words")
    assert type(error) in errors.BY_STATUS.values()
    assert error.status == status.name
    assert str(error).startswith(f"{DOING}: {status.name}: the server's words")


def test_no_status_is_mapped_that_grpc_does_not_have():
    assert set(errors.BY_STATUS) == {status.name for status in grpc.StatusCode} - {"OK"}


def test_every_error_of_the_tree_is_drawn_at_the_top_and_stands_under_the_root():
    kinds = [kind for _, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, ClientError)]
    assert issubclass(ClientError, MoeshipError)
    assert all(kind.__name__ in errors.__doc__ for kind in kinds)


@pytest.mark.parametrize(
    ("kind", "exit_status"), [(errors.RequestRejected, 2), (errors.ModelNotFound, 2), (errors.ServerFailed, 1)]
)
def test_the_exit_status_tells_wrong_words_from_a_request_that_failed(kind, exit_status):
    assert kind("x").exit_status == exit_status


def test_an_unknown_model_is_met_with_near_matches_and_all_there_are():
    states = (ModelState(name="other", version="1", state="READY"), READY)
    error = error_of(doing=DOING, status="NOT_FOUND", details="unknown", model="phixtrl", models=states)
    assert isinstance(error, errors.ModelNotFound)
    assert "did you mean phixtral? The server has: other, phixtral" in str(error)


def test_an_unknown_model_of_an_empty_server_is_told_so():
    error = error_of(doing=DOING, status="NOT_FOUND", details="unknown", model="phixtrl", models=())
    assert "the server has no models" in str(error)


def test_unavailable_means_no_connection_when_the_server_does_not_list_its_models():
    error = error_of(doing=DOING, status="UNAVAILABLE", details="connection refused", model="phixtral", models=None)
    assert isinstance(error, errors.ConnectionFailed)
    assert "gRPC port (8001 by default)" in str(error)


def test_unavailable_means_not_loaded_when_the_server_lists_the_model_as_failed():
    error = error_of(doing=DOING, status="UNAVAILABLE", details="not ready", model="phixtral", models=(FAILED,))
    assert isinstance(error, errors.ModelNotReady)
    assert "phixtral version 1 UNAVAILABLE (engine.json is missing)" in str(error)


def test_unavailable_means_overload_when_the_server_lists_the_model_as_ready():
    error = error_of(doing=DOING, status="UNAVAILABLE", details="queue full", model="phixtral", models=(READY,))
    assert isinstance(error, errors.ServerOverloaded)


@pytest.mark.parametrize("order", [1, -1])
def test_one_ready_version_of_two_makes_unavailable_an_overload(order):
    newer = ModelState(name="phixtral", version="2", state="READY")
    states = (FAILED, newer)[::order]
    error = error_of(doing=DOING, status="UNAVAILABLE", details="queue full", model="phixtral", models=states)
    assert isinstance(error, errors.ServerOverloaded)


def test_a_status_whose_meaning_is_plain_does_not_depend_on_the_models():
    error = error_of(doing=DOING, status="INVALID_ARGUMENT", details="top_p 7", model="phixtrl", models=(READY,))
    assert isinstance(error, errors.RequestRejected)


def test_an_ensemble_passes_on_the_words_of_the_step_that_failed():
    plain = error_of(doing=DOING, status="INVALID_ARGUMENT", details="INVALID_ARGUMENT: top_p: found 7")
    passed_on = error_of(
        doing=DOING, status="INVALID_ARGUMENT", details="in ensemble 'phixtral', INVALID_ARGUMENT: top_p: found 7"
    )
    assert (type(passed_on), str(passed_on)) == (type(plain), str(plain))


@pytest.mark.parametrize("status", ["UNKNOWN", "UNAVAILABLE", "INTERNAL"])
@pytest.mark.parametrize(
    "text",
    [
        # triton-inference-server/core, src/scheduler_utils.cc
        "in ensemble 'phixtral', [request id: 7] Exceeds maximum queue size",
        # NVIDIA/TensorRT-LLM, cpp/tensorrt_llm/executor/executorImpl.cpp
        "in ensemble 'phixtral', Maximum queue size of 4 has been reached, please try again later",
    ],
)
def test_a_full_queue_is_an_overload_whatever_its_status(status, text):
    error = error_of(doing=DOING, status=status, details=text, model="phixtral", models=(READY,))
    assert isinstance(error, errors.ServerOverloaded)


@pytest.mark.parametrize("models", [None, (READY,), ()])
@pytest.mark.parametrize("prefix", ["", "in ensemble 'phixtral', "])
def test_a_server_that_is_about_to_end_is_told_from_one_that_is_not_there(models, prefix):
    _, details = failure(server_stopping())
    error = error_of(doing=DOING, status="UNAVAILABLE", details=f"{prefix}{details}", model="phixtral", models=models)
    assert isinstance(error, errors.ServerOverloaded)
    assert "UNAVAILABLE: answering the request: the server is stopping; send the request to another" in str(error)
