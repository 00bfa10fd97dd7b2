"""Makes certificates for tests: an authority, and certificates that it issues."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.types import CertificateIssuerPrivateKeyTypes
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

LOOPBACK_NAMES = ("127.0.0.1", "localhost")


@dataclass(frozen=True)
class Pair:
    """A certificate with its key, as files too."""

    certificate: x509.Certificate
    key: CertificateIssuerPrivateKeyTypes
    cert_file: Path
    key_file: Path


def issue(
    folder: Path,
    name: str,
    issuer: Pair | None = None,
    *,
    is_authority: bool = False,
    names: tuple[str, ...] = LOOPBACK_NAMES,
    days: tuple[float, float] = (-1, 365),
    usages: tuple[x509.ObjectIdentifier, ...] = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH),
    key: CertificateIssuerPrivateKeyTypes | None = None,
) -> Pair:
    """A certificate that `issuer` signs, or itself where there is none. It is valid from `days[0]` to `days[1]` after
    today. Its files are NAME.pem and NAME.key, which only the owner can read."""
    key = key or ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer.certificate.subject if issuer else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now + timedelta(days=days[0]))
        .not_valid_after(now + timedelta(days=days[1]))
        .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
    )
    if names and not is_authority:
        builder = builder.add_extension(x509.SubjectAlternativeName(list(map(_general_name, names))), critical=False)
    if usages and not is_authority:
        builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    certificate = builder.sign(issuer.key if issuer else key, hashes.SHA256())
    pair = Pair(certificate, key, folder / f"{name}.pem", folder / f"{name}.key")
    pair.cert_file.write_bytes(pem_of(certificate))
    pair.key_file.touch(mode=0o600)
    pair.key_file.write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        )
    )  # fmt: skip
    return pair


def pem_of(certificate: x509.Certificate) -> bytes:
    return certificate.public_bytes(serialization.Encoding.PEM)


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ipaddress.ip_address(name))
    except ValueError:
        return x509.DNSName(name)
