"""What the gateway takes: OpenAI's requests, as far as they can be kept, and feedback. All else is refused by name.

Each is turned into the request of the gRPC contract, which checks the values.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from alignd.v1 import feedback_service_pb2, inference_service_pb2, types_pb2

ANONYMOUS = "anonymous"
_ROLES = {
    "system": types_pb2.ROLE_SYSTEM,
    "developer": types_pb2.ROLE_SYSTEM,
    "user": types_pb2.ROLE_USER,
    "assistant": types_pb2.ROLE_ASSISTANT,
}
_PRIORITIES = {"flex": inference_service_pb2.PRIORITY_BATCH}
_INT32, _INT64 = 2**31, 2**63


def _whole(value: object) -> object:
    """Returns 2 for 2.0, which JSON does not tell apart."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


_Whole = BeforeValidator(_whole)
Int32 = Annotated[int, _Whole, Field(ge=-_INT32, lt=_INT32)]
Count = Annotated[int, _Whole, Field(ge=0, lt=_INT32)]
Seed = Annotated[int, _Whole, Field(ge=0, lt=_INT64)]


class _Body(BaseModel):
    """A body whose fields are all known, and of the types that they have: true is no temperature, and "2" no n."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class TextPart(_Body):
    """A part of a message. Only text is supported."""

    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    """A turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart]
    name: str | None = Field(None, max_length=64, description="Taken, and not read.")


class JsonSchema(_Body):
    """A JSON schema with a name."""

    name: str
    schema_: dict[str, Any] = Field(alias="schema")
    strict: bool | None = None
    description: str | None = None


class ResponseFormat(_Body):
    """The form that completions must have."""

    type: Literal["text", "json_schema"]
    json_schema: JsonSchema | None = None


class StreamOptions(_Body):
    """How to stream."""

    include_usage: bool = False


class _Sampling(_Body):
    """What both kinds of completions take."""

    model: str = Field("live", description="`live`, or a version such as `v7`.")
    n: Count = Field(1, description="Completions, 1 to 16. A ranking needs two.")
    stream: bool = False
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    seed: Seed | None = None
    max_tokens: Int32 | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: Int32 | None = None
    min_p: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    ignore_eos: bool = False
    regex: str | None = Field(None, description="A regular expression that each completion matches.")
    user: str = Field(ANONYMOUS, description="The application's user, to whom rankings are attributed.")
    store: bool | None = Field(None, description="Whether the sample is kept, to be ranked. Default: true.")
    request_id: str = Field("", description="A UUID: a request with it that is sent again returns the first answer.")
    service_tier: Literal["auto", "default", "flex"] | None = Field(
        None, description="`flex` for programs that can wait: refused first where there is no room."
    )


class ChatRequest(_Sampling):
    """The body of /v1/chat/completions."""

    messages: list[ChatMessage]
    max_completion_tokens: Int32 | None = None
    logprobs: bool | None = None
    top_logprobs: Int32 | None = None
    response_format: ResponseFormat | None = None


class CompletionRequest(_Sampling):
    """The body of /v1/completions."""

    prompt: str
    logprobs: Int32 | None = None
    echo: bool = Field(
        False,
        description="Whether the text begins with the prompt. With `logprobs`, there are those of the prompt's tokens "
        "too, the sample is not stored, and max_tokens may be 0.",
    )


class RankingRequest(_Body):
    """The body of /v1/feedback/rankings."""

    feedback_token: str = Field(description="`alignd.feedback_token` of the answer that is ranked.")
    ranking: list[str | list[str]] = Field(
        description="All completion ids, best first; ids in an inner list are a tie."
    )
    user: str = ANONYMOUS
    shown: list[str] = Field([], description="The ids in the order in which the user saw them.")
    comment: str = ""
    request_id: str = Field("", description="A UUID by which a ranking that is sent again counts once.")


class DemonstrationRequest(_Body):
    """The body of /v1/feedback/demonstrations."""

    feedback_token: str
    text: str = Field(description="The completion that the user would have wanted.")
    user: str = ANONYMOUS
    request_id: str = ""


class BadParamError(Exception):
    """A parameter has a value that cannot be kept."""

    def __init__(self, param: str, message: str) -> None:
        super().__init__(f"{param}: {message}")
        self.param = param


