"""Lines of a batch: a line of the input becomes a request, and the request's answer a line of the output.

Two forms of lines, each answered in kind:

- "openai": the batch file format of OpenAI's API reference (request input and request output objects).
- "prompts": a JSON text, or an object with `prompt` or `messages` and further fields of the request's body.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from export.errors import ConfigError, kind_of, shown
from export.files.reading import open_regular, words_of

Form = Literal["openai", "prompts"]

COMPLETIONS, CHATS = "/v1/completions", "/v1/chat/completions"
MOST_LINE = 16 << 20  # bytes of a line of the input
_PATH = re.compile(r"/v1/[\w./-]{1,200}")
_FIELDS = ("custom_id", "method", "url", "body")
_MOST_MESSAGE = 2000  # characters of an error in the output
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class LineInvalid(Exception):  # noqa: N818 - named after what happened, as the errors of clients/errors.py
    """A line of the input that is no request. The text says why."""


@dataclass(frozen=True, kw_only=True)
class RawLine:
    """A line of the input that is not blank."""

    index: int  # its place among those lines, from 0: the place of its answer in the output
    number: int  # its number in the file, from 1
    offset: int  # bytes before it
    data: bytes  # with its end; at most MOST_LINE + 1 bytes of it


@dataclass(frozen=True, kw_only=True)
class Request:
    """A request of one line."""

    custom_id: str | None
    url: str  # path of the endpoint, such as /v1/completions
    body: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Answer:
    """What became of a request: an answer by HTTP with its status, or an `error` (code, message) without one.

    `retry_s` is after how many seconds the server wants to be asked again; None if it did not say."""

    status: int | None = None
    request_id: str = ""
    body: Any = None
    error: tuple[str, str] | None = None
    retry_s: float | None = None

    @property
    def is_good(self) -> bool:
        return self.error is None and self.status is not None and 200 <= self.status < 300


def read_lines(
    path: Path, *, offset: int = 0, index: int = 0, number: int = 1, see: Callable[[bytes], object] = len
) -> Iterator[RawLine]:
    """The lines of a file that are not blank, from byte `offset` on, where the line with that `number` begins. Of a
    line that is too long only the beginning is kept. `see` is called with all bytes that are read, in order. Raises
    ConfigError for a file that cannot be read."""
    doing = f"reading the batch {path}"
    with open_regular(path, doing) as raw:
        raw.seek(offset)
        with open(raw.fileno(), "rb", buffering=1 << 18, closefd=False) as file:
            while data := file.readline(MOST_LINE + 1):
                see(data)
                num_bytes = len(data)
                while not data.endswith(b"\n") and (rest := file.readline(MOST_LINE)):
                    see(rest)
                    num_bytes += len(rest)
                    if rest.endswith(b"\n"):
                        break
                if number == 1:
                    data = data.removeprefix(_BYTE_ORDER_MARK)
                if not data.isspace() and data:
                    yield RawLine(index=index, number=number, offset=offset, data=data)
                    index += 1
                offset += num_bytes
                number += 1


def parse(data: bytes) -> Any:  # noqa: ANN401 - JSON value
    """The JSON value of a line. Raises LineInvalid."""
    if len(data) > MOST_LINE:
        raise LineInvalid(f"found more than {MOST_LINE} bytes, expected at most that many in a line")
    try:
        return json.loads(data.decode(), parse_constant=_no_number)
    except UnicodeDecodeError as error:
        raise LineInvalid(f"found bytes that are no UTF-8 ({error.reason} at byte {error.start})") from error
    except RecursionError as error:
        raise LineInvalid("found values nested too deeply to be read") from error
    except ValueError as error:
        raise LineInvalid(f"found no JSON ({words_of(error)})") from error


def _no_number(name: str) -> float:
    raise ValueError(f"{name} is no JSON number")


def form_of(value: Any) -> Form | None:  # noqa: ANN401 - JSON value
    """The form of the batch that a line with this value is of; None for a value that is a request in neither form."""
    if isinstance(value, str):
        return "prompts"
    if not isinstance(value, dict):
        return None
    if "body" in value and not value.keys().isdisjoint(("custom_id", "method", "url")):
        return "openai"
    return "prompts" if "prompt" in value or "messages" in value else None


def read_request(value: Any, form: Form, model: str | None, defaults: Mapping[str, Any]) -> Request:  # noqa: ANN401
    """The request in a line's JSON value. `defaults` are fields of the body that are added where the line has none;
    `model`, if it is given, takes the place of the line's. Raises LineInvalid."""
    request = _openai_request(value) if form == "openai" else _prompt_request(value)
    body = {**defaults, **request.body}
    if model is not None:
        body["model"] = model
    if not isinstance(body.get("model"), str) or not body["model"]:
        raise LineInvalid("found no model in the body, expected its name; add it, or give --model")
    if form == "prompts" and body.get("n") not in (None, 1):
        raise LineInvalid(f"n is {shown(body['n'])}, expected 1; for several answers use the OpenAI batch file format")
    if body.get("stream"):
        raise LineInvalid("stream is true in the body, expected a whole answer; leave it out")
    return Request(custom_id=request.custom_id, url=request.url, body=body)


