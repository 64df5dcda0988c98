"""What each request meets before its route: its id, who may come in, how long a body may be; and what becomes of it.

The log has a line for each request but health's: its route, status and seconds, and nothing of what was sent.
"""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Awaitable, Callable

import grpc
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response

from policies.server_connection import stays_here
from serving.faults import told
from serving.gateway import errors, routes
from serving.gateway.body import BodyLimit
from serving.gateway.config import GatewayConfig
from serving.gateway.requests import BadParamError
from serving.request_id import REQUEST_ID, begin_request

logger = logging.getLogger(__name__)

_OURS = "bearer alignd_"
_FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")


def answer_faults(app: FastAPI) -> None:
    """Answers each kind of fault in OpenAI's shape."""

    @app.exception_handler(grpc.aio.AioRpcError)
    async def on_refusal(request: Request, failed: grpc.aio.AioRpcError) -> Response:
        return errors.refused(failed, request.state.names)

    @app.exception_handler(BadParamError)
    async def on_bad_param(request: Request, failed: BadParamError) -> Response:
        return errors.error(400, str(failed), "invalid_parameter", failed.param)

    @app.exception_handler(UnicodeEncodeError)
    async def on_surrogate(request: Request, failed: UnicodeEncodeError) -> Response:
        return errors.error(400, "a text has half of a surrogate pair, which is no character", "invalid_parameter")

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, failed: RequestValidationError) -> Response:
        return errors.invalid(failed.errors())

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, failed: HTTPException) -> Response:
        headers = dict(failed.headers or {})
        return errors.error(failed.status_code, str(failed.detail), headers=headers)


def add_middleware(app: FastAPI, config: GatewayConfig) -> None:
    """Adds what each request passes through, the innermost first."""
    app.add_middleware(BodyLimit, max_bytes=config.max_body_mib << 20)

    @app.middleware("http")
    async def identify(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        began = time.monotonic()
        request.state.names = {}
        request.state.request_id = begin_request(request.headers.get(REQUEST_ID))
        try:
            response = _kept_out(request, config) or await call_next(request)
        except Exception as failed:
            logger.error("the gateway failed:\n%s", told(failed))
            response = errors.error(500, "the gateway failed; its log says why", "internal")
        response.headers[REQUEST_ID] = request.state.request_id
        _log_answer(request, response.status_code, time.monotonic() - began)
        return response

    if config.allowed_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(config.allowed_origins), allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id", "retry-after"],
        )  # fmt: skip


def _log_answer(request: Request, status: int, seconds: float) -> None:
    """Logs that a request was answered. Of a stream, these are the seconds until it began."""
    # As the route is written: a path may have anything in it.
    route = getattr(request.scope.get("route"), "path", "no route")
    if route != routes.HEALTH:
        values = {"method": request.method, "route": route, "status": status, "seconds": round(seconds, 4)}
        said = "%s %s %d in %.3f s request_id=%s"
        logger.info(said, request.method, route, status, seconds, request.state.request_id, extra=values)


def _kept_out(request: Request, config: GatewayConfig) -> Response | None:
    """Notes the caller's key, and returns the answer to one who may not come in.

    Where no key is needed, a page of another site must not come in by a name of its own that leads here (DNS
    rebinding), and nobody whom a proxy has let through.
    """
    key = request.headers.get("authorization", "").strip()
    forwarded = any(name in request.headers for name in _FORWARDED)
    needs_key = config.needs_key(forwarded=forwarded)
    request.state.key = key
    if needs_key and not key and request.url.path.startswith("/v1/"):
        why = "send an API key as the header `Authorization: Bearer KEY`"
        return errors.error(401, why, "no_api_key", headers={"WWW-Authenticate": "Bearer"})
    if not (key.isascii() and key.isprintable()):
        return errors.error(401, "the API key is unknown", "bad_api_key", headers={"WWW-Authenticate": "Bearer"})
    if not needs_key:
        if not _is_ours(request.headers.get("host", "")):
            return errors.error(421, "without an API key, this gateway is called as localhost alone", "bad_host")
        if not key.lower().startswith(_OURS):
            # OpenAI's clients send something in any case. On a machine of one's own nothing is needed.
            request.state.key = ""
    return None


def _is_ours(host: str) -> bool:
    """Whether a Host header names this machine."""
    return stays_here(host if re.search(r":\d+$", host) else f"{host}:80")
