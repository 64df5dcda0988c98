"""Makes requests of what an application has at hand, and reads a stream's events; the same for both clients."""

import uuid
from collections.abc import Mapping, Sequence

import grpc

from alignd.client.errors import AligndError
from alignd.v1.feedback_service_pb2 import SubmitDemonstrationRequest, SubmitRankingRequest
from alignd.v1.inference_service_pb2 import (
    CompletionDelta,
    SampleRequest,
    SampleResponse,
    StreamSampleRequest,
    StreamSampleResponse,
)
from alignd.v1.types_pb2 import (
    ROLE_ASSISTANT,
    ROLE_SYSTEM,
    ROLE_USER,
    Chat,
    Message,
    Prompt,
    RankingGroup,
    Role,
    SamplingParams,
)

_ROLES: Mapping[str, Role] = {"system": ROLE_SYSTEM, "user": ROLE_USER, "assistant": ROLE_ASSISTANT}

PromptLike = str | Sequence[Message | Mapping[str, str]] | Prompt
"""What the user says, as a string; or the conversation, oldest turn first; or the contract's own Prompt.

If the last turn of a conversation is the assistant's, completions continue it.
"""
Ranking = Sequence[str | Sequence[str]]
"""Completion ids, best first; ids in an inner list are equally good."""


def sample_request(
    prompt: PromptLike,
    user_id: str,
    num_completions: int,
    sampling: SamplingParams | None,
    policy: str,
    return_token_ids: bool = False,
) -> SampleRequest:
    """Returns a request for completions.

    Raises:
        ValueError: a message has no known role, or no text.
    """
    return SampleRequest(
        user_id=user_id,
        prompt=as_prompt(prompt),
        num_completions=num_completions,
        sampling=sampling,
        policy=policy,
        return_token_ids=return_token_ids,
    )


def stream_request(
    prompt: PromptLike,
    user_id: str,
    num_completions: int,
    sampling: SamplingParams | None,
    policy: str,
    return_token_ids: bool = False,
) -> StreamSampleRequest:
    """Returns a request for streamed completions.

    Raises:
        ValueError: a message has no known role, or no text.
    """
    return StreamSampleRequest(
        user_id=user_id,
        prompt=as_prompt(prompt),
        num_completions=num_completions,
        sampling=sampling,
        policy=policy,
        return_token_ids=return_token_ids,
    )


def ranking_request(
    feedback_token: str, best_first: Ranking, user_id: str, shown: Sequence[str], comment: str, request_id: str
) -> SubmitRankingRequest:
    """Returns a ranking with an id of its own, unless one is given.

    Raises:
        TypeError: `best_first` is a single id, not a list of them.
    """
    if isinstance(best_first, str):
        raise TypeError("best_first is a list of completion ids, not one of them")
    groups = [[group] if isinstance(group, str) else group for group in best_first]
    return SubmitRankingRequest(
        request_id=request_id or str(uuid.uuid4()),
        feedback_token=feedback_token,
        user_id=user_id,
        groups=[RankingGroup(completion_ids=group) for group in groups],
        shown_completion_ids=shown,
        comment=comment,
    )


def demonstration_request(feedback_token: str, text: str, user_id: str, request_id: str) -> SubmitDemonstrationRequest:
    """Returns a demonstration with an id of its own, unless one is given."""
    return SubmitDemonstrationRequest(
        request_id=request_id or str(uuid.uuid4()), feedback_token=feedback_token, user_id=user_id, text=text
    )


def as_prompt(prompt: PromptLike) -> Prompt:
    """Returns the contract's Prompt.

    Raises:
        ValueError: a message has no known role, or no text.
    """
    if isinstance(prompt, Prompt):
        return prompt
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return Prompt(chat=Chat(messages=[_as_message(message) for message in messages]))


def _as_message(message: Message | Mapping[str, str]) -> Message:
    if isinstance(message, Message):
        return message
    if message.keys() != {"role", "content"} or message["role"] not in _ROLES:
        raise ValueError(f"a message has a role, one of {', '.join(_ROLES)}, and content; not {dict(message)}")
    return Message(role=_ROLES[message["role"]], content=message["content"])


def read_event(event: StreamSampleResponse) -> Sequence[CompletionDelta | SampleResponse]:
    """Returns what an event of a stream holds for the application; nothing, where it is of another kind."""
    kind = event.WhichOneof("event")
    if kind == "deltas":
        return event.deltas.deltas
    return [event.finished] if kind == "finished" else []


def unfinished() -> AligndError:
    """Returns the error of a stream that ended well, but without the sample."""
    return AligndError(
        grpc.StatusCode.DATA_LOSS, "the stream ended without the sample; its completions cannot be ranked"
    )
