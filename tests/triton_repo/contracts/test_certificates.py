"""Certificates and keys are checked before a server starts or a client sends: each fault is one error."""

from __future__ import annotations

import logging
import socket
import ssl
import threading
from datetime import UTC, datetime, timedelta

import pytest
from certificates import issue, pem_of
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.x509.oid import ExtendedKeyUsageOID

from clients.handshake import handshake_fault
from triton_repo.contracts.tls.certificates import covers
from triton_repo.contracts.tls.client import ClientTls
from triton_repo.contracts.tls.server import ServerTls, check_server_tls
from triton_repo.errors import TlsError
from triton_repo.serving.health import HealthEndpoint, is_live

CLIENT = (ExtendedKeyUsageOID.CLIENT_AUTH,)


@pytest.fixture
def root(tmp_path):
    return issue(tmp_path, "root", is_authority=True)


@pytest.fixture
def server(tmp_path, root):
    return issue(tmp_path, "server", root)


def check(pair, host="127.0.0.1", *, cert=None, key=None, client_ca=None):
    workspace = pair.cert_file.parent / "workspace"
    workspace.mkdir(exist_ok=True)
    tls = ServerTls(cert=cert or pair.cert_file, key=key or pair.key_file, client_ca=client_ca)
    return check_server_tls(tls, host, workspace)


def fault(pair, host="127.0.0.1", **files) -> str:
    with pytest.raises(TlsError) as caught:
        check(pair, host, **files)
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


def test_a_good_pair_is_taken_and_probed_by_its_own_certificate(server, caplog):
    with caplog.at_level(logging.WARNING):
        found = check(server)
    assert caplog.text == ""
    assert (found.cert, found.key, found.trusted) == (server.cert_file, server.key_file, None)
    assert (found.own.load().ca, found.own.cert) == (pem_of(server.certificate), None)
    assert found.own.server_name == "localhost"
    assert found.ends == server.certificate.not_valid_after_utc


def test_with_mutual_tls_the_probes_have_a_certificate_that_the_server_trusts(server, root):
    found = check(server, client_ca=root.cert_file)
    assert found.trusted.read_bytes() == pem_of(root.certificate) + found.own.cert.read_bytes()
    assert found.own.key.stat().st_mode & 0o077 == 0
    assert check(server, client_ca=root.cert_file).own.load() == found.own.load()  # when it is started again


def test_a_key_that_does_not_fit_is_refused(tmp_path, server, root):
    other = issue(tmp_path, "other", root)
    assert "other.key does not fit it" in fault(server, key=other.key_file)


def test_a_key_that_fits_a_later_certificate_is_told(tmp_path, root, server):
    (tmp_path / "turned.pem").write_bytes(pem_of(root.certificate) + pem_of(server.certificate))
    assert "fits certificate 2 of the file, expected the first" in fault(server, cert=tmp_path / "turned.pem")


@pytest.mark.parametrize(
    ("days", "words"), [((-10, -1), "it expired on"), ((1, 10), "it is not valid before")], ids=["expired", "early"]
)
def test_a_certificate_that_is_not_in_force_is_refused(tmp_path, root, days, words):
    assert words in fault(issue(tmp_path, "dated", root, days=days))


def test_an_expired_issuer_in_the_file_is_refused(tmp_path, root):
    middle = issue(tmp_path, "middle", root, is_authority=True, days=(-10, -1))
    server = issue(tmp_path, "of-middle", middle)
    (tmp_path / "chain.pem").write_bytes(pem_of(server.certificate) + pem_of(middle.certificate))
    assert "certificate 2 of the file (CN=middle) expired" in fault(server, cert=tmp_path / "chain.pem")


def test_a_chain_in_another_order_is_refused(tmp_path, root):
    middle = issue(tmp_path, "middle", root, is_authority=True)
    server = issue(tmp_path, "of-middle", middle)
    pem = pem_of(server.certificate) + pem_of(root.certificate) + pem_of(middle.certificate)
    (tmp_path / "chain.pem").write_bytes(pem)
    told = fault(server, cert=tmp_path / "chain.pem")
    assert "certificate 1 of the file is signed by CN=middle, and certificate 2 is CN=root" in told


def test_an_issuer_of_the_right_name_and_another_key_is_refused(tmp_path, root, server):
    folder = tmp_path / "other"
    folder.mkdir()
    same_name = issue(folder, "root", is_authority=True)
    (tmp_path / "chain.pem").write_bytes(pem_of(server.certificate) + pem_of(same_name.certificate))
    assert "certificate 1 of the file is signed by" in fault(server, cert=tmp_path / "chain.pem")


def test_a_certificate_without_names_is_refused(tmp_path, root):
    assert "no subject alternative name" in fault(issue(tmp_path, "nameless", root, names=()))


def test_a_certificate_for_clients_alone_is_refused(tmp_path, root):
    told = fault(issue(tmp_path, "of-client", root, usages=CLIENT))
    assert "its extended key usage is clientAuth, expected one for servers (serverAuth)" in told


