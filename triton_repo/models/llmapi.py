"""The served model on TensorRT-LLM's LLM API and Triton's Python backend: one event loop answers all requests.

Packaging copies this file to <name>/<version>/model.py, beside model.yaml. It only starts the LLM, unwraps tensors and
sends responses and errors; triton_repo.runtime does the rest and depends neither on Triton nor on TensorRT-LLM. The LLM
itself starts a process for each of its GPUs.
"""

from __future__ import annotations

import asyncio
import json
import sys
import threading
from pathlib import Path
from typing import Any

import triton_python_backend_utils as pb_utils

from export.tokenizer.loading import load_tokenizer
from triton_repo.contracts.llmapi_settings import SETTINGS_FILE, read_settings
from triton_repo.errors import RepositoryError
from triton_repo.processes.heartbeat import Heartbeat
from triton_repo.runtime.llmapi.model import LlmService
from triton_repo.runtime.responses import error_response, server_stopping
from triton_repo.runtime.stop_requests import asks_to_stop
from trt_build.machine.readings import container

LAST = pb_utils.TRITONSERVER_RESPONSE_COMPLETE_FINAL


class TritonPythonModel:
    """The only instance of the model: an LLM, and a thread with the event loop that answers the requests."""

    def initialize(self, args: dict[str, str]) -> None:
        """Start the LLM. The text of an exception becomes the reason in the repository index."""
        self._heartbeat = Heartbeat.start(args["model_name"], args["model_instance_name"])
        folder = Path(args["model_repository"]) / args["model_version"]
        settings = read_settings(folder / SETTINGS_FILE)
        config = json.loads(args["model_config"])
        if config["max_batch_size"] != settings.triton.max_batch_size:
            raise RepositoryError(
                f"loading {args['model_name']}: max_batch_size is {config['max_batch_size']} in config.pbtxt and "
                f"{settings.triton.max_batch_size} in {SETTINGS_FILE}; package the checkpoint again"
            )
        model = folder / settings.llm["model"]
        tokenizer = load_tokenizer(model)

        # Imported last, since it takes long and a wrong model.yaml can be reported before.
        try:
            from tensorrt_llm import LLM, SamplingParams
            from tensorrt_llm.llmapi import GuidedDecodingParams
        except ImportError as error:
            raise RepositoryError(
                f"loading {args['model_name']}: the Python in {sys.prefix} has no TensorRT-LLM ({error}); serve it in "
                f"{container(None)}, by a moeship that is installed for that container's own Python"
            ) from error
        # Guided decoding alone needs the LLM's own tokenizer (get_guided_decoding_config of
        # tensorrt_llm/_torch/pyexecutor/py_executor_creator.py).
        guided = settings.llm.get("guided_decoding_backend") is not None
        self._llm = LLM(
            **{**settings.llm, "model": str(model)}, skip_tokenizer_init=not guided, trust_remote_code=False
        )
        self._service = LlmService(
            self._llm, SamplingParams, tokenizer, settings, GuidedDecodingParams if guided else None
        )
        self._num_running = 0  # used only in the event loop's thread
        self._draining = threading.Event()
        self._heartbeat.on_drain(self._draining.set)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="llmapi")
        self._thread.start()
        pb_utils.Logger.log_info(f"{args['model_instance_name']}: {model} is loaded")

    def execute(self, requests: list[Any]) -> None:
        """Give the requests to the event loop, which answers them concurrently."""
        for request in requests:
            asyncio.run_coroutine_threadsafe(self._answer(request), self._loop)

    async def _answer(self, request: Any) -> None:  # noqa: ANN401 - the backend's type exists inside Triton only
        self._count(1)
        try:
            await self._respond(request)
        finally:
            self._count(-1)

    def _count(self, change: int) -> None:
        self._num_running += change
        self._heartbeat.report(running=self._num_running, waiting=0)

    async def _respond(self, request: Any) -> None:  # noqa: ANN401
        sender = request.get_response_sender()
        try:
            tensors = {tensor.name(): tensor.as_numpy() for tensor in request.inputs()}
            if self._draining.is_set() and not asks_to_stop(tensors):
                raise server_stopping()
            async for response in self._service.respond(tensors, request.request_id(), request.is_cancelled):
                outputs = [pb_utils.Tensor(name, value) for name, value in response.outputs.items()]
                await self._send(sender, pb_utils.InferenceResponse(outputs), LAST if response.is_last else 0)
                if response.finish_reason == "cancelled":
                    pb_utils.Logger.log_info(f"a request was cancelled after {response.num_output_tokens} tokens")
        except Exception as error:  # the other requests go on
            await self._send(sender, error_response(pb_utils, error), LAST)

    async def _send(self, sender: Any, response: Any, flags: int) -> None:  # noqa: ANN401
        """Send in another thread, since sending waits for the server and the event loop must not."""
        await asyncio.to_thread(sender.send, response, flags)

    def finalize(self) -> None:
        """Stop the event loop, then the LLM and its processes."""
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._llm.shutdown()
        self._heartbeat.stop()
