"""The application: routes, what stands before all of them, and errors as one line of JSON."""

from __future__ import annotations

import base64
import hashlib
import hmac
import logging
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, HTTPException, Request, Response, Security
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.docs import get_swagger_ui_html
from fastapi.responses import JSONResponse
from fastapi.security import APIKeyHeader
from sqlalchemy.exc import SQLAlchemyError

import recformer
from recformer.files import UserError
from recformer.serving import gorse, ours
from recformer.serving.examples import ExampleUsers
from recformer.serving.schemas import Problem
from recformer.serving.service import BusyError, Service

logger = logging.getLogger("recformer.serving")

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

KEY_HEADER = "X-API-Key"
DOCS = "/docs"
# Files of Swagger UI, out of the package fastapi-offline.
DOCS_FILES = {
    f"{DOCS}/swagger-ui-bundle.js": "text/javascript; charset=utf-8",
    f"{DOCS}/swagger-ui.css": "text/css; charset=utf-8",
}
# Paths that need no key: the pages and their files hold nothing of the catalogue.
OPEN = ("/", "/health", "/ready", "/metrics", "/openapi.json", "/favicon.ico", DOCS, *DOCS_FILES)
PAGE = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page/page.js": ("page.js", "text/javascript; charset=utf-8"),
    "/page/page.css": ("page.css", "text/css; charset=utf-8"),
}
LOCAL_NAMES = ("localhost", "127.0.0.1", "[::1]")
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "X-Frame-Options": "DENY",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' "
    "data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
POLICY_HEADER = "Content-Security-Policy"
ENCODED_HEADERS = [
    (name.lower().encode(), value.encode())
    for name, value in {**HEADERS, POLICY_HEADER: POLICY}.items()
]


