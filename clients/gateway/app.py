"""The gateway as an ASGI app: OpenAI's HTTP API over Tritons that speak the text contract.

    app = create_app(Settings(tritons=("127.0.0.1:8001",), repository=Path("repository")))

It has no model work in it beyond chat templates and tokenizers. `guard.py` is around it, `api/` has the endpoints.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from export.optional import optional_package

with optional_package("fastapi", "the gateway", "gateway"):
    from fastapi import FastAPI, Request
    from fastapi.responses import JSONResponse, PlainTextResponse, Response
    from starlette.exceptions import HTTPException

from clients.errors import ClientError
from clients.gateway.api import chat, completions, listing
from clients.gateway.api.responses import endpoint as responses
from clients.gateway.errors import ApiError
from clients.gateway.events import as_api_error, error_response
from clients.gateway.guard import Guard, read_json
from clients.gateway.playground import router as playground
from clients.gateway.settings import Settings
from clients.gateway.state import Gateway
from export.errors import MoeshipError

if TYPE_CHECKING:
    from clients.gateway.guard import Record


_OF_V1 = ("/completions", "/chat/completions", "/responses", "/models")  # endpoints below /v1


def create_app(settings: Settings) -> FastAPI:
    """The app. Its state has the Gateway as `gateway`."""
    gateway = Gateway(settings)

    @asynccontextmanager
    async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
        async with gateway:
            yield

    # The interactive pages of FastAPI load scripts from the network.
    app = FastAPI(title="moeship gateway", lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None,
                  redirect_slashes=False)  # fmt: skip
    app.state.gateway = gateway
    app.add_middleware(Guard, settings=settings, metrics=gateway.metrics)
    for kind in (ApiError, ClientError, MoeshipError):
        app.add_exception_handler(kind, _own_error)
    app.add_exception_handler(HTTPException, _http_error)
    _add_endpoints(app, gateway)
    app.include_router(playground.router())
    return app


def _add_endpoints(app: FastAPI, gateway: Gateway) -> None:
    def record_of(request: Request) -> Record:
        record: Record = request.scope["moeship"]
        return record

    @app.post("/v1/completions")
    async def create_completion(request: Request) -> Response:
        return await completions.respond(gateway, record_of(request), await read_json(request, gateway.settings))

    @app.post("/v1/chat/completions")
    async def create_chat_completion(request: Request) -> Response:
        return await chat.respond(gateway, record_of(request), await read_json(request, gateway.settings))

    @app.post("/v1/responses")
    async def create_response(request: Request) -> Response:
        return await responses.respond(gateway, record_of(request), await read_json(request, gateway.settings))

    # HEAD is answered where GET is (RFC 9110, section 9.3.2): probes of load balancers send it.
    reads = ["GET", "HEAD"]

    @app.api_route("/v1/models", methods=reads)
    async def list_models() -> Response:
        return JSONResponse(await listing.models(gateway))

    @app.api_route("/v1/models/{name:path}", methods=reads)
    async def retrieve_model(name: str) -> Response:
        return JSONResponse(await listing.model(gateway, name))

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Response:
        body = await read_json(request, gateway.settings)
        return JSONResponse(await listing.tokenize(gateway, record_of(request), body))

    @app.post("/detokenize")
    async def detokenize(request: Request) -> Response:
        body = await read_json(request, gateway.settings)
        return JSONResponse(await listing.detokenize(gateway, record_of(request), body))

    @app.api_route("/health", methods=reads)
    async def health() -> Response:
        return JSONResponse(listing.health(gateway))

    @app.api_route("/metrics", methods=reads)
    async def metrics() -> Response:
        return PlainTextResponse(gateway.metrics.text(gateway.pool.tritons), media_type="text/plain; version=0.0.4")


async def _own_error(request: Request, error: Exception) -> Response:
    failure = as_api_error(error)
    request.scope["moeship"].error = failure.code or failure.kind
    return error_response(failure)


async def _http_error(request: Request, error: Any) -> Response:  # noqa: ANN401 - an HTTPException
    """The errors of routing: no such path, or no such method of a path."""
    path = request.url.path
    what = f"{request.method} {path}"
    meant = f"; did you mean /v1{path}? The base URL of OpenAI's clients ends in /v1" if path in _OF_V1 else ""
    problem = {404: f"unknown request URL: {what[:200]}{meant}", 405: f"not allowed: {what[:200]}"}.get(
        error.status_code
    )
    response = error_response(ApiError(problem or str(error.detail), status=error.status_code, code="unknown_url"))
    for name, value in (error.headers or {}).items():
        response.headers[name] = value
    return response
