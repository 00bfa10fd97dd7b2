"""`moeship serve --openai-port`: the gateway beside a real Triton whose processes are killed under running streams."""

from __future__ import annotations

import json
import signal
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import openai
import psutil
import pytest
from gateway_in_thread import CHATML
from live_requests import slow_down
from serve_command import PATIENCE_S, start_command, wait_until

from triton_repo.contracts.model_parameters import ModelParameters
from triton_repo.packaging.package import PackageOptions, package_engine
from triton_repo.serving.ports import Ports, choose_ports, resolve_host

STREAMS = 20


@pytest.fixture(scope="module")
def served(tmp_path_factory, tiny_engine):
    """A command that serves 24 sequences at a time, and what it said. The last test here ends it."""
    tmp_path = tmp_path_factory.mktemp("served")
    package_engine(
        PackageOptions(
            engine=tiny_engine, name="tiny", output=tmp_path / "repository",
            onnxruntime=ModelParameters(threads=1, slots=24),
        )
    )  # fmt: skip
    slow_down(tmp_path / "repository/tiny")  # drafts let the small model end 600 tokens before it is killed
    (tmp_path / "template.jinja").write_text(CHATML)
    port = choose_ports(resolve_host("127.0.0.1"), Ports()).metrics
    command, ready = start_command(
        tmp_path / "repository", "--openai-port", str(port), "--chat-template", str(tmp_path / "template.jinja")
    )
    with command:
        yield command, ready
        if command.poll() is None:
            command.terminate()


def test_streams_end_with_an_error_where_triton_is_killed_and_requests_are_answered_again(served):
    _, ready = served
    begun, refusals = [], []

    def stream(number: int) -> str:
        """How a stream ended."""
        with openai.OpenAI(base_url=ready["openai"], api_key="none", max_retries=0) as client:
            try:
                for _ in client.completions.create(
                    model="tiny", prompt=f"{number}", max_tokens=600, stream=True, extra_body={"ignore_eos": True}
                ):
                    begun.append(number)
            except openai.APIError as error:
                return str(error)
            return "whole"

    with ThreadPoolExecutor(STREAMS) as pool:
        ends = [pool.submit(stream, number) for number in range(STREAMS)]
        assert wait_until(lambda: len(set(begun)) == STREAMS)
        psutil.Process(ready["pid"]).kill()
        found = [end.result(timeout=60) for end in ends]
    assert set(found) <= {
        "the model's server ended before the answer did; send the request again",
        "the model's server cannot be reached at present; send the request again",
    }

    def answered() -> bool:
        with openai.OpenAI(base_url=ready["openai"], api_key="none", max_retries=0) as client:
            try:
                messages = [{"role": "user", "content": "a"}]
                return bool(client.chat.completions.create(model="tiny", messages=messages, max_tokens=4))
            except openai.InternalServerError as error:
                refusals.append((error.status_code, "retry-after" in error.response.headers))
                return False

    assert wait_until(answered)
    assert set(refusals) == {(503, True)}


def test_a_gateway_that_ends_is_started_again_and_ends_with_the_server(served):
    command, ready = served
    (gateway,) = [child for child in psutil.Process(command.pid).children() if "gateway" in child.cmdline()]
    gateway.kill()
    gateway.wait(PATIENCE_S)
    health = ready["openai"].removesuffix("/v1") + "/health"

    def answers() -> bool:
        try:
            with urllib.request.urlopen(health, timeout=2) as response:
                return json.loads(response.read())["status"] == "ok"
        except OSError:
            return False

    assert wait_until(answers)
    command.send_signal(signal.SIGTERM)
    assert command.wait(PATIENCE_S) == 0
    said = command.stderr.read()
    assert "the gateway ended with status -9; it is started again" in said
    assert said.splitlines()[-2:] == ["the gateway has stopped", "stopped"]
    assert not answers()
