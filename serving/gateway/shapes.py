"""The shapes of what the gateway answers, for the OpenAPI document: clients are made from it, and tests hold it.

serving.gateway.answers makes them.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field

FinishReason = Literal["stop", "length"]


class Error(BaseModel):
    """What was wrong."""

    message: str
    type: str
    param: str | None = Field(description="The parameter at fault.")
    code: str | None = Field(description="The reason, for programs.")


class ErrorAnswer(BaseModel):
    """An error."""

    error: Error


class Usage(BaseModel):
    """How many tokens were read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class SampleNote(BaseModel):
    """The sample, and the right to rank it."""

    sample_id: str
    feedback_token: str | None = Field(description="For /v1/feedback. Null if the sample is not stored.")
    expires: str | None = Field(description="When the token expires, as ISO 8601.")


class CompletionNote(BaseModel):
    """What names a completion in a ranking, and the policy version that wrote it."""

    completion_id: str
    policy_version: int


class TokenLogprob(BaseModel):
    """A token of a chat's completion, and its log-probability in nats."""

    token: str
    logprob: float
    bytes: list[int] | None


class RankedTokenLogprob(BaseModel):
    """A token of a chat's completion, with the likeliest ones at its place."""

    token: str
    logprob: float
    bytes: list[int] | None
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    """The log-probabilities of a chat's completion."""

    content: list[RankedTokenLogprob]


class TextLogprobs(BaseModel):
    """The log-probabilities of a text's completion."""

    tokens: list[str]
    token_logprobs: list[float | None] = Field(description="Null for the first token of an echoed prompt.")
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int] = Field(
        description="Where each token begins, in characters, where tokens are whole characters."
    )


class ChatAnswerMessage(BaseModel):
    """What the policy says."""

    role: Literal["assistant"]
    content: str


class ChatChoice(BaseModel):
    """A completion of a chat."""

    index: int
    message: ChatAnswerMessage
    finish_reason: FinishReason | None
    logprobs: ChatLogprobs | None
    alignd: CompletionNote


class TextChoice(BaseModel):
    """A completion of a text."""

    index: int
    text: str
    finish_reason: FinishReason | None
    logprobs: TextLogprobs | None
    alignd: CompletionNote


class ChatCompletion(BaseModel):
    """The completions of a chat."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    alignd: SampleNote


class TextCompletion(BaseModel):
    """The completions of a text."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChoice]
    usage: Usage
    alignd: SampleNote


class ChatDelta(BaseModel):
    """New text. Its completion's first one has the role, its last one nothing."""

    role: Literal["assistant"] = "assistant"
    content: str = ""


class ChatChunkChoice(BaseModel):
    """New text of a completion, or its end, which has all but the text."""

    index: int
    delta: ChatDelta
    finish_reason: FinishReason | None
    logprobs: ChatLogprobs | None = None
    alignd: CompletionNote | None = None


class ChatChunk(BaseModel):
    """A part of a chat's stream. The last one before [DONE] has `alignd`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
    alignd: SampleNote | None = None


class TextChunkChoice(BaseModel):
    """New text of a completion, or its end."""

    index: int
    text: str
    finish_reason: FinishReason | None
    logprobs: TextLogprobs | None = None
    alignd: CompletionNote | None = None


class TextChunk(BaseModel):
    """A part of a text's stream. The last one before [DONE] has `alignd`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[TextChunkChoice]
    usage: Usage | None = None
    alignd: SampleNote | None = None


class ModelNote(BaseModel):
    """The policy version that a name stands for now."""

    version: int
    weight_digest: str


class ModelAnswer(BaseModel):
    """What `model` may be."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    alignd: ModelNote


class ModelList(BaseModel):
    """All that `model` may be."""

    object: Literal["list"]
    data: list[ModelAnswer]


class RankingAnswer(BaseModel):
    """The ranking is durable."""

    ranking_id: str
    acknowledge_time: str


class DemonstrationAnswer(BaseModel):
    """The demonstration is durable."""

    demonstration_id: str
    acknowledge_time: str


class Health(BaseModel):
    """Whether the server behind the gateway serves."""

    status: str
