"""The errors of the gateway in OpenAI's form, and the HTTP status that each error of a client of Triton becomes.

    {"error": {"message": "...", "type": "invalid_request_error", "param": "top_p", "code": null}}

Types and codes are those of OpenAI's API reference and of its Python client, which chooses its exception by the status.
"""

from __future__ import annotations

import json
import re
from typing import Any

from clients.errors import (
    AccessDenied,
    ClientError,
    ConnectionFailed,
    ConnectionLost,
    DeadlineExceeded,
    MethodNotSupported,
    ModelNotFound,
    ModelNotReady,
    RequestCancelled,
    RequestRejected,
    ServerOverloaded,
)
from export.errors import MoeshipError, printable

INVALID, SERVER, OVERLOADED = "invalid_request_error", "server_error", "rate_limit_exceeded"
DEFAULT_RETRY_S = 2  # where a refusal does not say after how long to send the request again
MOST_RETRY_S = 600
# What our own servers say of a full queue (triton_repo/runtime/batching/refusals.py).
_RETRY = re.compile(r"send it again in about (\d{1,6}) s")
_STOPPING = "the server is stopping"
# The first field that our own servers refuse (triton_repo/runtime/options.py), and what became their tensors.
_REFUSED = re.compile(r"(?:^  - |reading the request: )(\w+): ", re.MULTILINE)
_FIELDS = {
    "logit_bias_ids": "logit_bias", "logit_bias_vals": "logit_bias", "stop_words": "stop", "random_seed": "seed",
    "return_log_probs": "logprobs", "num_log_probs": "logprobs",
    "min_length": "min_tokens", "num_return_sequences": "n", "end_id": "ignore_eos",
    "guided_decoding_guide": "response_format", "guided_decoding_guide_type": "response_format",
}  # fmt: skip
_PROMPTS = ("text_input", "input_ids")
_TOO_LONG = re.compile(r"found a prompt of (?:\d+ tokens, expected at most (\d+))?")


class ApiError(Exception):
    """An answer that is an error: its HTTP status, and what OpenAI's error object holds."""

    def __init__(
        self,
        message: str,
        *,
        status: int = 400,
        kind: str = INVALID,
        param: str | None = None,
        code: str | None = None,
        retry_s: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.kind, self.param, self.code, self.retry_s = status, kind, param, code, retry_s

    def body(self) -> dict[str, Any]:
        error = {"message": printable(str(self)), "type": self.kind, "param": self.param, "code": self.code}
        return {"error": error}

    def encoded(self) -> bytes:
        """The body as bytes of JSON. Characters that UTF-8 cannot hold, which a request can bring in, are escaped."""
        return json.dumps(self.body()).encode()

    def headers(self) -> list[tuple[str, str]]:
        return [] if self.retry_s is None else [("retry-after", str(self.retry_s))]


def invalid(param: str | None, problem: str, *, code: str | None = None) -> ApiError:
    """The error of a field of a request; `problem` is "found ..., expected ...; what to do"."""
    return ApiError(f"{param}: {problem}" if param else problem, param=param, code=code)


def unsupported(param: str, problem: str) -> ApiError:
    """The error of a field that this gateway does not honour."""
    return ApiError(f"{param}: {problem}", param=param, code="unsupported_parameter")


def model_not_found(model: str, known: list[str]) -> ApiError:
    there = f"this gateway has: {', '.join(known)}" if known else "this gateway has no model at present"
    return ApiError(
        f"the model {model[:200]!r} does not exist; {there}", status=404, param="model", code="model_not_found"
    )


def unavailable(problem: str, retry_s: int = DEFAULT_RETRY_S) -> ApiError:
    return ApiError(problem, status=503, kind=SERVER, code="unavailable", retry_s=retry_s)


def cancelled() -> ApiError:
    """The error of an answer that the server ended before its end."""
    return ApiError(
        "the server ended this answer before its end: it is stopping, or the request's time has passed; send it again",
        status=503, kind=SERVER, code="cancelled", retry_s=DEFAULT_RETRY_S,
    )  # fmt: skip


def of_client(error: ClientError) -> ApiError:
    """The error that a client of the gateway sees. Addresses of the servers behind the gateway are not in it."""
    text = _details(error)
    if isinstance(error, (ServerOverloaded, RequestCancelled)):
        if _STOPPING in text or isinstance(error, RequestCancelled):
            return unavailable(text)
        found = _RETRY.search(text)
        retry_s = min(int(found[1]), MOST_RETRY_S) if found else DEFAULT_RETRY_S
        return ApiError(text, status=429, kind=OVERLOADED, code="rate_limit_exceeded", retry_s=retry_s)
    if isinstance(error, RequestRejected):
        return _refused(text)
    if isinstance(error, ModelNotFound):
        return ApiError(text, status=404, param="model", code="model_not_found")
    if isinstance(error, DeadlineExceeded):
        return ApiError("the answer took longer than this gateway allows; ask for fewer tokens", status=504,
                        kind=SERVER, code="deadline_exceeded")  # fmt: skip
    if isinstance(error, ConnectionFailed):
        return unavailable("the model's server cannot be reached at present; send the request again")
    if isinstance(error, ConnectionLost):
        return unavailable("the model's server ended before the answer did; send the request again")
    if isinstance(error, ModelNotReady):
        return unavailable("the model is not loaded at present; send the request again later")
    if isinstance(error, MethodNotSupported):
        return ApiError("the model's server does not do what was asked", status=501, kind=SERVER)
    if isinstance(error, AccessDenied):
        return ApiError("the model's server does not accept this gateway's credentials", status=502, kind=SERVER)
    return ApiError("the model's server failed; its log has the reason", status=500, kind=SERVER, code="server_failed")


def too_long(field: str | None, found: str, context: int | None) -> ApiError:
    """The error of a prompt that does not fit a context of so many tokens (None: unknown). Clients that read no codes,
    such as LiteLLM (exception_mapping_utils.py), know OpenAI's error by the first words, and some take the number."""
    begin = "this model's maximum context length is " + (f"{context} tokens" if context else "exceeded")
    return ApiError(f"{begin}: {found}", param=field, code="context_length_exceeded")


def _refused(text: str) -> ApiError:
    """The error of a request that the server refused. Clients of OpenAI's API look for the code of a prompt that does
    not fit."""
    found = _REFUSED.search(text)
    name = found[1] if found else None
    if name in _PROMPTS:
        if long := _TOO_LONG.search(text):
            return too_long(None, text, int(long[1]) + 1 if long[1] else None)
        return ApiError(text)
    return ApiError(text, param=_FIELDS.get(name, name) if name else None)


def of_moeship(error: MoeshipError) -> ApiError:
    """The error of a request that failed within the gateway by its own set-up, such as a damaged tokenizer."""
    return ApiError(str(error), status=500, kind=SERVER)


def _details(error: ClientError) -> str:
    """The server's own words: without what was being done and the server's address, which come before the status, and
    without our advice to whoever runs a client, which comes after."""
    text = str(error)
    if error.status is not None:
        text = text.rpartition(f"{error.status}: ")[2]
    return text.removesuffix(f"; {error.remedy}") if error.remedy else text
