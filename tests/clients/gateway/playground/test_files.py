"""The files of the playground as the gateway serves them, without a browser."""

from __future__ import annotations

import re
import urllib.error
import urllib.request
from importlib import resources

import pytest

from clients.gateway.playground.router import INDEX, TYPES, files
from clients.gateway.settings import Keys


def fetch(url: str, method: str = "GET", **headers):
    return urllib.request.urlopen(urllib.request.Request(url, method=method, headers=headers), timeout=30)


def test_every_file_of_the_folder_is_served_and_no_other():
    folder = resources.files("clients.gateway.playground") / "page"
    assert sorted(TYPES) == sorted(file.name for file in folder.iterdir())


def test_the_page_needs_no_key_and_its_policy_lets_nothing_in(gateway_of):
    url = gateway_of(keys=Keys(digests=(b"x",))).url
    for name, content in files().items():
        with fetch(f"{url}/" if name == INDEX else f"{url}/playground/{name}") as response:
            assert response.read() == content
            assert response.headers["Content-Type"] == TYPES[name]
            policy = dict(
                rule.strip().partition(" ")[::2] for rule in response.headers["Content-Security-Policy"].split(";")
            )
            assert (
                policy["default-src"]
                == policy["base-uri"]
                == policy["form-action"]
                == policy["frame-ancestors"]
                == "'none'"
            )
            assert {policy[f"{kind}-src"] for kind in ("script", "style", "img", "connect")} == {"'self'"}
            assert response.headers["X-Content-Type-Options"] == "nosniff"
    with pytest.raises(urllib.error.HTTPError) as caught:
        fetch(f"{url}/v1/models")
    assert caught.value.code == 401
    caught.value.close()


def test_a_browsers_copy_is_asked_for_again_and_not_sent_again(gateway):
    with fetch(f"{gateway.url}/playground/main.js") as response:
        tag = response.headers["ETag"]
        assert response.headers["Cache-Control"] == "no-cache"
    with pytest.raises(urllib.error.HTTPError) as caught:
        fetch(f"{gateway.url}/playground/main.js", **{"If-None-Match": tag})
    assert (caught.value.code, caught.value.headers["ETag"]) == (304, tag)
    caught.value.close()
    with fetch(f"{gateway.url}/", "HEAD") as response:
        assert (response.status, response.read()) == (200, b"")


@pytest.mark.parametrize("path", ["playground/router.py", "playground/..%2frouter.py", "playground/", "page/main.js"])
def test_nothing_else_of_the_disk_is_served(gateway, path):
    with pytest.raises(urllib.error.HTTPError) as caught:
        fetch(f"{gateway.url}/{path}")
    assert caught.value.code == 404
    caught.value.close()


def test_the_page_has_no_script_style_or_address_of_its_own():
    page = files()[INDEX].decode()
    assert re.findall(r"<script(?![^>]*\bsrc=)|\bstyle=|\bon\w+=|https?://", page) == []
    for name, content in files().items():
        if name.endswith((".js", ".css")):
            assert re.findall(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|https?:|url\(|@import",
                              content.decode().replace("http://www.w3.org/2000/svg", "")) == []  # fmt: skip


def test_the_sources_import_what_is_there():
    for name, content in files().items():
        for imported in re.findall(r'from "\./([\w.]+)"', content.decode()):
            assert imported in TYPES, name
