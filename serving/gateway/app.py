"""The gateway's routes: each is one call of the gRPC server, with the caller's own key."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Mapping
from contextlib import asynccontextmanager
from functools import cache, partial
from typing import Annotated, Any, TypeVar

import grpc
from fastapi import Depends, FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from google.protobuf.json_format import MessageToDict
from grpc_health.v1 import health_pb2, health_pb2_grpc
from sse_starlette.sse import EventSourceResponse
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse, Response

from alignd.v1 import (
    feedback_service_pb2_grpc,
    inference_service_pb2,
    inference_service_pb2_grpc,
)
from policies.server_connection import ServerConnection, stays_here
from serving.gateway import answers, document, errors, shapes
from serving.gateway.body import BodyLimit
from serving.gateway.channel import Channel
from serving.gateway.config import GatewayConfig
from serving.gateway.requests import (
    BadParamError,
    ChatRequest,
    CompletionRequest,
    DemonstrationRequest,
    RankingRequest,
    chat_sample,
    demonstration,
    names,
    ranking,
    text_sample,
)

logger = logging.getLogger(__name__)

_T = TypeVar("_T")
_REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")
_OURS = "bearer alignd_"
_FORWARDED = ("forwarded", "x-forwarded-for", "x-forwarded-host", "x-real-ip", "via")
_DONE = "[DONE]"
_HEALTH_SECONDS = 5.0
# What is sent while nothing is written, so that no proxy takes the stream for dead, in seconds.
_PING_SECONDS = 15

_bearer = HTTPBearer(auto_error=False, description="An API key of `alignd keys create`.")
_WithKey = Annotated[Any, Depends(_bearer)]


def make_app(config: GatewayConfig, server: ServerConnection) -> FastAPI:
    """Returns the application."""
    # Its own key is not sent: a caller has none of the gateway's rights.
    calls = Channel(server)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await calls.close()

    # Without pages of documentation, whose scripts would come from elsewhere.
    app = FastAPI(
        title="alignd", description="OpenAI's API for completions, and feedback on them.", lifespan=lifespan,
        docs_url=None, redoc_url=None,
    )  # fmt: skip
    needs_key = config.needs_key(forwarded=False)
    app.openapi = cache(partial(document.document, app, needs_key=needs_key))  # type: ignore[method-assign]
    _add_middleware(app, config)

    def inference() -> Any:
        return inference_service_pb2_grpc.InferenceServiceStub(calls.open())

    def feedback() -> Any:
        return feedback_service_pb2_grpc.FeedbackServiceStub(calls.open())

    def per_call(request: Request) -> dict[str, Any]:
        metadata = [("x-request-id", request.state.request_id)]
        if request.state.key:
            metadata.append(("authorization", request.state.key))
        return {"timeout": config.timeout_seconds, "metadata": metadata}

    async def complete(
        request: Request, body: ChatRequest | CompletionRequest, sample: inference_service_pb2.StreamSampleRequest
    ) -> Response:
        request.state.names = names(body)
        if body.stream:
            return await _stream(request, body, inference().StreamSample(sample, **per_call(request)))
        whole = inference_service_pb2.SampleRequest.FromString(sample.SerializeToString())
        answer = await _unless_gone(request, inference().Sample(whole, **per_call(request)))
        return JSONResponse(answers.completion(body, answer))

    @app.post(
        "/v1/chat/completions", tags=["completions"], response_model=shapes.ChatCompletion,
        responses={**document.errors(400, 404, 409, 413, 429), **document.streams(shapes.ChatChunk)},
    )  # fmt: skip
    async def chat_completions(request: Request, body: ChatRequest, key: _WithKey) -> Response:
        """Completes a chat. OpenAI's parameters, as far as they are listed; others are refused by name."""
        return await complete(request, body, chat_sample(body))

    @app.post(
        "/v1/completions", tags=["completions"], response_model=shapes.TextCompletion,
        responses={**document.errors(400, 404, 409, 413, 429), **document.streams(shapes.TextChunk)},
    )  # fmt: skip
    async def completions(request: Request, body: CompletionRequest, key: _WithKey) -> Response:
        """Completes a text, without the policy's chat template."""
        return await complete(request, body, text_sample(body))

    @app.get("/v1/models", tags=["completions"], response_model=shapes.ModelList, responses=document.errors())
    async def list_models(request: Request, key: _WithKey) -> Response:
        """Lists what `model` may be."""
        found = await inference().ListModels(inference_service_pb2.ListModelsRequest(), **per_call(request))
        return JSONResponse(answers.models(found.models))

    @app.get(
        "/v1/models/{model}", tags=["completions"], response_model=shapes.ModelAnswer, responses=document.errors(404)
    )
    async def get_model(request: Request, model: str, key: _WithKey) -> Response:
        """Returns one model."""
        found = await inference().ListModels(inference_service_pb2.ListModelsRequest(), **per_call(request))
        data = [each for each in answers.models(found.models)["data"] if each["id"] == model]
        return JSONResponse(data[0]) if data else errors.error(404, f"there is no {model}", "no_such_policy", "model")

    @app.post(
        "/v1/feedback/rankings", tags=["feedback"], response_model=shapes.RankingAnswer,
        responses=document.errors(400, 409, 413, 429),
    )  # fmt: skip
    async def submit_ranking(request: Request, body: RankingRequest, key: _WithKey) -> Response:
        """Submits how a user ranks completions. It is durable when this answers."""
        done = await feedback().SubmitRanking(ranking(body), **per_call(request))
        return JSONResponse(MessageToDict(done, preserving_proto_field_name=True))

    @app.post(
        "/v1/feedback/demonstrations", tags=["feedback"], response_model=shapes.DemonstrationAnswer,
        responses=document.errors(400, 409, 413, 429),
    )  # fmt: skip
    async def submit_demonstration(request: Request, body: DemonstrationRequest, key: _WithKey) -> Response:
        """Submits the completion that a user would have wanted. It is durable when this answers."""
        done = await feedback().SubmitDemonstration(demonstration(body), **per_call(request))
        return JSONResponse(MessageToDict(done, preserving_proto_field_name=True))

    @app.get("/health", tags=["operations"], response_model=shapes.Health, responses=document.health_answers())
    async def health(request: Request) -> Response:
        """Says whether the server behind the gateway serves: 200, or 503."""
        stub: Any = health_pb2_grpc.HealthStub(calls.open())
        try:
            answer = await stub.Check(health_pb2.HealthCheckRequest(), timeout=_HEALTH_SECONDS)
            status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
        except grpc.aio.AioRpcError:
            status = "UNREACHABLE"
        return JSONResponse({"status": status}, 200 if status == "SERVING" else 503)

    return app