class Guard:
    """Key, host and size of every request before anything reads it; a log line and figures after.

    Args:
        app: what answers.
        service: whose limits and metrics they are.
        api_key: that `X-API-Key` must be; None asks for none, and then only requests to a name of
            this machine are answered, so that no page of elsewhere reaches the service through a
            name of its own.
    """

    def __init__(self, app: Any, service: Service, api_key: str | None) -> None:
        self.app, self.service = app, service
        self.key = None if api_key is None else api_key.encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """As ASGI has it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start, status = time.perf_counter(), 500

        async def sending(message: MutableMapping[str, Any]) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                given = {name for name, _ in message["headers"]}
                message["headers"] = [
                    *message["headers"],
                    *(pair for pair in ENCODED_HEADERS if pair[0] not in given),
                ]
            await send(message)

        try:
            refused = self._refused(scope)
            if refused is not None:
                await refused(scope, receive, sending)
            else:
                await self.app(scope, self._limited(receive), sending)
        finally:
            seconds = time.perf_counter() - start
            route = getattr(scope.get("route"), "path", None) or "other"
            if scope["path"] in PAGE:
                route = scope["path"]
            method = scope["method"] if scope["method"] in METHODS else "other"
            self.service.metrics.requests.labels(method, route, str(status)).observe(seconds)
            logger.info(
                "request",
                extra={
                    "fields": {
                        "method": method,
                        "route": route,
                        "status": status,
                        "ms": round(seconds * 1000, 2),
                    }
                },
            )

    def _refused(self, scope: Scope) -> Response | None:
        headers = dict(scope["headers"])
        path = scope["path"]
        if self.key is None:
            host = headers.get(b"host", b"").decode("latin-1")
            name = host if host.endswith("]") else host.rpartition(":")[0] or host
            if name.lower() not in LOCAL_NAMES:
                return _problem(403, "without a key, requests to localhost alone are answered")
        elif path not in OPEN and path not in PAGE:
            given = headers.get(b"x-api-key", b"")
            if not hmac.compare_digest(given, self.key):
                return _problem(401, f"the header {KEY_HEADER} is missing or wrong")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.service.limits.body:
            return _too_long(self.service.limits.body)
        return None

    def _limited(self, receive: Receive) -> Receive:
        """The body as it comes, up to the limit; its length may not have been said."""
        total = 0

        async def receiving() -> MutableMapping[str, Any]:
            nonlocal total
            message = await receive()
            total += len(message.get("body", b""))
            if total > self.service.limits.body:
                raise HTTPException(413, f"the body has more than {self.service.limits.body} bytes")
            return message

        return receiving


METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS")


def _problem(status: int, detail: str) -> JSONResponse:
    return JSONResponse({"detail": detail}, status)


def _too_long(limit: int) -> JSONResponse:
    return _problem(413, f"the body has more than {limit} bytes")


def _said(error: RequestValidationError) -> str:
    """The first fault of a request, in one line that can be written as any JSON."""
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"])
    more = len(error.errors()) - 1
    text = f"{place}: {first['msg'].removeprefix('Value error, ')}"
    text += f" (and {more} more)" if more else ""
    return text.encode("ascii", "backslashreplace").decode()[:500]


def create_app(
    service: Service, api_key: str | None = None, test_users: ExampleUsers | None = None
) -> FastAPI:
    """The application of a service.

    Args:
        service: loaded; it is not closed here.
        api_key: see `Guard`.
        test_users: for the page.
    """
    app = FastAPI(
        title="Recformer",
        version=recformer.__version__,
        description="Gorse's REST API over a Recformer under /api, more under /v1.",
        responses={
            400: {"model": Problem, "description": "the fault of the request"},
            401: {"model": Problem, "description": "the key is missing or wrong"},
            413: {"model": Problem, "description": "the body is too long"},
            "4XX": {"model": Problem},
            503: {"model": Problem, "description": "the database does not answer"},
        },
        docs_url=None,
        redoc_url=None,
    )
    app.state.service, app.state.test_users = service, test_users
    # `Guard` checks the key; the description names it, so that /docs can send it.
    keyed = [] if api_key is None else [Security(APIKeyHeader(name=KEY_HEADER, auto_error=False))]
    app.include_router(gorse.router, dependencies=keyed)
    app.include_router(ours.router, tags=["more"], dependencies=keyed)
    _add_probes(app, service)
    _add_page(app)
    _add_docs(app)
    _add_errors(app)
    app.add_middleware(Guard, service=service, api_key=api_key)
    return app


def _add_probes(app: FastAPI, service: Service) -> None:
    @app.get("/health", tags=["probes"])
    @app.get("/api/health/live", include_in_schema=False)
    async def health() -> dict[str, str]:
        """The process answers."""
        return {"status": "ok"}

    @app.get("/ready", tags=["probes"])
    @app.get("/api/health/ready", include_in_schema=False)
    def ready() -> dict[str, str]:
        """Models are loaded, the database answers, and the service is not about to stop."""
        if service.stopping:
            raise HTTPException(503, "the service is stopping")
        service.store.check()
        return {"status": "ok"}

    @app.get("/metrics", tags=["probes"])
    def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(service.metrics.text(), media_type="text/plain; version=0.0.4")


def _add_page(app: FastAPI) -> None:
    folder = files("recformer.serving") / "page"
    for path, (name, kind) in PAGE.items():
        _add_file(app, path, (folder / name).read_bytes(), kind)


def _add_docs(app: FastAPI) -> None:
    """Swagger UI with nothing from elsewhere; addresses are relative, for proxies with a prefix."""
    folder = files("fastapi_offline") / "static"
    for path, kind in DOCS_FILES.items():
        _add_file(app, path, (folder / path.rpartition("/")[2]).read_bytes(), kind)
    script, style = (path.removeprefix("/") for path in DOCS_FILES)
    found = get_swagger_ui_html(
        openapi_url="openapi.json",
        title=app.title,
        swagger_js_url=script,
        swagger_css_url=style,
        swagger_favicon_url="data:,",
        swagger_ui_parameters={"validatorUrl": None},  # by default a service of elsewhere
    )
    html = bytes(found.body)
    (start,) = re.findall(rb"<script>(.*?)</script>", html, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(start).digest()).decode()
    policy = POLICY.replace("script-src 'self'", f"script-src 'self' 'sha256-{digest}'")
    policy = policy.replace("style-src 'self'", "style-src 'self' 'unsafe-inline'")
    _add_file(app, DOCS, html, "text/html; charset=utf-8", {POLICY_HEADER: policy})


def _add_file(
    app: FastAPI, path: str, content: bytes, kind: str, headers: dict[str, str] | None = None
) -> None:
    @app.get(path, include_in_schema=False)
    async def file() -> Response:
        return Response(
            content, media_type=kind, headers={"Cache-Control": "no-cache", **(headers or {})}
        )


def _add_errors(app: FastAPI) -> None:
    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> JSONResponse:
        return _problem(400, _said(error))

    @app.exception_handler(UserError)
    async def wrong(request: Request, error: UserError) -> JSONResponse:
        return _problem(400, str(error).encode("utf-8", "backslashreplace").decode()[:500])

    @app.exception_handler(BusyError)
    async def busy(request: Request, error: BusyError) -> JSONResponse:
        return _problem(409, str(error))

    @app.exception_handler(SQLAlchemyError)
    async def database(request: Request, error: SQLAlchemyError) -> JSONResponse:
        logger.error("database", extra={"fields": {"error": type(error).__name__}}, exc_info=error)
        return _problem(503, "the database does not answer")
