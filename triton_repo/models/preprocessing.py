"""The first step of an ensemble, on Triton's Python backend: turns text and options of a request into token ids.

Packaging copies this file to preprocessing/<version>/model.py, beside the tokenizer.
triton_repo.runtime.steps.preprocessing does the work and does not depend on Triton.
"""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from export.tokenizer.loading import load_tokenizer
from triton_repo.contracts.ensemble import ANSWER_KEY, QUERY_NAMES
from triton_repo.contracts.model_parameters import TextParameters
from triton_repo.processes.heartbeat import Heartbeat
from triton_repo.runtime.responses import error_response, server_stopping
from triton_repo.runtime.steps.answer_keys import CORRELATION_PARAMETER, draw_key, key_tensor, takes_response_parameters
from triton_repo.runtime.steps.preprocessing import Preprocessor, Tensors, prepare_stop
from triton_repo.runtime.stop_requests import STOP, asks_to_stop, check_stop_id


class TritonPythonModel:
    """One instance: a tokenizer and the model's limits. It keeps no state between requests."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the tokenizer. The text of an exception becomes the reason in the repository index."""
        self._heartbeat = Heartbeat.start(args["model_name"], args["model_instance_name"])
        parameters = TextParameters.from_config(json.loads(args["model_config"]))
        folder = Path(args["model_repository"]) / args["model_version"] / parameters.tokenizer
        self._preprocessor = Preprocessor(load_tokenizer(folder), parameters)
        self._takes_parameters = takes_response_parameters(pb_utils)
        self._draining = threading.Event()
        self._heartbeat.on_drain(self._draining.set)

    def execute(self, requests: list[Any]) -> list[Any]:
        """A response to each request. An error ends only its own request."""
        return [self._response(request) for request in requests]

    def _response(self, request: Any) -> Any:  # noqa: ANN401 - the backend's types exist inside Triton only
        try:
            tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            prepared = self._prepare(tensors, request.request_id())
        except Exception as error:  # the instance goes on with the next request
            return error_response(pb_utils, error)
        key = draw_key()
        prepared[ANSWER_KEY.name] = key_tensor(key)
        outputs = [pb_utils.Tensor(name, value) for name, value in prepared.items()]
        if not self._takes_parameters:
            return pb_utils.InferenceResponse(outputs)
        return pb_utils.InferenceResponse(outputs, parameters={CORRELATION_PARAMETER: key})

    def _prepare(self, tensors: Tensors, request_id: str) -> Tensors:
        """The outputs for one request. Raises RequestError."""
        if asks_to_stop(tensors, QUERY_NAMES[STOP]):
            check_stop_id(request_id)
            return prepare_stop()
        if self._draining.is_set():
            raise server_stopping()
        return self._preprocessor.prepare(tensors)

    def finalize(self) -> None:
        """End the heartbeat."""
        self._heartbeat.stop()
