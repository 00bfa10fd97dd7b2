"""Serves the page and its files, from memory.

app.include_router(router())

The page is the same for everybody and holds no secret, so it asks for no API key; its requests to the API do. It loads
nothing from elsewhere, and its policy lets a browser run nothing but the files of this folder: no script in the page's
text, none that a text of the model could smuggle in, and no frame around it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Awaitable, Callable
from importlib import resources
from typing import TYPE_CHECKING

from export.optional import optional_package

if TYPE_CHECKING:
    from fastapi import APIRouter
    from starlette.requests import Request
    from starlette.responses import Response

INDEX = "index.html"
# The files that are served, and no others. index.html is the page at /, the rest lies under /playground/.
TYPES = {
    INDEX: "text/html; charset=utf-8",
    "page.css": "text/css; charset=utf-8",
    "icon.svg": "image/svg+xml",
    **{
        f"{name}.js": "text/javascript; charset=utf-8"
        for name in ("main", "api", "calls", "inspector", "routing", "settings", "tokens", "turn")
    },
}
_POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    # A browser asks each time whether its copy is still the file, so that a page never meets files of another release.
    "Cache-Control": "no-cache",
}


def files() -> dict[str, bytes]:
    """The files of the page by their names, as they are installed."""
    folder = resources.files("clients.gateway.playground") / "page"
    return {name: (folder / name).read_bytes() for name in TYPES}


def router() -> APIRouter:
    """The page at / and its files at /playground/NAME. Raises MissingPackageError without the extra `gateway`."""
    with optional_package("fastapi", "the playground", "gateway"):
        from fastapi import APIRouter

    found = APIRouter()
    for name, content in files().items():
        path = "/" if name == INDEX else f"/playground/{name}"
        found.add_route(path, _endpoint(name, content), methods=["GET", "HEAD"], include_in_schema=False)
    return found


def _endpoint(name: str, content: bytes) -> Callable[[Request], Awaitable[Response]]:
    from starlette.responses import Response

    tag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
    headers = {**HEADERS, "ETag": tag}

    async def serve(request: Request) -> Response:
        if tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=TYPES[name], headers=headers)

    return serve