def _add_middleware(app: FastAPI, config: GatewayConfig) -> None:
    @app.exception_handler(grpc.aio.AioRpcError)
    async def on_refusal(request: Request, failed: grpc.aio.AioRpcError) -> Response:
        return errors.refused(failed, request.state.names)

    @app.exception_handler(BadParamError)
    async def on_bad_param(request: Request, failed: BadParamError) -> Response:
        return errors.error(400, str(failed), "invalid_parameter", failed.param)

    @app.exception_handler(UnicodeEncodeError)
    async def on_surrogate(request: Request, failed: UnicodeEncodeError) -> Response:
        return errors.error(400, "a text has half of a surrogate pair, which is no character", "invalid_parameter")

    @app.exception_handler(Exception)
    async def on_fault(request: Request, failed: Exception) -> Response:
        # Without its text, which may quote the caller.
        logger.error("request %s failed: %s", request.state.request_id, type(failed).__name__)
        return errors.error(500, "the gateway failed; its log says why", "internal")

    @app.exception_handler(RequestValidationError)
    async def on_invalid(request: Request, failed: RequestValidationError) -> Response:
        return errors.invalid(failed.errors())

    @app.exception_handler(HTTPException)
    async def on_http(request: Request, failed: HTTPException) -> Response:
        headers = dict(failed.headers or {})
        return errors.error(failed.status_code, str(failed.detail), headers=headers)

    @app.middleware("http")
    async def identify(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        given = request.headers.get("x-request-id", "")
        request.state.names = {}
        request.state.request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex
        response = _kept_out(request, config) or await call_next(request)
        response.headers["x-request-id"] = request.state.request_id
        return response

    app.add_middleware(BodyLimit, max_bytes=config.max_body_mib << 20)
    if config.allowed_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(config.allowed_origins), allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"],
            expose_headers=["x-request-id", "retry-after"],
        )  # fmt: skip


def _kept_out(request: Request, config: GatewayConfig) -> Response | None:
    """Notes the caller's key, and returns the answer to one who may not come in.

    Where no key is needed, a page of another site must not come in by a name of its own that leads here (DNS
    rebinding), and nobody whom a proxy has let through.
    """
    key = request.headers.get("authorization", "").strip()
    forwarded = any(name in request.headers for name in _FORWARDED)
    needs_key = config.needs_key(forwarded=forwarded) and request.url.path.startswith("/v1/")
    request.state.key = key
    if needs_key and not key:
        why = "send an API key as the header `Authorization: Bearer KEY`"
        return errors.error(401, why, "no_api_key", headers={"WWW-Authenticate": "Bearer"})
    if not key.isascii():
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


async def _unless_gone(request: Request, call: Coroutine[Any, Any, _T] | Awaitable[_T]) -> _T:
    """Returns the answer to a call, which is cancelled if the caller goes away."""
    calling = asyncio.ensure_future(call)
    leaving = asyncio.ensure_future(_gone(request))
    try:
        await asyncio.wait({calling, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not calling.done():
            raise HTTPException(499, "the caller has gone")
        return calling.result()
    finally:
        for task in (calling, leaving):
            task.cancel()


async def _gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


async def _stream(request: Request, body: ChatRequest | CompletionRequest, call: Any) -> Response:
    """Returns a stream of server-sent events. A call that is refused at once has its status and no stream."""
    events = aiter(call)
    try:
        first = await _unless_gone(request, _first(events))
    except BaseException:
        call.cancel()
        raise

    async def chunks() -> AsyncIterator[dict[str, str]]:
        sample_id, spoken = "", set[int]()
        message = first
        try:
            while message is not None:
                if message.HasField("started"):
                    sample_id = message.started.sample_id
                for delta in message.deltas.deltas:
                    if delta.text:
                        yield _event(answers.text_chunk(body, sample_id, delta, first=delta.index not in spoken))
                        spoken.add(delta.index)
                if message.HasField("finished"):
                    for each in answers.last_chunks(body, message.finished):
                        yield _event(each)
                message = await anext(events, None)
            yield {"data": _DONE}
        except grpc.aio.AioRpcError as failed:
            # The status of the whole is sent already.
            yield _event(errors.explained(failed, request.state.names)[1])
        finally:
            call.cancel()

    return EventSourceResponse(chunks(), ping=_PING_SECONDS)


async def _first(events: AsyncIterator[_T]) -> _T | None:
    return await anext(events, None)


def _event(data: Mapping[str, Any]) -> dict[str, str]:
    return {"data": json.dumps(data, ensure_ascii=False)}
