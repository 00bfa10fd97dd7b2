"""What a server needs for TLS: the files that an operator names, checked, and how moeship itself asks the server.

With mutual TLS the server takes only clients with a certificate of the operator's authority. For its own probes, and
for a gateway beside the server, moeship makes a certificate in the server's private folder. The server trusts it too.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from export.errors import named, names
from triton_repo.contracts.tls.certificates import (
    check_authorities,
    check_pair,
    covers,
    names_of,
    read_certificates,
    read_key,
    require_x509,
)
from triton_repo.contracts.tls.client import ClientTls
from triton_repo.errors import TlsError

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

logger = logging.getLogger(__name__)

CERT = "the server's certificate"
KEY = "the server's key"
CLIENT_CA = "the certificate of the clients' authority"
_SERVER_FILE, _CLIENT_FILE, _KEY_FILE, _TRUSTED_FILE = "server.pem", "client.pem", "client.key", "client-ca.pem"
_CLIENT_YEARS = 20  # a server may run for as long


@dataclass(frozen=True, kw_only=True)
class ServerTls:
    """PEM files of a server."""

    cert: Path  # the server's own certificate, then its issuers
    key: Path
    client_ca: Path | None = None  # mutual TLS: only clients that one of these authorities certified are served


@dataclass(frozen=True, kw_only=True)
class CheckedTls:
    """Files that were checked, and how this machine asks the server that uses them."""

    cert: Path
    key: Path
    trusted: Path | None  # the authorities of clients and the probes' own certificate; None without mutual TLS
    own: ClientTls  # of this machine's own clients: probes, and a gateway
    ends: datetime  # after this no client takes the server's certificate


def check_server_tls(tls: ServerTls, host: str, workspace: Path) -> CheckedTls:
    """Check the files for a server that listens on `host`. Writes to `workspace`, which only this user may enter.
    Raises TlsError, and MissingPackageError without the package `cryptography`."""
    own = check_server_pair(tls, host)
    served = names_of(own)
    # Its own certificate is all that its probes trust, by one of its names.
    pinned, trusted = workspace / _SERVER_FILE, None
    pinned.write_bytes(_pem(own))
    client = ClientTls(ca=pinned, server_name=served[0].replace("*", "probe"))
    if tls.client_ca is not None:
        authorities = read_certificates(tls.client_ca, CLIENT_CA)
        check_authorities(authorities, tls.client_ca, CLIENT_CA)
        client = replace(client, cert=workspace / _CLIENT_FILE, key=workspace / _KEY_FILE)
        if not (workspace / _CLIENT_FILE).exists():  # a gateway goes on with the pair when the server is started again
            _make_pair(workspace / _CLIENT_FILE, workspace / _KEY_FILE)
        trusted = workspace / _TRUSTED_FILE
        trusted.write_bytes(b"".join([*map(_pem, authorities), (workspace / _CLIENT_FILE).read_bytes()]))
    return CheckedTls(
        cert=tls.cert.resolve(),
        key=tls.key.resolve(),
        trusted=trusted,
        own=client,
        ends=own.not_valid_after_utc,
    )


def check_server_pair(tls: ServerTls, host: str) -> Certificate:
    """Check the certificate and the key of a server that listens on `host`. Returns the certificate. Raises as
    `check_server_tls`."""
    chain, key = read_certificates(tls.cert, CERT), read_key(tls.key, KEY)
    check_pair(chain, key, tls.cert, tls.key, is_server=True)
    _check_host(names_of(chain[0]), host, tls.cert)
    return chain[0]


def _check_host(served: tuple[str, ...], host: str, path: Path) -> None:
    """A name that the server listens on is one that clients use. An address may be one behind a proxy or a DNS name."""
    if host in ("0.0.0.0", "::", "localhost") or covers(served, host):
        return
    if any(letter.isalpha() for letter in host) and ":" not in host:
        raise TlsError(
            f"checking {CERT} {named(path)}: it is for {names(served)}, and the server listens on {named(host)}, so "
            "that clients that use this name refuse it; have it issued for this name, or give --host the address"
        )
    logger.warning("%s %s is for %s: clients that connect to %s refuse it", CERT, path, names(served), host)


def _make_pair(cert_file: Path, key_file: Path) -> None:
    """Write a certificate that signs itself, and its key, which only this user can read."""
    x509 = require_x509()
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "moeship serve")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))  # a clock may be set back
        .not_valid_after(now + timedelta(days=365 * _CLIENT_YEARS))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    key_file.touch(mode=0o600)
    key_file.write_bytes(private)
    cert_file.write_bytes(_pem(certificate))


def _pem(certificate: Certificate) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return certificate.public_bytes(Encoding.PEM)
