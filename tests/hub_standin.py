"""A model hub on this machine: serves one folder as a repository, over the HTTP calls that huggingface_hub makes.

with hub_of({"owner/model": folder}) as (endpoint, downloads):
    subprocess.run([...], env={**os.environ, "HF_ENDPOINT": endpoint})
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@contextlib.contextmanager
def hub_of(repositories: Mapping[str, Path]) -> Iterator[tuple[str, list[str]]]:
    """Yield the endpoint, and the list in which the paths of downloaded files are noted."""
    downloads: list[str] = []

    class Hub(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self._answer(with_body=False)

        def do_GET(self) -> None:
            self._answer(with_body=True)

        def log_message(self, *_: object) -> None:
            """Say nothing."""

        def _answer(self, *, with_body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            found = self._look_up(path, with_body=with_body)
            if found is None:
                self.send_error(404)
                return
            body, kind = found
            self.send_response(200)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("ETag", f'"{hashlib.sha1(body, usedforsecurity=False).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def _look_up(self, path: str, *, with_body: bool) -> tuple[bytes, str] | None:
            for name, folder in repositories.items():
                files = {file.relative_to(folder).as_posix(): file for file in folder.rglob("*") if file.is_file()}
                if path.startswith(f"/api/models/{name}/revision/"):
                    info = {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]}
                    return json.dumps(info).encode(), "application/json"
                if path.startswith(f"/api/models/{name}/tree/"):
                    tree = [
                        {"type": "file", "path": file, "size": where.stat().st_size, "oid": "0" * 40}
                        for file, where in files.items()
                    ]
                    return json.dumps(tree).encode(), "application/json"
                file = path.removeprefix(f"/{name}/resolve/{COMMIT}/")
                if file in files:
                    if with_body:
                        downloads.append(file)
                    return files[file].read_bytes(), "application/octet-stream"
            return None

    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", downloads
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
