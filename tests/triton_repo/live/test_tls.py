"""TLS and mutual TLS of a real Triton, asked by moeship's clients, by NVIDIA's and by curl."""

from __future__ import annotations

import asyncio
import json
import shutil
import socket
import subprocess
import urllib.request
from types import SimpleNamespace

import pytest
from certificates import issue, pem_of
from serve_command import PATIENCE_S, start_command
from tritonclient.grpc import InferenceServerClient

from cli.main import main
from clients.errors import TlsFailed
from clients.generation import AsyncClient, Client, ClientTls, GenerationRequest
from triton_repo.contracts.model_parameters import ModelParameters
from triton_repo.packaging.package import PackageOptions, package_engine


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> SimpleNamespace:
    """An authority with an intermediate one that issued the server's certificate, and a second authority."""
    folder = tmp_path_factory.mktemp("certificates")
    root = issue(folder, "root", is_authority=True)
    middle = issue(folder, "middle", root, is_authority=True)
    server = issue(folder, "server", middle)
    chain = folder / "chain.pem"
    chain.write_bytes(pem_of(server.certificate) + pem_of(middle.certificate))
    stranger = issue(folder, "stranger", is_authority=True)
    return SimpleNamespace(
        root=root,
        chain=chain,
        server=server,
        stranger=stranger,
        client=issue(folder, "client", root, names=()),
        false_client=issue(folder, "false-client", stranger, names=()),
    )


@pytest.fixture(scope="module")
def repository(tmp_path_factory, tiny_engine):
    folder = tmp_path_factory.mktemp("tls") / "repository"
    threads = ModelParameters(threads=1, slots=2)
    package_engine(PackageOptions(engine=tiny_engine, name="tiny", output=folder, onnxruntime=threads))
    return folder


def serve(repository, pairs, *words):
    command, said = start_command(
        repository, "--tls-cert", str(pairs.chain), "--tls-key", str(pairs.server.key_file), *words
    )
    yield said
    command.kill()
    command.communicate(timeout=PATIENCE_S)


@pytest.fixture(scope="module")
def encrypted(repository, pairs):
    """TLS without certificates of clients, with HTTP."""
    yield from serve(repository, pairs)


