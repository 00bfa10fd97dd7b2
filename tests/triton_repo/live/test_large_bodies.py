"""HTTP bodies that Triton 2.51 does not survive on stacks of the usual size: the next request is answered."""

from __future__ import annotations

import http.client
import json
from urllib.parse import urlsplit

import pytest

FORM = "application/x-www-form-urlencoded"  # what curl -d says
LONG = json.dumps({"text_input": "a " * 3_000_000, "max_tokens": 2}).encode()


def _post(served, body, content_type: str, *, chunked: bool = False) -> tuple[int, dict]:
    connection = http.client.HTTPConnection(urlsplit(served.http_url).netloc, timeout=60)
    try:
        path, headers = f"/v2/models/{served.model}/generate", {"Content-Type": content_type}
        if chunked:
            headers["Transfer-Encoding"] = "chunked"
        connection.request("POST", path, body, headers)  # of bytes as they are, chunks included
        response = connection.getresponse()
        return response.status, json.load(response)
    finally:
        connection.close()


def _in_chunks_of_a_byte(body: bytes) -> bytes:
    return b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n"


@pytest.mark.parametrize("kind", ["form", "json", "chunks"])
def test_a_long_body_is_refused_and_the_server_lives(served_phixtral, kind):
    if kind == "chunks":
        status, answer = _post(
            served_phixtral, _in_chunks_of_a_byte(LONG[:1_000_000]), "application/json", chunked=True
        )
        expected = "failed to parse the request JSON buffer"
    else:
        status, answer = _post(served_phixtral, LONG, FORM if kind == "form" else "application/json")
        expected = "found a prompt of 6000000 bytes"
    assert status >= 400
    assert expected in answer["error"]

    short = json.dumps({"text_input": "def ", "max_tokens": 2}).encode()
    assert _post(served_phixtral, short, FORM)[0] == 200
