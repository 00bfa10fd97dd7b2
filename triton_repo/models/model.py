"""The served model, as Triton's Python backend runs it: requests wait in one queue, workers answer them.

Lies in a model repository as <name>/<version>/model.py beside the engine. Everything that can be understood without
Triton lives in triton_repo.runtime; here tensors are unwrapped, responses sent, and errors given their status.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from triton_repo.contracts.model_parameters import ModelParameters, read_workers
from triton_repo.contracts.piece import Piece
from triton_repo.processes.heartbeat import Heartbeat
from triton_repo.runtime.responses import error_response, wire_outputs
from triton_repo.runtime.service import Request, Service
from triton_repo.runtime.stop_requests import STOPPED, asks_to_stop, check_stop_id

LAST = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    """One instance of the model: an engine in memory and its workers, each with the buffers of one sequence."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the engine; what goes wrong becomes the reason in the repository index."""
        self._heartbeat = Heartbeat.start(args["model_name"], args["model_instance_name"])
        config = json.loads(args["model_config"])
        parameters = ModelParameters.from_config(config)
        workers = read_workers(config)
        folder = Path(args["model_repository"]) / args["model_version"] / parameters.engine
        device_index = int(args["model_instance_device_id"]) if args["model_instance_kind"] == "GPU" else 0
        threads = parameters.threads_of_one(workers)
        unary = not config["model_transaction_policy"]["decoupled"]
        self._service = Service.open(folder, threads, workers, device_index, self._heartbeat, unary=unary)
        self._heartbeat.on_drain(self._service.workers.drain)
        pb_utils.Logger.log_info(f"{args['model_instance_name']}: {folder} is loaded")

    def execute(self, requests: list[Any]) -> None:
        """Hand the requests to the workers; one to stop others is answered at once. A request's error is that request's
        alone."""
        for request in requests:
            made = _request(request)
            try:
                if asks_to_stop(made.tensors):
                    self._stop(made)
                else:
                    self._service.submit(made)
            except Exception as error:  # whatever one request does, the instance goes on with the next
                made.fail(error)

    def _stop(self, request: Request) -> None:
        check_stop_id(request.request_id)
        count = self._service.workers.stop(request.request_id)
        pb_utils.Logger.log_info(f"stopped the request {request.request_id!r} ({count} under way)")
        request.send(STOPPED, True)

    def finalize(self) -> None:
        """End the workers and free the engine."""
        self._service.workers.close()
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
    )