@pytest.fixture(scope="module")
def mutual(repository, pairs):
    """Mutual TLS without HTTP, so that the server's health is asked over it. A gateway is beside it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    flags = ["--no-http", "--tls-client-ca", str(pairs.root.cert_file), "--openai-port", str(port)]
    yield from serve(repository, pairs, *flags)


def of_client(pairs, who="client") -> ClientTls:
    pair = getattr(pairs, who)
    return ClientTls(ca=pairs.root.cert_file, cert=pair.cert_file, key=pair.key_file)


def ask(url, tls) -> str:
    with Client(url, tls=tls) as client:
        return client.generate(GenerationRequest(model="tiny", prompt="def ", max_tokens=4)).text


def refusal(url, tls) -> str:
    with pytest.raises(TlsFailed) as caught:
        ask(url, tls)
    return str(caught.value)


def test_clients_that_check_the_server_are_answered(encrypted, pairs):
    text = ask(encrypted["grpc"], ClientTls(ca=pairs.root.cert_file))

    async def asynchronously():
        async with AsyncClient(encrypted["grpc"], tls=ClientTls(ca=pairs.root.cert_file)) as client:
            return (await client.generate(GenerationRequest(model="tiny", prompt="def ", max_tokens=4))).text

    assert text
    assert asyncio.run(asynchronously()) == text
    assert encrypted["tls"] == "server"


def test_generate_takes_the_authority_as_a_flag(encrypted, pairs, capsys):
    words = ["generate", "--url", encrypted["grpc"], "--max-tokens", "4", "def "]
    assert main([*words, "--tls-ca", str(pairs.root.cert_file)]) == 0
    assert capsys.readouterr().out.strip()
    assert main(words) == 1
    assert "this client does not encrypt" in capsys.readouterr().err


def test_a_client_that_does_not_encrypt_is_told_so(encrypted, mutual):
    for said in (encrypted, mutual):
        assert "takes encrypted connections only" in refusal(said["grpc"], None)


def test_a_server_of_another_authority_is_refused(encrypted, pairs):
    told = refusal(encrypted["grpc"], ClientTls(ca=pairs.stranger.cert_file))
    assert "the server's certificate is not accepted" in told
    assert "issuer certificate" in told
    assert "certificate is not accepted" in refusal(encrypted["grpc"], ClientTls())  # no public authority signed it


def test_a_server_of_another_name_is_refused(encrypted, pairs):
    told = refusal(encrypted["grpc"], ClientTls(ca=pairs.root.cert_file, server_name="models.example"))
    assert "models.example" in told
    assert "--tls-server-name" in told


def test_encrypting_to_a_server_without_tls_is_told(served_phixtral, pairs):
    assert "takes no encrypted connections" in refusal(served_phixtral.grpc_url, ClientTls(ca=pairs.root.cert_file))


def test_a_mutual_server_takes_clients_of_its_authority_alone(mutual, pairs):
    assert mutual["tls"] == "mutual"
    assert ask(mutual["grpc"], of_client(pairs))
    assert "only clients with a certificate" in refusal(mutual["grpc"], ClientTls(ca=pairs.root.cert_file))
    assert "does not take the client's certificate" in refusal(mutual["grpc"], of_client(pairs, "false_client"))


def test_nvidias_client_is_answered_with_and_without_a_certificate(encrypted, mutual, pairs):
    own = {
        "root_certificates": str(pairs.root.cert_file),
        "private_key": str(pairs.client.key_file),
        "certificate_chain": str(pairs.client.cert_file),
    }
    with InferenceServerClient(mutual["grpc"], ssl=True, **own) as nvidia:
        assert nvidia.is_model_ready("tiny")
    with InferenceServerClient(encrypted["grpc"], ssl=True, root_certificates=own["root_certificates"]) as nvidia:
        assert nvidia.is_model_ready("tiny")


def test_the_gateway_beside_a_mutual_server_reaches_it_and_encrypts_too(mutual, pairs):
    assert mutual["openai"].startswith("https://")
    context = ClientTls(ca=pairs.root.cert_file).context()
    with urllib.request.urlopen(f"{mutual['openai']}/models", timeout=PATIENCE_S, context=context) as response:
        assert [model["id"] for model in json.load(response)["data"]] == ["tiny"]


@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl")
def test_curl_finds_tls_where_triton_has_it(encrypted, pairs):
    """gRPC's port gives curl a certificate that the authority signed; HTTP and metrics are plain, on this machine."""
    word = ["curl", "-sv", "--http2", "--cacert", str(pairs.root.cert_file), f"https://{encrypted['grpc']}/"]
    said = subprocess.run(word, capture_output=True, text=True, timeout=PATIENCE_S).stderr
    assert "SSL certificate verify ok" in said
    for url in (f"{encrypted['http']}/v2", encrypted["metrics"]):
        assert url.startswith("http://127.0.0.1:")
        with urllib.request.urlopen(url, timeout=PATIENCE_S) as response:
            assert response.status == 200


def test_beside_tls_http_and_metrics_are_only_for_this_machine(repository, pairs, tmp_path):
    flags = ["--host", "0.0.0.0", "--accept-known-vulnerabilities", "--tls-key", str(pairs.server.key_file)]
    command, said = start_command(repository, *flags, "--tls-cert", str(pairs.chain))
    command.kill()
    _, told = command.communicate(timeout=PATIENCE_S)
    assert said["grpc"].startswith("0.0.0.0:")
    assert said["http"].startswith("http://127.0.0.1:")
    assert said["metrics"].startswith("http://127.0.0.1:")
    assert "HTTP and metrics listen on 127.0.0.1 only: Triton encrypts gRPC alone" in told


def test_an_expired_certificate_is_one_error_and_nothing_is_started(repository, pairs, tmp_path, capsys):
    expired = issue(tmp_path, "expired", pairs.root, days=(-10, -1))
    flags = ["--tls-cert", str(expired.cert_file), "--tls-key", str(expired.key_file)]
    assert main(["serve", str(repository), *flags]) == 2
    told = capsys.readouterr()
    assert "expired on" in told.err
    assert len(told.err.splitlines()) == 1
    assert told.out == ""
