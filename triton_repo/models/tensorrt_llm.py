"""The third step of an ensemble on Triton's Python backend, if ONNX Runtime runs the engine.

Packaging copies this file to tensorrt_llm/<version>/model.py, beside the engine. The model has the tensors of
TensorRT-LLM's C++ backend and takes its place. triton_repo.runtime.steps.token_engine does the work and does not depend
on Triton.
"""

from __future__ import annotations

import json
from typing import Any

import triton_python_backend_utils as pb_utils

from triton_repo.contracts.model_parameters import EngineInstance
from triton_repo.processes.heartbeat import Heartbeat
from triton_repo.runtime.reporting.reports import Reports
from triton_repo.runtime.responses import error_response
from triton_repo.runtime.steps.token_engine import Request, Tensors, TokenEngine, stopped_response
from triton_repo.runtime.stop_requests import asks_to_stop, check_stop_id

LAST = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    """The only instance: a loaded engine. With one instance, a request to stop reaches the right queue."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the engine. The text of an exception becomes the reason in the repository index."""
        self._heartbeat = Heartbeat.start(args["model_name"], args["model_instance_name"])
        instance = EngineInstance.from_arguments(args, json.loads(args["model_config"]))
        self._engine = TokenEngine.open(instance, self._heartbeat)
        self._heartbeat.on_drain(self._engine.runner.drain)
        self._heartbeat.on_end(self._engine.runner.end_running)
        self._reports = Reports.start(self._engine.runner.engine, args["model_name"], pb_utils.MetricFamily)
        pb_utils.Logger.log_info(f"{args['model_instance_name']}: {instance.folder} is loaded")

    def execute(self, requests: list[Any]) -> None:
        """Give the requests to the engine. A request to stop others is answered at once. An error ends only its own
        request."""
        for request in requests:
            sender = request.get_response_sender()
            made = _request(request, sender)
            try:
                if asks_to_stop(made.tensors):
                    self._stop(made, sender)
                else:
                    self._engine.submit(made)
            except Exception as error:  # the instance goes on with the next request
                made.fail(error)

    def _stop(self, request: Request, sender: Any) -> None:  # noqa: ANN401 - Triton's type
        check_stop_id(request.request_id)
        count = self._engine.runner.stop(request.request_id)
        pb_utils.Logger.log_info(f"stopped the request {request.request_id!r} ({count} in progress)")
        response = stopped_response(request.tensors)
        if response is None:
            sender.send(flags=LAST)
        else:
            request.send(response, True)

    def finalize(self) -> None:
        """End the requests and free the engine."""
        self._engine.runner.close()
        self._reports.stop()
        self._heartbeat.stop()
        del self._engine


def _request(request: Any, sender: Any) -> Request:  # noqa: ANN401 - the backend's types exist inside Triton only
    def send(response: Tensors, is_last: bool) -> None:
        outputs = [pb_utils.Tensor(name, value) for name, value in response.items()]
        sender.send(pb_utils.InferenceResponse(outputs), flags=LAST if is_last else 0)

    def fail(error: Exception) -> None:
        sender.send(error_response(pb_utils, error), flags=LAST)

    return Request(
        request_id=request.request_id(),
        tensors={tensor.name(): tensor.as_numpy() for tensor in request.inputs()},
        send=send,
        fail=fail,
        is_cancelled=request.is_cancelled,
        timeout_s=request.timeout() / 1e6 or None,  # Triton's request timeout, in microseconds; 0 is none
    )
