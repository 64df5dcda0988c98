"""The gateway's routes: each is one call of the gRPC server."""

from __future__ import annotations

from typing import Annotated, Any

import grpc
from fastapi import APIRouter, Depends, Request
from fastapi.security import HTTPBearer
from google.protobuf.json_format import MessageToDict
from grpc_health.v1 import health_pb2
from starlette.responses import JSONResponse, Response

from alignd.v1 import inference_service_pb2
from serving.gateway import answers, document, errors, requests, shapes
from serving.gateway.calls import Calls
from serving.gateway.requests import ChatRequest, CompletionRequest, DemonstrationRequest, RankingRequest
from serving.gateway.streaming import stream, unless_gone

HEALTH = "/health"
_HEALTH_SECONDS = 5.0

_bearer = HTTPBearer(auto_error=False, description="An API key of `alignd keys create`.")
_WithKey = Annotated[Any, Depends(_bearer)]


def completions(calls: Calls) -> APIRouter:
    """Returns the routes of completions."""
    router = APIRouter(prefix="/v1", tags=["completions"])
    faults = document.errors(400, 404, 409, 413, 429)

    @router.post(
        "/chat/completions", response_model=shapes.ChatCompletion,
        responses={**faults, **document.streams(shapes.ChatChunk)},
    )  # fmt: skip
    async def chat_completions(request: Request, body: ChatRequest, key: _WithKey) -> Response:
        """Completes a chat. OpenAI's parameters, as far as they are listed; others are refused by name."""
        return await _complete(calls, request, body, requests.chat_sample(body))

    @router.post(
        "/completions", response_model=shapes.TextCompletion,
        responses={**faults, **document.streams(shapes.TextChunk)},
    )  # fmt: skip
    async def text_completions(request: Request, body: CompletionRequest, key: _WithKey) -> Response:
        """Completes a text, without the policy's chat template."""
        return await _complete(calls, request, body, requests.text_sample(body))

    return router


async def _complete(
    calls: Calls,
    request: Request,
    body: ChatRequest | CompletionRequest,
    sample: inference_service_pb2.StreamSampleRequest,
) -> Response:
    request.state.names = requests.names(body)
    options = calls.options(request)
    if body.stream:
        return await stream(request, body, calls.inference().StreamSample(sample, **options))
    whole = inference_service_pb2.SampleRequest.FromString(sample.SerializeToString())
    answer = await unless_gone(request, calls.inference().Sample(whole, **options))
    return JSONResponse(answers.completion(body, answer))


def models(calls: Calls) -> APIRouter:
    """Returns the routes that say what `model` may be."""
    router = APIRouter(prefix="/v1/models", tags=["completions"])

    async def found(request: Request) -> dict[str, Any]:
        listed = inference_service_pb2.ListModelsRequest()
        return answers.models((await calls.inference().ListModels(listed, **calls.options(request))).models)

    @router.get("", response_model=shapes.ModelList, responses=document.errors())
    async def list_models(request: Request, key: _WithKey) -> Response:
        """Lists what `model` may be."""
        return JSONResponse(await found(request))

    @router.get("/{model}", response_model=shapes.ModelAnswer, responses=document.errors(404))
    async def get_model(request: Request, model: str, key: _WithKey) -> Response:
        """Returns one model."""
        data = [each for each in (await found(request))["data"] if each["id"] == model]
        return JSONResponse(data[0]) if data else errors.error(404, f"there is no {model}", "no_such_policy", "model")

    return router


def feedback(calls: Calls) -> APIRouter:
    """Returns the routes that take feedback."""
    router = APIRouter(prefix="/v1/feedback", tags=["feedback"])
    faults = document.errors(400, 409, 413, 429)

    @router.post("/rankings", response_model=shapes.RankingAnswer, responses=faults)
    async def submit_ranking(request: Request, body: RankingRequest, key: _WithKey) -> Response:
        """Submits how a user ranks completions. It is durable when this answers."""
        done = await calls.feedback().SubmitRanking(requests.ranking(body), **calls.options(request))
        return JSONResponse(MessageToDict(done, preserving_proto_field_name=True))

    @router.post("/demonstrations", response_model=shapes.DemonstrationAnswer, responses=faults)
    async def submit_demonstration(request: Request, body: DemonstrationRequest, key: _WithKey) -> Response:
        """Submits the completion that a user would have wanted. It is durable when this answers."""
        done = await calls.feedback().SubmitDemonstration(requests.demonstration(body), **calls.options(request))
        return JSONResponse(MessageToDict(done, preserving_proto_field_name=True))

    return router


def health(calls: Calls) -> APIRouter:
    """Returns the route for what watches the gateway."""
    router = APIRouter(tags=["operations"])

    @router.get(HEALTH, response_model=shapes.Health, responses=document.health_answers())
    async def get_health(request: Request) -> Response:
        """Says whether the server behind the gateway serves: 200, or 503."""
        try:
            answer = await calls.health().Check(health_pb2.HealthCheckRequest(), timeout=_HEALTH_SECONDS)
            status = health_pb2.HealthCheckResponse.ServingStatus.Name(answer.status)
        except grpc.aio.AioRpcError:
            status = "UNREACHABLE"
        return JSONResponse({"status": status}, 200 if status == "SERVING" else 503)

    return router
