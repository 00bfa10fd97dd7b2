"""Serve OpenAI's HTTP API over one or several Tritons that serve moeship's models.

Prints the address once it listens. The models are those that are ready on the Tritons. Their tokenizers and chat
templates, which chats, token ids and log-probabilities need, are read from the model repository or from --tokenizer.
Ctrl-C and SIGTERM let the answers in progress end; a second one ends them at once.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import signal
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from cli.tls_flags import add_tls_arguments, read_client_tls
from export.errors import ConfigError

if TYPE_CHECKING:
    from clients.gateway.settings import Keys, Settings

logger = logging.getLogger(__name__)

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_MEGABYTE = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--triton", nargs="+", required=True, metavar="HOST:PORT", help="gRPC addresses of the servers")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default %(default)s: this machine)")
    parser.add_argument("--port", type=int, default=8080, help="port to listen on; 0 is any free one (default 8080)")
    texts = parser.add_argument_group("texts")
    texts.add_argument("--repository", type=Path, metavar="DIR", help="the model repository that the servers serve")
    texts.add_argument(
        "--tokenizer", action="append", default=[], metavar="[MODEL=]DIR",
        help="an engine's or a checkpoint's folder with the tokenizer of a model, or of all; may be repeated",
    )  # fmt: skip
    texts.add_argument(
        "--chat-template", type=Path, metavar="FILE", help="a Jinja template to use in place of the models' own"
    )
    access = parser.add_argument_group("access and limits")
    access.add_argument("--api-keys", type=Path, metavar="FILE", help="keys that clients must give, one a line")
    access.add_argument("--tls-cert", type=Path, metavar="FILE", help="listen for HTTPS, with this PEM certificate")
    access.add_argument("--tls-key", type=Path, metavar="FILE", help="its private key")
    add_tls_arguments(parser, "triton-")
    access.add_argument(
        "--max-body-mb", type=float, default=4, metavar="N", help="megabytes of a request (default %(default)g)"
    )
    access.add_argument(
        "--max-requests", type=int, default=512, metavar="N",
        help="requests in flight; more are refused with 429 (default %(default)s)",
    )  # fmt: skip
    access.add_argument(
        "--deadline", type=float, default=600, metavar="S", help="seconds that an answer may take (default %(default)g)"
    )
    access.add_argument(
        "--drain-timeout", type=float, default=30, metavar="S",
        help="seconds for answers to end after a request to stop (default %(default)g)",
    )  # fmt: skip
    parser.add_argument(
        "--request-log", type=Path, metavar="FILE",
        help="append a line of JSON for each request that has ended to a file; - is stdout",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="print the address as one line of JSON")


def run(arguments: argparse.Namespace) -> int:
    """Serve until a signal asks to stop; returns 0. Raises ConfigError, ListenError and MissingPackageError."""
    from clients.gateway.app import create_app
    from clients.gateway.request_log import logged_requests
    from clients.gateway.server import Listening, serve

    settings = read_settings(arguments)
    if arguments.host not in _LOOPBACK and not settings.keys.digests:
        logger.warning("anyone who reaches %s may use this gateway; give --api-keys FILE", arguments.host)
    listening = Listening(
        host=arguments.host,
        port=arguments.port,
        drain_s=arguments.drain_timeout,
        certificate=arguments.tls_cert,
        private_key=arguments.tls_key,
    )
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        with logged_requests(arguments.request_log):
            serve(create_app(settings), listening, lambda url: _say(url, as_json=arguments.json))
    except KeyboardInterrupt:
        logger.info("the gateway has stopped")
    finally:
        signal.signal(signal.SIGTERM, previous)
    return 0


def read_settings(arguments: argparse.Namespace) -> Settings:
    """The gateway's settings in the flags. Raises ConfigError, AddressInvalid for an address of a Triton, and TlsError
    for certificates that cannot be used."""
    from clients.gateway.settings import Limits, Settings
    from clients.generation import check_address
    from triton_repo.contracts.tls.server import ServerTls, check_server_pair

    for url in arguments.triton:
        check_address(url)
    numbers = {"--max-body-mb": arguments.max_body_mb, "--max-requests": arguments.max_requests,
               "--deadline": arguments.deadline, "--drain-timeout": arguments.drain_timeout}  # fmt: skip
    for name, value in numbers.items():
        if not 0 < value < math.inf:
            raise ConfigError(f"reading the gateway's settings: {name} is {value}, expected a finite number above 0")
    if (arguments.tls_cert is None) != (arguments.tls_key is None):
        raise ConfigError("reading the gateway's settings: found one of --tls-cert and --tls-key, expected both")
    if arguments.tls_cert is not None:
        check_server_pair(ServerTls(cert=arguments.tls_cert, key=arguments.tls_key), arguments.host)
    return Settings(
        tritons=tuple(arguments.triton),
        repository=_folder("--repository", arguments.repository),
        tokenizers=_tokenizers(arguments.tokenizer),
        chat_template=arguments.chat_template,
        keys=read_files(arguments),
        limits=Limits(
            body_bytes=round(arguments.max_body_mb * _MEGABYTE),
            answer_s=arguments.deadline,
            in_flight=arguments.max_requests,
        ),
        tls=read_client_tls(arguments, "triton-"),
    )


def _tokenizers(texts: list[str]) -> dict[str, Path]:
    """Model to folder; the name "" is for all models."""
    found: dict[str, Path] = {}
    for text in texts:
        model, separator, folder = text.rpartition("=") if not Path(text).is_dir() else ("", "", text)
        if separator and not model:
            raise ConfigError(f"reading --tokenizer {text}: found no model before the =; give MODEL=DIR or DIR")
        path = _folder("--tokenizer", Path(folder))
        if path is not None:
            found[model] = path
    return found


def read_files(arguments: argparse.Namespace) -> Keys:
    """The API keys. Raises ConfigError for those, and for a chat template that cannot be read or is no Jinja, which no
    request would get past."""
    from clients.gateway.settings import Keys, read_keys
    from clients.gateway.texts import read_template
    from export.tokenizer.chat_template import ChatTemplate, TemplateError

    path = arguments.chat_template
    if path is not None:
        try:
            ChatTemplate(read_template(path), {}, extra="gateway")
        except TemplateError as error:
            raise ConfigError(f"reading --chat-template {path}: {error}; mend the template") from error
    return Keys() if arguments.api_keys is None else read_keys(arguments.api_keys)


def _folder(flag: str, path: Path | None) -> Path | None:
    if path is not None and not path.is_dir():
        raise ConfigError(f"reading {flag} {path}: there is no such folder; give the right one")
    return path


def _say(url: str, *, as_json: bool) -> None:
    places = {"openai": f"{url}/v1", "page": f"{url}/"}
    lines = [json.dumps(places)] if as_json else [f"{name:<8} {place}" for name, place in places.items()]
    print("\n".join(lines), flush=True)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt
