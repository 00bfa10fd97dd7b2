"""Reads certificates and private keys from PEM files and checks them before anything is started or sent.

Each function raises TlsError, which names the file, what was found and what to do. The kinds of keys that gRPC takes
were tried with Triton 2.51: with an RSA key of 1,024 bits the server ends at its start, and with Ed25519, P-521 and
secp256k1 every handshake fails.
"""

from __future__ import annotations

import ipaddress
import itertools
import logging
import re
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from export.errors import named, names
from export.files.reading import read_bytes
from export.optional import optional_package
from triton_repo.errors import TlsError

if TYPE_CHECKING:
    from types import ModuleType

    from cryptography.hazmat.primitives.asymmetric.types import PrivateKeyTypes
    from cryptography.x509 import Certificate, ObjectIdentifier

logger = logging.getLogger(__name__)

MOST_BYTES = 1 << 20
WARNED_DAYS = 30
LEAST_RSA_BITS = 2048
CURVES = ("secp256r1", "secp384r1")
_CERTIFICATE = b"-----BEGIN CERTIFICATE-----"
_KEY = re.compile(rb"-----BEGIN ((?:[A-Z]+ )?PRIVATE KEY)-----.*?-----END \1-----", re.S)


def require_x509() -> ModuleType:
    """`cryptography.x509`. Raises MissingPackageError."""
    with optional_package("cryptography", "checking certificates", "client"):
        from cryptography import x509
    return x509


def read_certificates(path: Path, what: str) -> tuple[Certificate, ...]:
    """The certificates of a PEM file, in the file's order. `what` is the file's meaning, such as "the server's
    certificate"."""
    x509 = require_x509()
    data = read_bytes(path, what, most=MOST_BYTES, error=TlsError)
    if _CERTIFICATE not in data:
        found = "a private key" if _KEY.search(data) else "no PEM block -----BEGIN CERTIFICATE-----"
        remedy = (
            "name the certificate here and the key where the key belongs"
            if _KEY.search(data)
            else "name another file, or convert this one: openssl x509 -inform der -in FILE -out FILE.pem"
        )
        raise TlsError(f"reading {what}: {named(path)} holds {found}, expected a certificate in PEM; {remedy}")
    try:
        whole = tuple(x509.load_pem_x509_certificates(data))
    except ValueError as error:
        raise TlsError(
            f"reading {what}: {named(path)} holds a certificate that cannot be read ({error}); write the file again"
        ) from error
    if (begun := data.count(_CERTIFICATE)) > len(whole):  # gRPC would leave out what is cut off
        raise TlsError(
            f"reading {what}: {named(path)} holds {begun} beginnings of certificates and {len(whole)} whole ones, so "
            "that one was cut off; write the file again"
        )
    return whole


