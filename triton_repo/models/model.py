"""The served model, as Triton's Python backend runs it: one request at a time, one response a piece.

Lies in a model repository as <name>/<version>/model.py beside the engine. Everything that can be understood without
Triton lives in triton_repo.runtime; here tensors are unwrapped, responses sent, and errors given their status.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from triton_repo.heartbeat import Heartbeat
from triton_repo.runtime.parameters import ModelParameters
from triton_repo.runtime.responses import error_response, wire_outputs
from triton_repo.runtime.service import Service

LAST = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    """One instance of the model: an engine in memory and the buffers of one sequence."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the engine; what goes wrong becomes the reason in the repository index."""
        self._heartbeat = Heartbeat.start(args["model_name"], args["model_instance_name"])
        config = json.loads(args["model_config"])
        parameters = ModelParameters.from_config(config)
        folder = Path(args["model_repository"]) / args["model_version"] / parameters.engine
        device_index = int(args["model_instance_device_id"]) if args["model_instance_kind"] == "GPU" else 0
        self._service = Service.open(folder, parameters.threads_of_instance(config), device_index)
        pb_utils.Logger.log_info(f"{args['model_instance_name']}: {folder} is loaded")

    def execute(self, requests: list[Any]) -> None:
        """Answer the requests in their order; a request's error is that request's alone."""
        for request in requests:
            self._answer(request)

    def _answer(self, request: Any) -> None:  # noqa: ANN401 - the backend's type exists inside Triton only
        sender = request.get_response_sender()
        try:
            tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            for piece in self._service.respond(tensors, request.is_cancelled):
                outputs = [pb_utils.Tensor(name, value) for name, value in wire_outputs(piece).items()]
                sender.send(pb_utils.InferenceResponse(outputs), flags=LAST if piece.finish_reason else 0)
                if piece.finish_reason == "cancelled":
                    pb_utils.Logger.log_info(f"a request was cancelled after {piece.num_output_tokens} tokens")
        except Exception as error:  # whatever one request does, the instance goes on with the next
            sender.send(error_response(pb_utils, error), flags=LAST)

    def finalize(self) -> None:
        """Free the engine."""
        del self._service