def test_a_name_to_listen_on_must_be_in_the_certificate_and_an_address_is_warned_of(server, caplog):
    assert "the server listens on models.example" in fault(server, "models.example")
    check(server, "192.0.2.7")
    assert "clients that connect to 192.0.2.7 refuse it" in caplog.text
    caplog.clear()
    check(server, "0.0.0.0")
    assert caplog.text == ""


@pytest.mark.parametrize(
    ("names", "host", "covered"),
    [
        (("models.example",), "models.example", True),
        (("*.example",), "MODELS.example.", True),
        (("*.example",), "a.models.example", False),
        (("*.example",), "example", False),
        (("::1",), "0:0:0:0:0:0:0:1", True),
        (("127.0.0.1",), "127.0.0.2", False),
    ],
)
def test_names_and_addresses_that_a_certificate_covers(names, host, covered):
    assert covers(names, host) is covered


@pytest.mark.parametrize(
    ("key", "words"),
    [
        (ed25519.Ed25519PrivateKey.generate(), "is Ed25519, which gRPC does not take"),
        (ec.generate_private_key(ec.SECP521R1()), "is secp521r1"),
        (rsa.generate_private_key(65537, 1024), "is RSA of 1024 bits"),
    ],
    ids=["ed25519", "p521", "rsa-1024"],
)
def test_kinds_of_keys_that_grpc_does_not_take_are_refused(tmp_path, root, key, words):
    assert words in fault(issue(tmp_path, "odd", root, key=key))


def test_files_that_are_not_what_they_should_be_are_refused(tmp_path, server, root):
    (tmp_path / "text").write_text("hello")
    (tmp_path / "damaged.pem").write_bytes(pem_of(server.certificate).replace(b"M", b"A", 40))
    encrypted = server.key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.BestAvailableEncryption(b"secret"),
    )
    (tmp_path / "encrypted.key").write_bytes(encrypted)
    assert "does not exist" in fault(server, cert=tmp_path / "absent.pem")
    assert "is a folder" in fault(server, cert=tmp_path)
    assert "holds no PEM block" in fault(server, cert=tmp_path / "text")
    assert "holds a private key, expected a certificate" in fault(server, cert=server.key_file)
    assert "holds no PEM block" in fault(server, key=server.cert_file)
    assert "cannot be read" in fault(server, cert=tmp_path / "damaged.pem")
    assert "is encrypted, expected a key without a passphrase" in fault(server, key=tmp_path / "encrypted.key")


def test_an_expired_authority_of_clients_is_refused(tmp_path, server):
    old = issue(tmp_path, "old", is_authority=True, days=(-10, -1))
    assert "CN=old expired" in fault(server, client_ca=old.cert_file)


def test_a_key_that_others_can_read_and_a_near_end_are_warned_of(tmp_path, root, caplog):
    soon = issue(tmp_path, "soon", root, days=(-1, 12.5))
    soon.key_file.chmod(0o644)
    check(soon)
    assert "soon.key can be read by every user of this machine" in caplog.text
    assert "ends in 12 days" in caplog.text


def test_a_client_gives_both_or_neither_and_a_certificate_for_clients(tmp_path, root, server):
    with pytest.raises(TlsError, match="found no key beside it"):
        ClientTls(cert=server.cert_file).load()
    only_server = issue(tmp_path, "only-server", root, usages=(ExtendedKeyUsageOID.SERVER_AUTH,))
    with pytest.raises(TlsError, match=r"expected one for clients \(clientAuth\)"):
        ClientTls(cert=only_server.cert_file, key=only_server.key_file).load()
    client = issue(tmp_path, "client", root, usages=CLIENT, names=())
    loaded = ClientTls(ca=root.cert_file, cert=client.cert_file, key=client.key_file).load()
    assert loaded.ca == pem_of(root.certificate)


def test_a_server_whose_certificate_has_expired_counts_as_live_while_it_listens():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"127.0.0.1:{listener.getsockname()[1]}"
        ended = HealthEndpoint(http=None, grpc=url, tls_ends=datetime.now(UTC) - timedelta(seconds=1))
        assert is_live(ended, 0.2)
    assert not is_live(ended, 0.2)


def test_why_a_server_with_an_expired_certificate_is_refused(tmp_path, root):
    """The sentence of a client, of a server that did not check its certificate."""
    expired = issue(tmp_path, "expired", root, days=(-10, -1))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(expired.cert_file, expired.key_file)

    def accept():
        with listener.accept()[0] as taken, pytest.raises(ssl.SSLError):
            context.wrap_socket(taken, server_side=True)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=accept)
        thread.start()
        told = handshake_fault(f"127.0.0.1:{listener.getsockname()[1]}", ClientTls(ca=root.cert_file))
        thread.join()
    assert "certificate has expired" in told


def test_a_certificate_that_was_cut_off_is_told(tmp_path, server, root):
    (tmp_path / "cut.pem").write_bytes(pem_of(server.certificate) + pem_of(root.certificate)[:200])
    assert "cut.pem holds 2 beginnings of certificates and 1 whole ones" in fault(server, cert=tmp_path / "cut.pem")
    assert "the clients' authority: " in fault(server, client_ca=tmp_path / "cut.pem")
