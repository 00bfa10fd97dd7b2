"""What whoever starts a gateway chooses, checked before it starts."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from export.errors import ConfigError, named
from export.files.reading import read_text
from triton_repo.contracts.tls.client import ClientTls

MOST_KEYS = 10_000
_MOST_KEY_BYTES = 1 << 20  # of the file
_LEAST_KEY, _MOST_KEY = 16, 512  # characters of one key


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may take. Bytes, seconds and numbers."""

    body_bytes: int = 4 << 20
    body_s: float = 30.0  # for a body to arrive
    answer_s: float = 600.0  # from the request until its last token
    unread_s: float = 60.0  # how long a client may leave its connection unread before its answer is ended
    in_flight: int = 512  # requests at a time; more are refused with 429
    prompts: int = 128  # of one request for completions
    prompts_at_once: int = 8  # of one request that are sent before the first of them is answered


@dataclass(frozen=True, kw_only=True)
class Keys:
    """The digests of the keys that clients may give. Without any, no key is asked for."""

    digests: tuple[bytes, ...] = ()

    def place(self, key: str) -> int | None:
        """The place of a key in the file, from 1 on; None for a key that is not in it. Each comparison takes the same
        time, whether or where the key is found, since digests of equal length are compared and none is skipped."""
        digest = _digest(key)
        found = None
        for place, known in enumerate(self.digests, 1):
            if hmac.compare_digest(digest, known):
                found = place
        return found


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Everything that an app needs. `tokenizers`: model to the folder of its tokenizer; the name "" is for all."""

    tritons: tuple[str, ...]  # HOST:PORT of gRPC
    repository: Path | None = None  # the model repository that the Tritons serve, for tokenizers and templates
    tokenizers: Mapping[str, Path] = field(default_factory=dict)
    chat_template: Path | None = None  # in place of the models' own
    keys: Keys = field(default_factory=Keys)
    limits: Limits = field(default_factory=Limits)
    tls: ClientTls | None = None  # of the connections to the Tritons


def read_keys(path: Path) -> Keys:
    """The keys in a file: one a line, without blank lines and lines that begin with #. Raises ConfigError."""
    lines = [line.strip() for line in read_text(path, "the API keys", most=_MOST_KEY_BYTES).splitlines()]
    keys = [line for line in lines if line and not line.startswith("#")]
    where = f"reading the API keys of {named(path)}"
    if not keys:
        raise ConfigError(f"{where}: found none, expected one a line; write keys, or leave --api-keys out")
    if len(keys) > MOST_KEYS:
        raise ConfigError(f"{where}: found {len(keys)}, expected at most {MOST_KEYS}; remove those that nobody uses")
    for place, key in enumerate(keys, 1):
        if not _LEAST_KEY <= len(key) <= _MOST_KEY or not key.isascii() or not key.isprintable() or " " in key:
            raise ConfigError(
                f"{where}: key {place} has {len(key)} characters, expected {_LEAST_KEY} to {_MOST_KEY} of printable "
                'ASCII without spaces; make one with: python -c "import secrets; print(secrets.token_urlsafe(32))"'
            )
    if len(set(keys)) < len(keys):
        raise ConfigError(f"{where}: found one key twice, expected each once; remove one of the two lines")
    return Keys(digests=tuple(map(_digest, keys)))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).digest()