def _openai_request(value: Any) -> Request:  # noqa: ANN401 - JSON value
    if not isinstance(value, dict) or set(value) != set(_FIELDS):
        found = ", ".join(map(str, value)) if isinstance(value, dict) else kind_of(value)
        raise LineInvalid(f"found {found[:200]}, expected an object with {', '.join(_FIELDS)}")
    if not isinstance(value["custom_id"], str) or not value["custom_id"]:
        raise LineInvalid(f"custom_id is {shown(value['custom_id'])}, expected a text that is not empty")
    if value["method"] != "POST":
        raise LineInvalid(f"method is {shown(value['method'])}, expected POST")
    if not isinstance(value["url"], str) or not _PATH.fullmatch(value["url"]) or ".." in value["url"]:
        raise LineInvalid(f"url is {shown(value['url'])}, expected a path such as {COMPLETIONS}")
    if not isinstance(value["body"], dict):
        raise LineInvalid(f"body is {kind_of(value['body'])}, expected an object")
    return Request(custom_id=value["custom_id"], url=value["url"], body=value["body"])


def _prompt_request(value: Any) -> Request:  # noqa: ANN401 - JSON value
    fields = {"prompt": value} if isinstance(value, str) else value
    if not isinstance(fields, dict):
        raise LineInvalid(f"found {kind_of(value)}, expected a text, or an object with prompt or messages")
    body = {name: item for name, item in fields.items() if name != "custom_id"}
    if ("prompt" in body) == ("messages" in body):
        raise LineInvalid("expected one of prompt and messages")
    if "prompt" in body and not isinstance(body["prompt"], str):
        raise LineInvalid(f"prompt is {kind_of(body['prompt'])}, expected a text")
    custom_id = fields.get("custom_id")
    if custom_id is not None and (not isinstance(custom_id, str) or not custom_id):
        raise LineInvalid(f"custom_id is {shown(custom_id)}, expected a text that is not empty")
    return Request(custom_id=custom_id, url=COMPLETIONS if "prompt" in body else CHATS, body=body)


def invalid(number: int, reason: LineInvalid) -> Answer:
    """The answer to a line that is no request and is not sent."""
    return Answer(error=("invalid_line", f"line {number}: {reason}"))


def write_line(answer: Answer, form: Form, *, answer_id: str, number: int, custom_id: str | None) -> tuple[bytes, bool]:
    """The line of the output for an answer, with its end, and whether the request got what it asked for."""
    if form == "openai":
        made, is_good = _openai_line(answer, custom_id), answer.is_good
    else:
        made, is_good = _prompt_line(answer, number, custom_id)
    value = {"id": answer_id, **made}
    try:
        try:
            text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        except ValueError:  # servers send NaN and Infinity, as log probabilities, and JSON has no such numbers
            value = _without_nan(value)
            text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
        return text.encode() + b"\n", is_good
    except UnicodeEncodeError:  # half of a surrogate pair, which JSON can hold and UTF-8 cannot
        return json.dumps(value, separators=(",", ":")).encode() + b"\n", is_good
    except RecursionError:
        refused = Answer(error=("unreadable_answer", "the answer has values nested too deeply to be written"))
        return write_line(refused, form, answer_id=answer_id, number=number, custom_id=custom_id)


def _without_nan(value: Any) -> Any:  # noqa: ANN401 - JSON value
    """The value with null for each number that is not finite."""
    if isinstance(value, dict):
        return {name: _without_nan(item) for name, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _openai_line(answer: Answer, custom_id: str | None) -> dict[str, Any]:
    response, error = None, None
    if answer.error is not None:
        code, message = answer.error
        error = {"code": code, "message": message[:_MOST_MESSAGE]}
    else:
        response = {"status_code": answer.status, "request_id": answer.request_id, "body": answer.body}
    return {"custom_id": custom_id, "response": response, "error": error}


def _prompt_line(answer: Answer, number: int, custom_id: str | None) -> tuple[dict[str, Any], bool]:
    text, reason, usage = None, None, None
    error = answer.error
    if error is None and answer.is_good:
        try:
            choice = answer.body["choices"][0]
            text = choice["text"] if "text" in choice else choice["message"]["content"]
            reason, usage = choice.get("finish_reason"), answer.body.get("usage")
        except (LookupError, TypeError, AttributeError) as problem:
            error = ("unreadable_answer", f"the answer has no choices[0] with a text ({problem!r})")
    elif error is None:
        error = (f"http_{answer.status}", message_of(answer.body))
    made = {
        "line": number,
        **({} if custom_id is None else {"custom_id": custom_id}),
        "text": text,
        "finish_reason": reason,
        "usage": usage,
        "error": None if error is None else {"code": error[0], "message": error[1][:_MOST_MESSAGE]},
    }
    return made, error is None


def message_of(body: Any) -> str:  # noqa: ANN401 - JSON value
    """What a server's body of an error says."""
    error = body.get("error", body) if isinstance(body, dict) else body
    message = error.get("message", error) if isinstance(error, dict) else error
    return message if isinstance(message, str) else json.dumps(message)


def code_of(body: Any) -> str | None:  # noqa: ANN401 - JSON value
    """The code in a server's body of an error, None if it has none."""
    error = body.get("error") if isinstance(body, dict) else None
    code = error.get("code") if isinstance(error, dict) else None
    return code if isinstance(code, str) else None


def read_defaults(text: str | None, doing: str) -> dict[str, Any]:
    """The object of JSON in a flag. Raises ConfigError."""
    if text is None:
        return {}
    try:
        value = parse(text.encode(errors="replace"))
    except LineInvalid as error:
        raise ConfigError(f"{doing}: {error}; give an object of JSON") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{doing}: found {kind_of(value)}, expected an object; give fields of a request's body")
    if own := [name for name in ("custom_id", "prompt", "messages") if name in value]:
        raise ConfigError(f"{doing}: found {own[0]}, which each line has for itself; leave it out")
    if value.get("stream"):
        raise ConfigError(f"{doing}: stream is true, expected a whole answer; leave it out")
    model = value.get("model", "x")
    if not isinstance(model, str) or not model:
        raise ConfigError(f"{doing}: model is {shown(model)}, expected a name")
    return value
