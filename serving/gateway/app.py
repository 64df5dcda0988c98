"""The gateway's application: its routes, its answers to faults, and who comes in."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import cache, partial

from fastapi import FastAPI
from fastapi_swagger import patch_fastapi

from policies.server_connection import ServerConnection
from serving.gateway import document, entrance, routes
from serving.gateway.calls import Calls
from serving.gateway.channel import Channel
from serving.gateway.config import GatewayConfig


def make_app(config: GatewayConfig, server: ServerConnection) -> FastAPI:
    """Returns the application."""
    # Its own key is not sent: a caller has none of the gateway's rights.
    channel = Channel(server)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await channel.close()

    # Without FastAPI's own pages of documentation, whose scripts come from elsewhere.
    app = FastAPI(
        title="alignd", description="OpenAI's API for completions, and feedback on them.", lifespan=lifespan,
        docs_url=None, redoc_url=None, swagger_ui_oauth2_redirect_url=None,
    )  # fmt: skip
    # A key that is typed there is forgotten with the page.
    patch_fastapi(app, "/docs", redirect_from_root_to_docs=False, swagger_ui_parameters={"tryItOutEnabled": True})
    needs_key = config.needs_key(forwarded=False)
    app.openapi = cache(partial(document.document, app, needs_key=needs_key))  # type: ignore[method-assign]
    entrance.answer_faults(app)
    entrance.add_middleware(app, config)
    calls = Calls(channel, config.timeout_seconds)
    for add in (routes.completions, routes.models, routes.feedback, routes.health):
        app.include_router(add(calls))
    return app
