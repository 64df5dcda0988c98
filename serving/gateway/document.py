"""The OpenAPI document: which answers each route has, whole and as a stream."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from serving.gateway.shapes import ChatChunk, ErrorAnswer, Health, TextChunk

Answers = dict[int | str, dict[str, Any]]

_REFERENCE = "#/components/schemas/{model}"
_STREAMED = (ChatChunk, TextChunk)
# What FastAPI answers to a body that is not as described. The gateway answers 400, as OpenAI does.
_NOT_ANSWERED, _ITS_SHAPES = "422", ("HTTPValidationError", "ValidationError")
_ERRORS = {
    400: "A parameter is not supported, or has a bad value; `param` names it.",
    401: "The API key is missing, unknown, revoked or expired.",
    403: "The API key has not the scope, or the feedback token is another's.",
    404: "There is no such model.",
    409: "The request id was used with other contents.",
    413: "The body is too long.",
    421: "Without an API key, the gateway was called by another name than localhost.",
    429: "A limit is reached, or there is no room; Retry-After says when to ask again.",
    500: "The gateway or the server failed; its log says why.",
    503: "The server is starting or stopping, or does not answer.",
    504: "It took too long.",
}
_ALWAYS = (401, 403, 421, 500, 503, 504)


def errors(*statuses: int) -> Answers:
    """Returns these answers of a route, and those that any call of the server may have."""
    return {each: {"model": ErrorAnswer, "description": _ERRORS[each]} for each in sorted({*statuses, *_ALWAYS})}


def streams(chunk: type[BaseModel]) -> Answers:
    """Returns the answer of a route that has a stream too, of chunks of this shape."""
    shapes = [{"$ref": _REFERENCE.format(model=each.__name__)} for each in (chunk, ErrorAnswer)]
    data = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": shapes}}
    event = {
        "description": "An event. The last one's data is [DONE], or an error if the stream failed.",
        "type": "object",
        "properties": {"data": {"anyOf": [{"const": "[DONE]"}, data]}},
        "required": ["data"],
    }
    said = "The completions; with `stream`, their text as it is written, as server-sent events."
    return {200: {"description": said, "content": {"text/event-stream": {"schema": event}}}}


def health_answers() -> Answers:
    """Returns what /health may answer beside 200."""
    return {
        421: {"model": ErrorAnswer, "description": _ERRORS[421]},
        503: {"model": Health, "description": "The server does not serve."},
    }


def document(app: FastAPI, *, needs_key: bool) -> dict[str, Any]:
    """Returns the OpenAPI document of an application, with the shapes that only streams have.

    `needs_key` is whether every caller needs an API key.
    """
    made = get_openapi(
        title=app.title, version=app.version, description=app.description, routes=app.routes, tags=app.openapi_tags
    )
    for methods in made["paths"].values():
        for operation in methods.values():
            operation["responses"].pop(_NOT_ANSWERED, None)
            if "security" in operation and not needs_key:
                operation["security"].append({})
    schemas = made["components"]["schemas"]
    for name in _ITS_SHAPES:
        schemas.pop(name, None)
    _, streamed = models_json_schema([(each, "serialization") for each in _STREAMED], ref_template=_REFERENCE)
    made["components"]["schemas"] = dict(sorted({**streamed["$defs"], **schemas}.items()))
    return made
