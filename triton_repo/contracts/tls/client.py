"""How a client encrypts what it sends: files in, channels of gRPC and contexts of `ssl` out.

tls = ClientTls(ca=Path("ca.pem"))                                                # check the server
tls = ClientTls(ca=Path("ca.pem"), cert=Path("me.pem"), key=Path("me.key"))       # and show who asks (mutual TLS)
tls.load().channel(grpc, "models.example:8001", options=())
"""

from __future__ import annotations

import ssl
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from triton_repo.contracts.tls.certificates import check_authorities, check_pair, read_certificates, read_key
from triton_repo.errors import TlsError

if TYPE_CHECKING:
    from types import ModuleType

    import grpc

    Options = Sequence[tuple[str, object]]

CA = "the authority's certificate"
CERT = "the client's certificate"
KEY = "the client's key"
_SERVER_NAME_OPTION = "grpc.ssl_target_name_override"


@dataclass(frozen=True, kw_only=True)
class Credentials:
    """What gRPC needs of TLS, in PEM."""

    ca: bytes | None = None  # None: the public authorities that gRPC knows
    cert: bytes | None = None
    key: bytes | None = None
    server_name: str | None = None

    def channel(self, library: ModuleType, url: str, options: Options) -> grpc.Channel | grpc.aio.Channel:
        """An encrypted channel of `grpc` or `grpc.aio`."""
        import grpc

        named = ((_SERVER_NAME_OPTION, self.server_name),) if self.server_name else ()
        credentials = grpc.ssl_channel_credentials(self.ca, self.key, self.cert)
        return library.secure_channel(url, credentials, options=(*options, *named))


@dataclass(frozen=True, kw_only=True)
class ClientTls:
    """PEM files of a client. Without any the server's certificate must be of a public authority."""

    ca: Path | None = None  # certificates of the authorities that may have signed the server's
    cert: Path | None = None  # what the client shows to a server that asks for it, then its issuers
    key: Path | None = None
    server_name: str | None = None  # which the server's certificate must have instead of the host in the URL

    def load(self) -> Credentials:
        """Read and check the files. Raises TlsError, and MissingPackageError without the package `cryptography`."""
        if (self.cert is None) != (self.key is None):
            given, absent = ("certificate", "key") if self.key is None else ("key", "certificate")
            raise TlsError(f"reading the client's {given}: found no {absent} beside it; give both, or neither")
        if self.ca is not None:
            check_authorities(read_certificates(self.ca, CA), self.ca, CA)
        if self.cert is not None and self.key is not None:
            chain, key = read_certificates(self.cert, CERT), read_key(self.key, KEY)
            check_pair(chain, key, self.cert, self.key, is_server=False)
        return Credentials(
            ca=self.ca.read_bytes() if self.ca else None,
            cert=self.cert.read_bytes() if self.cert else None,
            key=self.key.read_bytes() if self.key else None,
            server_name=self.server_name,
        )

    def context(self) -> ssl.SSLContext:
        """The same for the module `ssl`, for HTTPS. Raises TlsError."""
        self.load()
        context = ssl.create_default_context(cafile=self.ca)
        context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN  # as gRPC: what is named is trusted, a root or not
        if self.cert is not None:
            context.load_cert_chain(self.cert, self.key)
        return context
