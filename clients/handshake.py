"""Finds out why a connection failed where TLS may be the reason, by a handshake of its own.

gRPC reports many of these failures as "Socket closed". `ssl` says what was wrong with the server's certificate. In TLS
1.3 a server refuses a client's only after the client's handshake, so one byte is read then. A gRPC server that takes
the client speaks first; one that refuses it closes the connection without an alert (seen with Triton 2.51).
"""

from __future__ import annotations

import socket
import ssl

from triton_repo.contracts.tls.client import ClientTls

PATIENCE_S = 3.0
_NOT_TLS = ("WRONG_VERSION_NUMBER", "RECORD_LAYER_FAILURE")  # what OpenSSL makes of an answer that is no TLS
_NEEDS_TLS = (
    "the server takes encrypted connections only, and this client does not encrypt; give it the certificate of the "
    "authority that signed the server's (--tls-ca FILE, in Python tls=ClientTls(ca=...))"
)
_HAS_NO_TLS = "the server takes no encrypted connections; leave the flags of TLS out, or start it with --tls-cert"
_WITHOUT_CERTIFICATE = "the server serves only clients with a certificate; give --tls-cert and --tls-key"
_WITH_CERTIFICATE = (
    "the server does not take the client's certificate; it must be signed by an authority of the server's "
    "--tls-client-ca, be for clients (clientAuth) and be in force"
)


def handshake_fault(url: str, tls: ClientTls | None) -> str | None:
    """What is wrong with TLS at HOST:PORT, and what to do; None where TLS is not what keeps a client from it."""
    host, _, port = url.rpartition(":")
    host = host.strip("[]")
    context = tls.context() if tls else _trusting()
    context.set_alpn_protocols(["h2"])
    name = (tls.server_name if tls else None) or host
    try:
        with socket.create_connection((host, int(port)), PATIENCE_S) as plain:
            return _shake(context, plain, name, tls)
    except OSError:
        return None


def _shake(context: ssl.SSLContext, plain: socket.socket, name: str, tls: ClientTls | None) -> str | None:
    refused = _WITH_CERTIFICATE if tls and tls.cert else _WITHOUT_CERTIFICATE
    try:
        with context.wrap_socket(plain, server_hostname=name) as wrapped:
            if tls is None:
                return _NEEDS_TLS
            return None if wrapped.recv(1) else refused
    except ssl.SSLCertVerificationError as error:
        return (
            f"the server's certificate is not accepted: {error.verify_message.rstrip('.')}; check --tls-ca, and that "
            "the certificate is for the host of the address (else --tls-server-name)"
        )
    except ssl.SSLError as error:
        reason = error.reason or "no reason"
        if tls is None:
            return None
        if "CERTIFICATE" in reason or reason.endswith("UNKNOWN_CA"):  # an alert of the server
            return f"{refused} ({reason})"
        return _HAS_NO_TLS if reason in _NOT_TLS else f"the handshake of TLS failed: {reason}"


def _trusting() -> ssl.SSLContext:
    """A context for a handshake over which nothing is sent."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context
