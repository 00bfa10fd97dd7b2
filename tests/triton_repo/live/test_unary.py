"""A model packaged with --unary on a live Triton, asked by tritonclient's own plain infer over HTTP and gRPC."""

from __future__ import annotations

import json
import threading
import urllib.request

import numpy as np
import pytest
import tritonclient.grpc
import tritonclient.http
from live_requests import slow_down
from serve_command import wait_until
from tritonclient.utils import InferenceServerException, np_to_triton_dtype

from clients.errors import RequestRejected
from clients.generation import Client, GenerationRequest
from export.tokenizer.loading import load_tokenizer
from triton_repo.contracts.model_parameters import ModelParameters
from triton_repo.contracts.piece import join
from triton_repo.packaging.package import PackageOptions, package_engine
from triton_repo.runtime.options import GenerationOptions
from triton_repo.runtime.single.generation import generate
from triton_repo.serving.server import ServerOptions, running_server
from trt_build.ort.engine import open_engine
from trt_build.ort.session import Session

MODEL, SLOW = "unary", "slow"


@pytest.fixture(scope="module")
def server(tmp_path_factory, tiny_engine):
    folder = tmp_path_factory.mktemp("unary") / "repository"
    for name in (MODEL, SLOW):
        package_engine(
            PackageOptions(
                engine=tiny_engine, name=name, output=folder, onnxruntime=ModelParameters(threads=1), unary=True
            )
        )
    slow_down(folder / SLOW)
    with running_server(ServerOptions(repository=folder)) as server:
        yield server


@pytest.fixture(scope="module")
def expected(tiny_engine):
    session, tokenizer = Session(open_engine(tiny_engine), threads=1), load_tokenizer(tiny_engine)
    return lambda **fields: join(generate(session, tokenizer, GenerationOptions(**fields)))


@pytest.fixture(params=[tritonclient.http, tritonclient.grpc], ids=["http", "grpc"])
def infer(request, server):
    """Plain infer by one of tritonclient's clients: tensors by name in, the result out."""
    library = request.param
    url = server.grpc_url if library is tritonclient.grpc else server.http_url.removeprefix("http://")
    client = library.InferenceServerClient(url)

    def ask(**values):
        dtypes = {str: np.object_, bool: np.bool_, int: np.int32, float: np.float32}
        inputs = []
        for name, value in values.items():
            array = np.array([[value]], dtype=dtypes[type(value)])
            inputs.append(library.InferInput(name, list(array.shape), np_to_triton_dtype(array.dtype)))
            inputs[-1].set_data_from_numpy(array)
        return client.infer(MODEL, inputs)

    yield ask
    client.close()


def test_plain_infer_has_the_whole_answer(infer, expected):
    result = infer(text_input="def ", max_tokens=12, return_log_probs=True)
    answer = expected(prompt="def ", max_tokens=12, return_log_probs=True)
    assert result.as_numpy("text_output")[0].decode() == answer.text
    assert result.as_numpy("token_ids").tolist() == [list(answer.token_ids)]
    assert result.as_numpy("output_log_probs")[0] == pytest.approx(answer.log_probs, abs=1e-5)
    assert result.as_numpy("finish_reason").tolist() == [[answer.finish_reason.encode()]]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"max_tokens": 0}, "max_tokens: found 0, expected 1 or more"),
        ({"max_tokens": 4, "stream": True}, "stream: found true, expected false: this model was packaged with --unary"),
    ],
)
def test_a_request_that_cannot_be_answered_is_refused_with_its_status(infer, asked, message):
    with pytest.raises(InferenceServerException) as caught:
        infer(text_input="def ", **asked)
    assert caught.value.status() in ("400", "StatusCode.INVALID_ARGUMENT")
    assert message in caught.value.message()
    assert infer(text_input="def ", max_tokens=2).as_numpy("num_output_tokens").tolist() == [[2]]


def test_http_generate_and_our_whole_answers_work_too_and_our_streams_are_refused(server, expected):
    text = expected(prompt="def ", max_tokens=6).text
    body = json.dumps({"text_input": "def ", "max_tokens": 6}).encode()
    url = f"{server.http_url}/v2/models/{MODEL}/generate"
    with urllib.request.urlopen(urllib.request.Request(url, data=body), timeout=30) as response:
        assert json.load(response)["text_output"] == text
    request = GenerationRequest(model=MODEL, prompt="def ", max_tokens=6)
    with Client(server.grpc_url) as client:
        assert client.generate(request).text == text
        with pytest.raises(RequestRejected, match="packaged with --unary"):
            list(client.stream(request))


def test_the_server_is_asked_and_a_request_is_stopped_while_another_is_computed(server, infer):
    """`execute` returns before the answer is there, though it is one response."""
    found = []
    with tritonclient.grpc.InferenceServerClient(server.grpc_url) as client:
        inputs = []
        for name, value in (
            ("text_input", np.array([["x"]], object)),
            ("max_tokens", np.array([[600]], np.int32)),
            ("end_id", np.array([[-1]], np.int32)),
        ):
            inputs.append(tritonclient.grpc.InferInput(name, [1, 1], np_to_triton_dtype(value.dtype)))
            inputs[-1].set_data_from_numpy(value)
        done = threading.Event()

        def take(result, error):
            found.append(error or result.as_numpy("finish_reason").tolist())
            done.set()

        client.async_infer(SLOW, inputs, take, request_id="long")
        stop = [*inputs, tritonclient.grpc.InferInput("stop", [1, 1], "BOOL")]
        stop[-1].set_data_from_numpy(np.array([[True]]))
        assert client.is_model_ready(SLOW)

        def stopped() -> bool:
            # Asked again until it is over, since the first may overtake the request that it is to stop.
            answer = client.infer(SLOW, stop, request_id="long").as_numpy("finish_reason").tolist()
            return answer == [[b"cancelled"]] and done.wait(0.2)

        assert wait_until(stopped)
    assert found == [[[b"cancelled"]]]
