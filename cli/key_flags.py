"""The flags of every command that sends an API key to servers over HTTP."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from export.errors import ConfigError, named


def add_key_arguments(group: argparse._ArgumentGroup) -> None:
    """Add the flags that `read_api_key` reads. A key itself is no flag: every user of a machine sees its commands."""
    one = group.add_mutually_exclusive_group()
    one.add_argument(
        "--api-key", type=Path, metavar="FILE", help="file with the key that servers over HTTP want (Bearer)"
    )
    one.add_argument("--api-key-env", metavar="NAME", help="environment variable with that key instead")


def read_api_key(arguments: argparse.Namespace, urls: Sequence[str]) -> str | None:
    """The key to send; None where no flag names one. A file may have blank lines and lines that begin with #, as the
    gateway's has, and must have one key. Raises ConfigError, also where none of `urls` is of HTTP."""
    if arguments.api_key is not None:
        flag, where = "--api-key", named(arguments.api_key)
        found = _keys_of(arguments.api_key)
    elif arguments.api_key_env is not None:
        flag, where = "--api-key-env", f"the variable {arguments.api_key_env}"
        if arguments.api_key_env not in os.environ:
            raise ConfigError(f"reading the API key: {where} of {flag} is not set")
        found = [os.environ[arguments.api_key_env].strip()]
    else:
        return None
    if len(found) != 1:
        raise ConfigError(f"reading the API key in {where}: found {len(found)} keys, expected one")
    (key,) = found
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise ConfigError(f"reading the API key in {where}: expected printable ASCII without spaces")
    if not any(url.startswith(("http://", "https://")) for url in urls):
        raise ConfigError(
            f"reading the API key in {where}: {flag} is for servers over HTTP, and {urls[0]} is gRPC's; leave it out, "
            "or name http://HOST:PORT. Over gRPC a client shows a certificate (--tls-cert)"
        )
    return key


def _keys_of(path: Path) -> list[str]:
    from export.files.reading import read_text

    lines = (line.strip() for line in read_text(path, "the API key", error=ConfigError).splitlines())
    return [line for line in lines if line and not line.startswith("#")]
