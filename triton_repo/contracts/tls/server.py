"""What a server needs for TLS: the files that an operator names, checked, and how moeship itself asks the server.

With mutual TLS the server takes only clients with a certificate of the operator's authority. For its own probes moeship
makes a certificate whose key never leaves its memory, and the server trusts that one too.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
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
from triton_repo.contracts.tls.client import Credentials
from triton_repo.errors import TlsError

if TYPE_CHECKING:
    from cryptography.x509 import Certificate

logger = logging.getLogger(__name__)

CERT = "the server's certificate"
KEY = "the server's key"
CLIENT_CA = "the certificate of the clients' authority"
_TRUSTED_FILE = "client-ca.pem"
_PROBE_YEARS = 20  # a server may run for as long


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
    probe: Credentials
    ends: datetime  # after this no client takes the server's certificate


def check_server_tls(tls: ServerTls, host: str, workspace: Path) -> CheckedTls:
    """Check the files for a server that listens on `host`. Writes to `workspace`, which only this user may enter.
    Raises TlsError, and MissingPackageError without the package `cryptography`."""
    own = check_server_pair(tls, host)
    served = names_of(own)
    # The server's own certificate is all that the probes trust, by one of its own names.
    probe = Credentials(ca=_pem(own), server_name=served[0].replace("*", "probe"))
    trusted = None
    if tls.client_ca is not None:
        authorities = read_certificates(tls.client_ca, CLIENT_CA)
        check_authorities(authorities, tls.client_ca, CLIENT_CA)
        cert, private = _probe_pair()
        probe = Credentials(ca=probe.ca, server_name=probe.server_name, cert=cert, key=private)
        trusted = workspace / _TRUSTED_FILE
        trusted.write_bytes(b"".join([*map(_pem, authorities), cert]))
    return CheckedTls(
        cert=tls.cert.resolve(),
        key=tls.key.resolve(),
        trusted=trusted,
        probe=probe,
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


def _probe_pair() -> tuple[bytes, bytes]:
    """A certificate that signs itself, and its key."""
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
        .not_valid_after(now + timedelta(days=365 * _PROBE_YEARS))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    return _pem(certificate), private


def _pem(certificate: Certificate) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return certificate.public_bytes(Encoding.PEM)
