"""The first step of an ensemble, as Triton's Python backend runs it: a request's text and options to token ids.

Lies in a model repository as preprocessing/<version>/model.py beside the tokenizer. What can be understood without
Triton lives in triton_repo.runtime.preprocessing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from export.tokenizer import load_tokenizer
from triton_repo.heartbeat import Heartbeat
from triton_repo.runtime.answer_keys import (
    CORRELATION_PARAMETER,
    draw_key,
    require_request_id,
    takes_response_parameters,
)
from triton_repo.runtime.parameters import TextParameters
from triton_repo.runtime.preprocessing import Preprocessor
from triton_repo.runtime.responses import error_response


class TritonPythonModel:
    """One instance: a tokenizer and the model's limits. It remembers nothing of a request."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the tokenizer; what goes wrong becomes the reason in the repository index."""
        self._heartbeat = Heartbeat.start(args["model_name"], args["model_instance_name"])
        parameters = TextParameters.from_config(json.loads(args["model_config"]))
        folder = Path(args["model_repository"]) / args["model_version"] / parameters.tokenizer
        self._preprocessor = Preprocessor(load_tokenizer(folder), parameters)
        self._draws_keys = takes_response_parameters(pb_utils)

    def execute(self, requests: list[Any]) -> list[Any]:
        """A response to each request; a request's error is that request's alone."""
        return [self._response(request) for request in requests]

    def _response(self, request: Any) -> Any:  # noqa: ANN401 - the backend's types exist inside Triton only
        try:
            if not self._draws_keys:
                require_request_id(request.request_id())
            tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            outputs = [pb_utils.Tensor(name, value) for name, value in self._preprocessor.prepare(tensors).items()]
        except Exception as error:  # whatever one request does, the instance goes on with the next
            return error_response(pb_utils, error)
        if not self._draws_keys:
            return pb_utils.InferenceResponse(outputs)
        return pb_utils.InferenceResponse(outputs, parameters={CORRELATION_PARAMETER: draw_key()})
