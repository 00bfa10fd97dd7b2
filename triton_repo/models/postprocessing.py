"""The second and the last step of an ensemble, on Triton's Python backend: turns token ids into pieces of answers.

Packaging copies this file to postprocessing/<version>/model.py, beside the tokenizer. As the second step it takes the
plan of an answer from preprocessing; as the last step it takes each response of the engine. One instance holds all
answers in progress. triton_repo.runtime.steps.postprocessing does the work and does not depend on Triton.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import triton_python_backend_utils as pb_utils

from export.tokenizer.loading import load_tokenizer
from triton_repo.contracts.ensemble import (
    ADDED_ENGINE_NAMES,
    ANSWER,
    ANSWER_KEY,
    ANSWER_OUTPUTS,
    ENGINE_NAMES,
    PROBE,
    STOP_REQUESTS,
    TEXT_NAMES,
    TOKEN_ENGINE,
)
from triton_repo.contracts.model_parameters import TextParameters
from triton_repo.processes.heartbeat import Heartbeat
from triton_repo.runtime.responses import error_response, wire_outputs
from triton_repo.runtime.steps.answer_keys import read_key, require_response_parameters
from triton_repo.runtime.steps.postprocessing import Postprocessor, read_tokens
from triton_repo.runtime.stop_requests import asks_to_stop

LAST = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    """The only instance: a tokenizer and the answers in progress."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the tokenizer. The text of an exception becomes the reason in the repository index."""
        self._heartbeat = Heartbeat.start(args["model_name"], args["model_instance_name"])
        parameters = TextParameters.from_config(json.loads(args["model_config"]))
        self._echoes_keys = parameters.echoes_keys
        if not self._echoes_keys:
            require_response_parameters(pb_utils, args["model_name"])
        folder = Path(args["model_repository"]) / args["model_version"] / parameters.tokenizer
        self._postprocessor = Postprocessor(load_tokenizer(folder), knows_keys=self._echoes_keys)

    def execute(self, requests: list[Any]) -> None:
        """Take the requests in order, which is the order of the engine's tokens. An error ends only its own request."""
        for request in requests:
            sender = request.get_response_sender()
            tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            step = self._register if ANSWER.name in tensors else self._extend
            try:
                step(request, tensors, sender)
            except Exception as error:  # the instance goes on with the next request
                sender.send(error_response(pb_utils, error), flags=LAST)
        if not self._echoes_keys:  # TensorRT-LLM's backend has no heartbeat of its own
            self._heartbeat.report(running=len(self._postprocessor), waiting=0)

    def _register(self, request: Any, tensors: dict[str, Any], sender: Any) -> None:  # noqa: ANN401 - Triton's types
        """Register an answer and pass its tensors on to the engine."""
        is_stop = asks_to_stop(tensors, STOP_REQUESTS)
        if is_stop:
            self._postprocessor.note_stop(request.request_id())
        # TensorRT-LLM's backend answers a request to stop by an empty response, for which this step is not called.
        if self._echoes_keys or not is_stop:
            answer = tensors[ANSWER.name].reshape(-1)[0].decode()
            self._postprocessor.register(self._key(request, tensors), request.request_id(), answer)
        names = {*ENGINE_NAMES, *ADDED_ENGINE_NAMES, ANSWER_KEY.name}
        outputs = [pb_utils.Tensor(name, tensor) for name, tensor in tensors.items() if name in names]
        sender.send(pb_utils.InferenceResponse(outputs), flags=LAST)

    def _extend(self, request: Any, tensors: dict[str, Any], sender: Any) -> None:  # noqa: ANN401
        """Add tokens to an answer. If there is no piece to send, only the end of the response is sent."""
        key = self._key(request, tensors)
        if PROBE.name in tensors:
            name = self._postprocessor.look(key, request.is_cancelled)
            sender.send(flags=LAST)
            self._stop(name)
            return
        try:
            step = self._postprocessor.extend(key, read_tokens(tensors), request.is_cancelled)
        except Exception:
            self._stop(self._postprocessor.abandon(key))
            raise
        if step.piece is None:
            sender.send(flags=LAST)
            return
        outputs = [pb_utils.Tensor(TEXT_NAMES[name], value) for name, value in wire_outputs(step.piece).items()]
        sender.send(pb_utils.InferenceResponse(outputs), flags=LAST)
        if step.piece.finish_reason == "cancelled" and step.piece.num_input_tokens:  # a request to stop has no prompt
            pb_utils.Logger.log_info(f"a request was cancelled after {step.piece.num_output_tokens} tokens")
        self._stop(step.stop)

    def _key(self, request: Any, tensors: dict[str, Any]) -> str:  # noqa: ANN401
        """The key of the answer that a request is about. If the engine does not send it back, the correlation id is the
        key."""
        key = read_key(tensors)
        return str(request.correlation_id()) if key is None else key

    def _stop(self, name: str) -> None:
        """Have the engine end a request; "" means none. If the engine does not end it, a warning is logged."""
        if not name:
            return
        try:
            problems = [response.error() for response in self._ask_to_stop(name) if response.has_error()]
        except Exception as error:  # the client has its answer already, or gets the error of that
            problems = [error]
        for problem in problems:
            pb_utils.Logger.log_warn(f"the engine did not stop the request {name}: {problem}")

    def _ask_to_stop(self, name: str) -> Any:  # noqa: ANN401
        """Send a request to stop. Returns the engine's responses. Of the inputs, which are all required, only `stop`
        counts."""
        inputs = {
            "stop": np.ones((1, 1), dtype=np.bool_),
            "input_ids": np.zeros((1, 1), dtype=np.int32),
            "input_lengths": np.ones((1, 1), dtype=np.int32),
            "request_output_len": np.ones((1, 1), dtype=np.int32),
        }
        stop = pb_utils.InferenceRequest(
            model_name=TOKEN_ENGINE,
            request_id=name,
            inputs=[pb_utils.Tensor(name, value) for name, value in inputs.items()],
            requested_output_names=list(ANSWER_OUTPUTS[:2]),
        )
        return stop.exec(decoupled=True)

    def finalize(self) -> None:
        """End the heartbeat."""
        self._heartbeat.stop()
