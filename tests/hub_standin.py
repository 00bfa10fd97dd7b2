"""A model hub on this machine: serves folders as repositories, over the HTTP calls that huggingface_hub makes.

    with hub_of({"owner/model": folder}) as hub:
        subprocess.run([...], env={**os.environ, **hub.environment(home)})

A name that begins with datasets/ is a data set's; its files lie side by side.

As the real hub does, it lists safetensors files as LFS objects with their SHA-256, redirects them to another path (here
of another host name), lists other files with git's SHA-1, and answers ranges. The fields of `Hub` are its faults.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"
HTML = b"<!DOCTYPE html><html><body>Please log in to the network.</body></html>"
_ERRORS = {401: "Invalid username or password.", 403: "Access to model is restricted.", 404: "Not found"}


@dataclass
class Hub:
    """The endpoint; what was asked (`downloads`: files, `ranges`: the ranges of them, `tokens`: path -> Authorization);
    and faults: `token` is required; `gated` repositories; `statuses`: the start of a path -> a status; `html`: starts
    of paths that are answered with a page; `wrong`: files whose bytes are others; `cuts`: after how many bytes the
    connection ends, for one answer after the other."""

    endpoint: str = ""
    downloads: list[str] = field(default_factory=list)
    ranges: list[str | None] = field(default_factory=list)
    tokens: dict[str, str | None] = field(default_factory=dict)
    token: str | None = None
    gated: set[str] = field(default_factory=set)
    statuses: dict[str, int] = field(default_factory=dict)
    html: tuple[str, ...] = ()
    wrong: set[str] = field(default_factory=set)
    cuts: list[int] = field(default_factory=list)
    revisions: tuple[str, ...] = ("main", COMMIT)

    def environment(self, home: Path) -> dict[str, str]:
        """The variables under which huggingface_hub asks this hub."""
        return {
            "HF_ENDPOINT": self.endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_TOKEN": "", "HF_TOKEN_PATH": str(home / "token"),
        }  # fmt: skip


def git_digest(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body, usedforsecurity=False).hexdigest()


@contextlib.contextmanager
def hub_of(repositories: Mapping[str, Path]) -> Iterator[Hub]:
    """Serve the folders until the end of the block."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

        def _answer(self, *, with_body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            hub.tokens[path] = self.headers.get("Authorization")
            status = next((code for start, code in hub.statuses.items() if path.startswith(start)), None)
            if path.startswith(hub.html):
                self._send(200, HTML, {"Content-Type": "text/html"}, with_body=with_body)
            elif status is not None:
                self._refuse(status)
            elif path.startswith(("/api/models/", "/api/datasets/")):
                self._list(path.removeprefix("/api/models/").removeprefix("/api/"))
            elif path.startswith("/cdn/"):
                self._give(path.removeprefix("/cdn/"), {}, with_body=with_body)
            else:
                self._resolve(path, with_body=with_body)

        def _repository(self, path: str) -> tuple[str, Path] | None:
            """The repository that a path begins with, unless the caller may not see it."""
            found = next(((n, f) for n, f in repositories.items() if path.startswith(f"{n}/")), None)
            if found is None or (hub.token and self.headers.get("Authorization") != f"Bearer {hub.token}"):
                self._refuse(401)
                return None
            return found

        def _list(self, path: str) -> None:
            found = self._repository(path)
            if found is None:
                return
            name, folder = found
            kind, _, revision = path.removeprefix(f"{name}/").partition("/")
            if revision not in hub.revisions:
                self._refuse(404, "RevisionNotFound")
                return
            files = {file.relative_to(folder).as_posix(): file.read_bytes() for file in _files(folder)}
            tree = []
            for file, body in files.items():
                entry = {"type": "file", "path": file, "size": len(body), "oid": git_digest(body)}
                if file.endswith(".safetensors"):
                    entry["lfs"] = {"oid": hashlib.sha256(body).hexdigest(), "size": len(body), "pointerSize": 134}
                tree.append(entry)
            info = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}
            body = json.dumps(tree if kind == "tree" else info).encode()
            self._send(200, body, {"Content-Type": "application/json"}, with_body=True)

        def _resolve(self, path: str, *, with_body: bool) -> None:
            found = self._repository(path.removeprefix("/"))
            if found is None:
                return
            name, folder = found
            if name in hub.gated:
                self._refuse(403, "GatedRepo")
                return
            file = path.removeprefix(f"/{name}/resolve/").partition("/")[2]
            if not (folder / file).is_file():
                self._refuse(404, "EntryNotFound")
                return
            body = (folder / file).read_bytes()
            headers = {"X-Repo-Commit": COMMIT, "ETag": f'"{git_digest(body)}"'}
            if not file.endswith(".safetensors"):
                self._give(f"{name}/{file}", headers, with_body=with_body)
                return
            digest = hashlib.sha256(body).hexdigest()
            headers |= {"X-Linked-ETag": f'"{digest}"', "X-Linked-Size": str(len(body))}
            other = hub.endpoint.replace("127.0.0.1", "localhost")
            self._send(302, b"", headers | {"Location": f"{other}/cdn/{name}/{file}"}, with_body=False)

        def _give(self, path: str, headers: dict[str, str], *, with_body: bool) -> None:
            """The bytes of a file, or the asked range of them."""
            name = next(name for name in repositories if path.startswith(f"{name}/"))
            file = path.removeprefix(f"{name}/")
            body = (repositories[name] / file).read_bytes()
            if file in hub.wrong:
                body = body[:-1] + bytes([body[-1] ^ 1])
            asked = self.headers.get("Range")
            status, total = 200, len(body)
            if asked:
                first = int(asked.removeprefix("bytes=").partition("-")[0])
                status, headers = 206, {**headers, "Content-Range": f"bytes {first}-{total - 1}/{total}"}
                body = body[first:]
            if with_body:
                hub.downloads.append(file)
                hub.ranges.append(asked)
            self._send(status, body, {**headers, "Accept-Ranges": "bytes"}, with_body=with_body)

        def _refuse(self, status: int, code: str | None = None) -> None:
            body = json.dumps({"error": _ERRORS.get(status, "Internal error")}).encode()
            headers = {"Content-Type": "application/json", **({"X-Error-Code": code} if code else {})}
            self._send(status, body, headers, with_body=self.command == "GET")

        def _send(self, status: int, body: bytes, headers: Mapping[str, str], *, with_body: bool) -> None:
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if not with_body:
                return
            if hub.cuts and len(body) > 4096:
                self.wfile.write(body[: hub.cuts.pop(0)])
                self.close_connection = True
                self.connection.close()
            else:
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def _files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file())