def chat_sample(body: ChatRequest) -> inference_service_pb2.StreamSampleRequest:
    """Returns the sample that a chat completion asks for.

    Raises:
        BadParamError: two parameters do not go together.
    """
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise BadParamError("max_completion_tokens", "is max_tokens by its newer name: send one of them")
    if body.top_logprobs is not None and not body.logprobs:
        raise BadParamError("top_logprobs", "needs logprobs = true")
    messages = [types_pb2.Message(role=_ROLES[m.role], content=_text(m.content)) for m in body.messages]
    request = _sample(body, types_pb2.Prompt(chat=types_pb2.Chat(messages=messages)))
    if body.max_completion_tokens is not None:
        request.sampling.max_tokens = body.max_completion_tokens
    if body.logprobs:
        request.top_logprobs = body.top_logprobs or 0
    form = body.response_format
    if form and (form.type == "json_schema") != (form.json_schema is not None):
        raise BadParamError("response_format.json_schema", "goes with the type json_schema, and only with it")
    if form and form.json_schema:
        if body.regex:
            raise BadParamError("regex", "does not go with response_format")
        request.sampling.structured.json_schema = json.dumps(form.json_schema.schema_)
    return request


def text_sample(body: CompletionRequest) -> inference_service_pb2.StreamSampleRequest:
    """Returns the sample that a text completion asks for.

    Raises:
        BadParamError: two parameters do not go together.
    """
    if body.echo and body.stream:
        raise BadParamError("echo", "does not go with stream = true")
    request = _sample(body, types_pb2.Prompt(text=body.prompt))
    if body.logprobs is not None:
        request.top_logprobs = body.logprobs
    if measures(body):
        _measure(body, request)
    return request


def measures(body: ChatRequest | CompletionRequest) -> bool:
    """Whether a request asks how likely its prompt is, as evaluations do, and not for something to rank."""
    return isinstance(body, CompletionRequest) and body.echo and body.logprobs is not None


def _measure(body: CompletionRequest, request: inference_service_pb2.StreamSampleRequest) -> None:
    if body.store:
        raise BadParamError("store", "does not go with echo and logprobs: nothing is there to be ranked")
    if body.n > 1:
        raise BadParamError("n", "must be 1 with echo and logprobs")
    request.prompt_logprobs = request.top_logprobs
    request.store = False
    if body.max_tokens == 0:
        # The engine draws one in any case, which the answer leaves out.
        request.sampling.max_tokens = 1


def names(body: ChatRequest | CompletionRequest) -> dict[str, str]:
    """Returns those of the gRPC contract's fields that this body calls otherwise than most, by their names there."""
    found = {"sampling.structured": "regex"} if body.regex is not None else {}
    if isinstance(body, CompletionRequest):
        return {"top_logprobs": "logprobs", "prompt_logprobs": "logprobs", **found}
    if body.max_completion_tokens is not None:
        found["sampling.max_tokens"] = "max_completion_tokens"
    return {"prompt": "messages", **found}


def ranking(body: RankingRequest) -> feedback_service_pb2.SubmitRankingRequest:
    """Returns the ranking that a body submits."""
    groups = [[each] if isinstance(each, str) else each for each in body.ranking]
    return feedback_service_pb2.SubmitRankingRequest(
        request_id=body.request_id or str(uuid.uuid4()),
        feedback_token=body.feedback_token,
        user_id=body.user,
        groups=[types_pb2.RankingGroup(completion_ids=ids) for ids in groups],
        shown_completion_ids=body.shown,
        comment=body.comment,
    )


def demonstration(body: DemonstrationRequest) -> feedback_service_pb2.SubmitDemonstrationRequest:
    """Returns the demonstration that a body submits."""
    return feedback_service_pb2.SubmitDemonstrationRequest(
        request_id=body.request_id or str(uuid.uuid4()),
        feedback_token=body.feedback_token,
        user_id=body.user,
        text=body.text,
    )


def _sample(body: _Sampling, prompt: types_pb2.Prompt) -> inference_service_pb2.StreamSampleRequest:
    if body.stream_options is not None and not body.stream:
        raise BadParamError("stream_options", "needs stream = true")
    stop: Sequence[str] = [body.stop] if isinstance(body.stop, str) else body.stop or []
    given = {
        name: getattr(body, name)
        for name in (
            "temperature", "top_p", "max_tokens", "seed", "top_k", "min_p", "presence_penalty", "frequency_penalty",
            "repetition_penalty",
        )
        if getattr(body, name) is not None
    }  # fmt: skip
    sampling = types_pb2.SamplingParams(**given, stop=stop, ignore_eos=body.ignore_eos)
    if body.regex is not None:
        sampling.structured.regex = body.regex
    request = inference_service_pb2.StreamSampleRequest(
        user_id=body.user,
        prompt=prompt,
        num_completions=body.n,
        sampling=sampling,
        policy=body.model,
        request_id=body.request_id,
        priority=_PRIORITIES.get(body.service_tier or "", inference_service_pb2.PRIORITY_UNSPECIFIED),
    )
    if body.store is not None:
        request.store = body.store
    return request


def _text(content: str | Sequence[TextPart]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
