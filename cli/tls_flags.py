"""The flags of every command that talks to a server which may encrypt."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from triton_repo.contracts.tls.client import ClientTls


def add_tls_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `read_client_tls` reads."""
    tls = parser.add_argument_group("TLS", "any of these encrypts the connection")
    tls.add_argument("--tls", action="store_true", help="the server's certificate is of a public authority")
    tls.add_argument(
        "--tls-ca", type=Path, metavar="FILE", help="certificate of the authority that signed the server's (PEM)"
    )
    tls.add_argument("--tls-cert", type=Path, metavar="FILE", help="the client's own certificate, for mutual TLS (PEM)")
    tls.add_argument("--tls-key", type=Path, metavar="FILE", help="the private key of --tls-cert (PEM)")
    tls.add_argument(
        "--tls-server-name", metavar="NAME", help="name that the server's certificate has, if not that of the address"
    )


def read_client_tls(arguments: argparse.Namespace) -> ClientTls | None:
    """How to encrypt; None where no flag of TLS is given."""
    from triton_repo.contracts.tls.client import ClientTls

    files = (arguments.tls_ca, arguments.tls_cert, arguments.tls_key, arguments.tls_server_name)
    if not arguments.tls and all(each is None for each in files):
        return None
    ca, cert, key, server_name = files
    return ClientTls(ca=ca, cert=cert, key=key, server_name=server_name)
