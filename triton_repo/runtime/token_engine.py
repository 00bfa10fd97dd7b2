"""ONNX Runtime behind the tensors of TensorRT-LLM's `tensorrt_llm`: token ids in, the next ones out.

    engine = TokenEngine.open(folder, threads=None, workers=1)
    engine.submit(Job(request_id="7", tensors={"input_ids": ...}, send=..., fail=..., is_cancelled=...))
    engine.stop("7")

Responses are those of the C++ backend (triton_backend/inflight_batcher_llm/src/model_instance_state.cc and
cpp/tensorrt_llm/batch_manager/llmRequest.cpp upstream): to a request that streams, one a token, whose log-probabilities
are all so far; else one in all. The end token is not among the tokens: an answer that it ends, ends with a response of
none, and so does one that is stopped. Tokens of stop words are.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from triton_repo.runtime.generation import feed
from triton_repo.runtime.sampling import Choice, Sampler
from triton_repo.runtime.stopping import TokenWatcher
from triton_repo.runtime.token_request import TokenRequest, read_token_request
from triton_repo.seal import is_sealed
from trt_build.engine import open_engine
from trt_build.ort.session import Session

if TYPE_CHECKING:
    from trt_build.ort.session import Cache

logger = logging.getLogger(__name__)

Tensors = dict[str, npt.NDArray[Any]]


@dataclass(frozen=True, kw_only=True, eq=False)
class Job:
    """One request, equal to itself alone. `send` takes a response's tensors and whether it is the last, `fail` the
    error that ends it; both are called in a thread of the engine's."""

    request_id: str
    tensors: Mapping[str, npt.NDArray[Any]]
    send: Callable[[Tensors, bool], None]
    fail: Callable[[Exception], None]
    is_cancelled: Callable[[], bool]
    stopped: threading.Event = field(default_factory=threading.Event)

    def is_over(self) -> bool:
        """Whether nobody waits for more."""
        return self.stopped.is_set() or self.is_cancelled()


class TokenEngine:
    """An engine and its workers, each with a cache of its own; requests wait in their order for a free one."""

    def __init__(self, sessions: list[Session]) -> None:
        self._jobs: queue.SimpleQueue[Job | None] = queue.SimpleQueue()
        self._under_way: list[Job] = []
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._work, args=(session,), daemon=True) for session in sessions]
        for thread in self._threads:
            thread.start()

    @classmethod
    def open(cls, folder: Path, threads: int | None, workers: int, device_index: int = 0) -> TokenEngine:
        """Load the engine once for each worker; its weights are mapped and shared. Every digest is checked first,
        unless the files are as they were when the engine was packaged.

        Raises EngineError, MissingPackageError.
        """
        engine = open_engine(folder, check_digests=not is_sealed(folder))
        return cls([Session(engine, threads, device_index) for _ in range(workers)])

    def submit(self, job: Job) -> None:
        """Have a request answered; returns at once."""
        with self._lock:
            self._under_way.append(job)
        self._jobs.put(job)

    def stop(self, request_id: str) -> int:
        """End the requests of that id, whether they run or wait; returns how many there were."""
        with self._lock:
            found = [job for job in self._under_way if job.request_id == request_id]
        for job in found:
            job.stopped.set()
        return len(found)

    def close(self) -> None:
        """Stop every request and end the workers."""
        with self._lock:
            for job in self._under_way:
                job.stopped.set()
        for _ in self._threads:
            self._jobs.put(None)
        for thread in self._threads:
            thread.join()

    def _work(self, session: Session) -> None:
        cache = session.new_cache()
        while (job := self._jobs.get()) is not None:
            try:
                _answer(session, job, cache)
            except Exception:  # whatever one request does, the worker goes on with the next
                logger.exception("the request %r can be sent neither its answer nor an error", job.request_id)
            finally:
                with self._lock:
                    self._under_way.remove(job)


def _answer(session: Session, job: Job, cache: Cache) -> None:
    """Send a request's responses, or the error that ends them. Raises what sending the error does: a sender that failed
    at the last response takes no more."""
    try:
        manifest = session.engine.manifest
        request = read_token_request(job.tensors, session.max_sequence, manifest.tokenizer_size, manifest.eos_token_ids)
        for tensors, is_last in respond(session, request, job.is_over, cache):
            job.send(tensors, is_last)
    except Exception as error:  # of any kind: its client is told
        job.fail(error)


@dataclass(kw_only=True)
class _Progress:
    """What was chosen so far for one request, the end token only in the sum; `num_sent` tokens were given out."""

    request: TokenRequest
    token_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)
    cum_log_prob: float = 0.0
    num_sent: int = 0

    def add(self, choice: Choice, *, shown: bool) -> None:
        self.cum_log_prob += choice.log_prob or 0.0
        if shown:
            self.token_ids.append(choice.token_id)
            self.log_probs.append(choice.log_prob or 0.0)

    def take(self) -> Tensors:
        """A response with the tokens that were not given out yet."""
        request = self.request
        new = self.token_ids[self.num_sent :]
        self.num_sent = len(self.token_ids)
        echo = request.plan.prompt_ids if request.echo and not request.streaming else ()
        tensors: Tensors = {
            "output_ids": np.array([[[*echo, *new]]], dtype=np.int32),
            "sequence_length": np.array([[len(echo) + len(new)]], dtype=np.int32),
        }
        if request.plan.options.return_log_probs:
            tensors["cum_log_probs"] = np.array([[self.cum_log_prob]], dtype=np.float32)
            tensors["output_log_probs"] = np.array([[self.log_probs]], dtype=np.float32)
        if request.count_input_tokens:
            tensors["num_input_tokens"] = np.array([[len(request.plan.prompt_ids)]], dtype=np.int32)
        if request.count_output_tokens:
            tensors["num_output_tokens"] = np.array([[len(new)]], dtype=np.int32)
        return tensors


def respond(
    session: Session, request: TokenRequest, is_cancelled: Callable[[], bool], cache: Cache
) -> Iterator[tuple[Tensors, bool]]:
    """The responses to a request, each with whether it is the last. Raises RequestError for logits that are no
    numbers."""
    cache.reset()
    plan, progress = request.plan, _Progress(request=request)
    sampler = Sampler(plan, session.engine.manifest.tokenizer_size)
    stop_words, bad_words = TokenWatcher(request.stop_words), TokenWatcher(request.bad_words)
    pending: Sequence[int] = plan.prompt_ids
    while True:
        logits = feed(session, cache, pending, is_cancelled)
        if logits is None:
            yield progress.take(), True
            return
        banned = bad_words.completing().difference(plan.end_ids)
        choice = sampler.choose(logits, banned.__contains__ if banned else None)
        ended = choice.token_id == request.end_id
        progress.add(choice, shown=not ended)
        bad_words.push(choice.token_id)
        ended = stop_words.push(choice.token_id) or ended or len(progress.token_ids) == request.most_tokens
        if request.streaming or ended:
            yield progress.take(), ended
        if ended:
            return
        pending = [choice.token_id]
