"""The flags of every command that talks to a server which may encrypt."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from triton_repo.contracts.tls.client import ClientTls


def add_tls_arguments(parser: argparse.ArgumentParser, prefix: str = "") -> None:
    """Add the flags that `read_client_tls` reads. `prefix` is for a command that has a certificate of its own too."""
    tls = parser.add_argument_group("TLS of the connection to the server", "any of these encrypts it")
    flag = f"--{prefix}tls"
    tls.add_argument(flag, action="store_true", help="the server's certificate is of a public authority")
    tls.add_argument(
        f"{flag}-ca", type=Path, metavar="FILE", help="certificate of the authority that signed the server's (PEM)"
    )
    tls.add_argument(
        f"{flag}-cert", type=Path, metavar="FILE", help="the client's own certificate, for mutual TLS (PEM)"
    )
    tls.add_argument(f"{flag}-key", type=Path, metavar="FILE", help="the client's private key (PEM)")
    tls.add_argument(
        f"{flag}-server-name", metavar="NAME", help="name that the server's certificate has instead of the address's"
    )


def read_client_tls(arguments: argparse.Namespace, prefix: str = "") -> ClientTls | None:
    """How to encrypt; None where no flag of TLS is given."""
    from triton_repo.contracts.tls.client import ClientTls

    name = f"{prefix.replace('-', '_')}tls"
    files = {key: getattr(arguments, f"{name}_{key}") for key in ("ca", "cert", "key", "server_name")}
    if not getattr(arguments, name) and all(each is None for each in files.values()):
        return None
    return ClientTls(**files)