def read_key(path: Path, what: str) -> PrivateKeyTypes:
    """The private key of a PEM file. Warns where other users of the machine can read the file."""
    require_x509()
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    data = read_bytes(path, what, most=MOST_BYTES, error=TlsError)
    block = _KEY.search(data)
    if block is None:
        raise TlsError(
            f"reading {what}: {named(path)} holds no PEM block -----BEGIN PRIVATE KEY-----, expected a private key; "
            "name the file that was made with the certificate"
        )
    try:
        key = load_pem_private_key(block[0], password=None)
    except TypeError as error:
        raise TlsError(
            f"reading {what}: {named(path)} is encrypted, expected a key without a passphrase, which nobody could "
            "enter; decrypt it: openssl pkey -in FILE -out PLAIN"
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise TlsError(
            f"reading {what}: {named(path)} holds a key that cannot be read ({str(error).splitlines()[0]}); write the "
            "file again"
        ) from error
    if path.stat().st_mode & 0o004:
        logger.warning("%s can be read by every user of this machine; forbid it: chmod o-rwx %s", path, path)
    return key


def check_pair(
    chain: Sequence[Certificate], key: PrivateKeyTypes, cert_file: Path, key_file: Path, *, is_server: bool
) -> None:
    """Check a certificate with its key: that the key fits, is of a kind that gRPC takes, that each certificate of the
    chain is in force and signed by the next, and that the first is for this use. Warns of one that ends soon."""
    what = "the server's certificate" if is_server else "the client's certificate"
    doing, leaf = f"checking {what} {named(cert_file)}", chain[0]
    if leaf.public_key() != key.public_key():
        fits = next((n for n, other in enumerate(chain, 1) if other.public_key() == key.public_key()), None)
        if fits:
            raise TlsError(
                f"{doing}: the key {named(key_file)} fits certificate {fits} of the file, expected the first; put the "
                "certificate of this key first and its issuers after it"
            )
        raise TlsError(
            f"{doing}: the key {named(key_file)} does not fit it; name the key that the certificate was made with"
        )
    _check_kind(key, f"{doing}: the key {named(key_file)}")
    for number, certificate in enumerate(chain, 1):
        place = "it" if number == 1 else f"certificate {number} of the file ({_name_of(certificate)})"
        check_dates(certificate, doing, place)
    _check_chain(chain, doing)
    _check_use(leaf, doing, is_server=is_server)
    left = leaf.not_valid_after_utc - datetime.now(UTC)
    if left < timedelta(days=WARNED_DAYS):
        logger.warning("%s %s ends in %d days, on %s; renew it", what, cert_file, left.days, _date(leaf))


def check_authorities(certificates: Sequence[Certificate], path: Path, what: str) -> None:
    """Check that one of the certificates that are to be trusted is in force."""
    now = datetime.now(UTC)
    if not any(one.not_valid_before_utc <= now <= one.not_valid_after_utc for one in certificates):
        check_dates(certificates[0], f"checking {what} {named(path)}", _name_of(certificates[0]))


def check_dates(certificate: Certificate, doing: str, place: str) -> None:
    """Refuse a certificate that is not in force."""
    now = datetime.now(UTC)
    if now > certificate.not_valid_after_utc:
        raise TlsError(f"{doing}: {place} expired on {_date(certificate)}; renew it")
    if now < certificate.not_valid_before_utc:
        raise TlsError(
            f"{doing}: {place} is not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC, and the "
            f"clock of this machine says {now:%Y-%m-%d %H:%M}; set the clock, or wait"
        )


def names_of(certificate: Certificate) -> tuple[str, ...]:
    """The DNS names and addresses that a certificate is for (its subject alternative names). Clients read no other
    field (RFC 9525, 6.3)."""
    x509 = require_x509()
    try:
        found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    except x509.ExtensionNotFound:
        return ()
    addresses = map(str, found.get_values_for_type(x509.IPAddress))
    return (*found.get_values_for_type(x509.DNSName), *addresses)


def covers(names: Sequence[str], host: str) -> bool:
    """Whether a certificate for these names is one for `host`, a DNS name or an address. A wildcard stands for the
    first label of a name (RFC 9525, 6.3)."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        asked = host.lower().rstrip(".")
        wild = f"*.{asked.partition('.')[2]}"
        return any(name.lower() in (asked, wild) for name in names)
    return str(address) in names


def _check_kind(key: PrivateKeyTypes, doing: str) -> None:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey

    if isinstance(key, RSAPrivateKey):
        found, is_taken = f"RSA of {key.key_size} bits", key.key_size >= LEAST_RSA_BITS
    elif isinstance(key, EllipticCurvePrivateKey):
        found, is_taken = key.curve.name, key.curve.name in CURVES
    else:
        found, is_taken = type(key).__name__.removesuffix("PrivateKey"), False
    if not is_taken:
        raise TlsError(
            f"{doing} is {found}, which gRPC does not take; make one of RSA with {LEAST_RSA_BITS} bits or more, of "
            f"P-256 or of P-384"
        )


def _check_chain(chain: Sequence[Certificate], doing: str) -> None:
    for number, (certificate, issuer) in enumerate(itertools.pairwise(chain), 1):
        try:
            certificate.verify_directly_issued_by(issuer)
        except Exception as error:
            # ValueError for another name, TypeError for a kind of key, InvalidSignature
            raise TlsError(
                f"{doing}: certificate {number} of the file is signed by {_text(certificate.issuer)}, and certificate "
                f"{number + 1} is {_name_of(issuer)}; put the server's own first, then its issuer, then that one's"
            ) from error


def _check_use(leaf: Certificate, doing: str, *, is_server: bool) -> None:
    x509 = require_x509()
    from cryptography.x509.oid import ExtendedKeyUsageOID

    use = "servers (serverAuth)" if is_server else "clients (clientAuth)"
    wanted: ObjectIdentifier = ExtendedKeyUsageOID.SERVER_AUTH if is_server else ExtendedKeyUsageOID.CLIENT_AUTH
    try:
        usages = leaf.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    except x509.ExtensionNotFound:
        usages = None
    if usages is not None and wanted not in usages and ExtendedKeyUsageOID.ANY_EXTENDED_KEY_USAGE not in usages:
        found = names(usage._name for usage in usages)
        raise TlsError(
            f"{doing}: its extended key usage is {found}, expected one for {use}; have it issued with that usage"
        )
    if is_server and not names_of(leaf):
        raise TlsError(
            f"{doing}: it has no subject alternative name, so that every client refuses it, whatever its common name "
            "says; have it issued with the names and addresses that clients use"
        )


def _name_of(certificate: Certificate) -> str:
    return _text(certificate.subject)


def _text(name: object) -> str:
    return named(name.rfc4514_string(), 80)  # type: ignore[attr-defined]


def _date(certificate: Certificate) -> str:
    return f"{certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC"
