"""The third step of an ensemble where ONNX Runtime runs the engine, as Triton's Python backend runs it.

Lies in a model repository as tensorrt_llm/<version>/model.py beside the engine, in the place of TensorRT-LLM's C++
backend and with its tensors. What can be understood without Triton lives in triton_repo.runtime.token_engine.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from triton_repo.heartbeat import Heartbeat
from triton_repo.runtime.parameters import ModelParameters, read_workers
from triton_repo.runtime.responses import error_response
from triton_repo.runtime.token_engine import Job, Tensors, TokenEngine

LAST = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    """The one instance: an engine in memory and its workers, so that a request to stop another reaches it."""

    def initialize(self, args: dict[str, str]) -> None:
        """Load the engine; what goes wrong becomes the reason in the repository index."""
        self._heartbeat = Heartbeat.start(args["model_name"], args["model_instance_name"])
        config = json.loads(args["model_config"])
        parameters = ModelParameters.from_config(config)
        workers = read_workers(config)
        folder = Path(args["model_repository"]) / args["model_version"] / parameters.engine
        device_index = int(args["model_instance_device_id"]) if args["model_instance_kind"] == "GPU" else 0
        self._engine = TokenEngine.open(folder, parameters.threads_of_one(workers), workers, device_index)
        pb_utils.Logger.log_info(f"{args['model_instance_name']}: {folder} is loaded")

    def execute(self, requests: list[Any]) -> None:
        """Hand the requests to the workers; one to stop others is answered at once, by a response of nothing."""
        for request in requests:
            tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            if "stop" in tensors and tensors["stop"].any():
                count = self._engine.stop(request.request_id())
                pb_utils.Logger.log_info(f"stopped the request {request.request_id()} ({count} under way)")
                request.get_response_sender().send(flags=LAST)
            else:
                self._engine.submit(_job(request, tensors))

    def finalize(self) -> None:
        """End the workers and free the engine."""
        self._engine.close()
        del self._engine


def _job(request: Any, tensors: dict[str, Any]) -> Job:  # noqa: ANN401 - the backend's type exists inside Triton only
    sender = request.get_response_sender()

    def send(response: Tensors, is_last: bool) -> None:
        outputs = [pb_utils.Tensor(name, value) for name, value in response.items()]
        sender.send(pb_utils.InferenceResponse(outputs), flags=LAST if is_last else 0)

    def fail(error: Exception) -> None:
        sender.send(error_response(pb_utils, error), flags=LAST)

    return Job(
        request_id=request.request_id(), tensors=tensors, send=send, fail=fail, is_cancelled=request.is_cancelled
    )
