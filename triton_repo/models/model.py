"""The served model on Triton's Python backend: requests wait in one queue, and are computed together.

Packaging copies this file to <name>/<version>/model.py, beside the engine. It only unwraps tensors and sends responses
and errors; triton_repo.runtime does the rest and does not depend on Triton.
"""

from __future__ import annotations

import json
from typing import Any

import triton_python_backend_utils as pb_utils

from triton_repo.contracts.model_parameters import EngineInstance
from triton_repo.contracts.piece import Piece
from triton_repo.processes.heartbeat import Heartbeat
from triton_repo.runtime.reporting.reports import Reports
from triton_repo.runtime.responses import error_response, wire_outputs
from triton_repo.runtime.single.service import Request, Service
from triton_repo.runtime.stop_requests import STOPPED, asks_to_stop, check_stop_id

LAST = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    """One instance of the model: a loaded engine that computes many requests together."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the engine. The text of an exception becomes the reason in the repository index."""
        self._heartbeat = Heartbeat.start(args["model_name"], args["model_instance_name"])
        config = json.loads(args["model_config"])
        instance = EngineInstance.from_arguments(args, config)
        unary = not config["model_transaction_policy"]["decoupled"]
        self._service = Service.open(instance, self._heartbeat, unary=unary)
        self._heartbeat.on_drain(self._service.runner.drain)
        self._heartbeat.on_end(self._service.runner.end_running)
        self._reports = Reports.start(self._service.runner.engine, args["model_name"], pb_utils.MetricFamily)
        pb_utils.Logger.log_info(f"{args['model_instance_name']}: {instance.folder} is loaded")

    def execute(self, requests: list[Any]) -> None:
        """Give the requests to the engine. A request to stop others is answered at once. An error ends only its own
        request."""
        for request in requests:
            made = _request(request)
            try:
                if asks_to_stop(made.tensors):
                    self._stop(made)
                else:
                    self._service.submit(made)
            except Exception as error:  # the instance goes on with the next request
                made.fail(error)

    def _stop(self, request: Request) -> None:
        check_stop_id(request.request_id)
        count = self._service.runner.stop(request.request_id)
        pb_utils.Logger.log_info(f"stopped the request {request.request_id!r} ({count} in progress)")
        request.send(STOPPED, True)

    def finalize(self) -> None:
        """End the requests and free the engine."""
        self._service.runner.close()
        self._reports.stop()
        self._heartbeat.stop()
        del self._service


def _request(request: Any) -> Request:  # noqa: ANN401 - the backend's type exists inside Triton only
    sender = request.get_response_sender()

    def send(piece: Piece, is_last: bool) -> None:
        outputs = [pb_utils.Tensor(name, value) for name, value in wire_outputs(piece).items()]
        sender.send(pb_utils.InferenceResponse(outputs), flags=LAST if is_last else 0)
        if piece.finish_reason == "cancelled" and piece is not STOPPED:
            pb_utils.Logger.log_info(f"a request was cancelled after {piece.num_output_tokens} tokens")

    def fail(error: Exception) -> None:
        sender.send(error_response(pb_utils, error), flags=LAST)

    return Request(
        tensors={tensor.name(): tensor.as_numpy() for tensor in request.inputs()},
        request_id=request.request_id(),
        send=send,
        fail=fail,
        is_cancelled=request.is_cancelled,
        timeout_s=request.timeout() / 1e6 or None,  # Triton's request timeout, in microseconds; 0 is none
    )
