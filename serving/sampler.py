"""Draws one sample: turns a request into an engine's draw, and the text into completions with ids and a feedback token.

It knows neither gRPC nor the bus: what it yields is what the two RPCs of InferenceService send.
"""

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import jinja2
from google.protobuf.timestamp_pb2 import Timestamp

from alignd.v1 import feedback_token_pb2, inference_service_pb2, types_pb2
from alignd.v1.types_pb2 import FINISH_REASON_UNSPECIFIED, FinishReason
from feedback import token
from policies.rendering import prompt_token_ids
from serving.errors import bad_field, exhausted
from serving.slot import Hold
from serving.vllm_engine import Delta, Draw, Engine

Request = inference_service_pb2.SampleRequest | inference_service_pb2.StreamSampleRequest


@dataclass(frozen=True)
class Plan:
    """A request that was checked against the engine: its prompt in tokens, and how to draw."""

    token_ids: list[int]
    draw: Draw


@dataclass
class Draft:
    """A completion that is being written."""

    text: list[str] = field(default_factory=list)
    num_tokens: int = 0
    finish_reason: FinishReason = FINISH_REASON_UNSPECIFIED


class Quota:
    """Limits how many completions are generated at a time."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.taken = 0

    def take(self, count: int) -> None:
        """Reserves room for `count` completions; give_back() returns it.

        Raises:
            Refusal: RESOURCE_EXHAUSTED, with a retry delay, if there is no room.
        """
        if self.taken + count > self.limit:
            raise exhausted("TOO_MANY_COMPLETIONS", f"{self.taken} of {self.limit} completions are in flight")
        self.taken += count

    def give_back(self, count: int) -> None:
        """Returns room."""
        self.taken -= count


def plan(request: Request, engine: Engine, default_max_tokens: int) -> Plan:
    """Returns what to draw for `request`.

    Raises:
        Refusal: INVALID_ARGUMENT if the prompt cannot be rendered or does not fit the context.
    """
    token_ids = render(request.prompt, engine)
    room = engine.max_model_len - len(token_ids)
    if room < 1:
        raise bad_field(
            "prompt", f"has {len(token_ids)} tokens; at most {engine.max_model_len - 1} leave room for a completion"
        )
    sampling = request.sampling
    max_tokens = sampling.max_tokens if sampling.HasField("max_tokens") else min(default_max_tokens, room)
    if max_tokens > room:
        raise bad_field(
            "sampling.max_tokens", f"{max_tokens} does not fit: the prompt's {len(token_ids)} tokens leave {room}"
        )
    draw = Draw(
        num_completions=request.num_completions,
        temperature=sampling.temperature if sampling.HasField("temperature") else 1.0,
        top_p=sampling.top_p if sampling.HasField("top_p") else 1.0,
        max_tokens=max_tokens,
        stop=tuple(sampling.stop),
        seed=sampling.seed if sampling.HasField("seed") else None,
    )
    return Plan(token_ids, draw)


def render(prompt: types_pb2.Prompt, engine: Engine) -> list[int]:
    """Returns the prompt's tokens, after checks that the contract's rules cannot express.

    Raises:
        Refusal: INVALID_ARGUMENT if the policy's chat template cannot render the prompt.
    """
    if prompt.WhichOneof("content") == "chat":
        if prompt.chat.messages[-1].role != types_pb2.ROLE_USER:
            raise bad_field("prompt.chat.messages", "the last message must be the user's")
        if not engine.tokenizer.chat_template:
            raise bad_field("prompt.chat", "the policy has no chat template; send prompt.text")
    try:
        return prompt_token_ids(engine.tokenizer, prompt)
    except jinja2.TemplateError as error:
        raise bad_field("prompt.chat", f"the policy's chat template refuses it: {error}") from error


async def write(
    engine: Engine, planned: Plan, sample_id: str, hold: Hold, drafts: list[Draft], interval_seconds: float | None
) -> AsyncIterator[inference_service_pb2.CompletionDeltas]:
    """Fills `drafts`, and yields their new text at most every `interval_seconds`; yields nothing if that is None."""
    unsent: dict[int, types_pb2.FinishReason] = {}
    texts: dict[int, str] = {}
    sent_at = 0.0
    generation = engine.generate(
        sample_id, planned.token_ids, planned.draw, hold.policy.weight_digest, stream=interval_seconds is not None
    )
    async for deltas in generation:
        for delta in deltas:
            append(drafts[delta.index], delta)
            texts[delta.index] = texts.get(delta.index, "") + delta.text
            unsent[delta.index] = delta.finish_reason
        if interval_seconds is not None and time.monotonic() - sent_at >= interval_seconds:
            yield as_deltas(texts, unsent)
            texts, unsent, sent_at = {}, {}, time.monotonic()
    if interval_seconds is not None and unsent:
        yield as_deltas(texts, unsent)


def append(draft: Draft, delta: Delta) -> None:
    draft.text.append(delta.text)
    draft.num_tokens += delta.num_tokens
    draft.finish_reason = delta.finish_reason


def as_deltas(texts: dict[int, str], reasons: dict[int, FinishReason]) -> inference_service_pb2.CompletionDeltas:
    return inference_service_pb2.CompletionDeltas(
        deltas=[
            inference_service_pb2.CompletionDelta(index=index, text=texts[index], finish_reason=reasons[index])
            for index in sorted(texts)
        ]
    )


def as_completions(sample_id: str, hold: Hold, drafts: list[Draft]) -> list[types_pb2.Completion]:
    """Returns the finished completions; a completion's id is its sample's and its index."""
    return [
        types_pb2.Completion(
            completion_id=f"{sample_id}.{index}",
            index=index,
            text="".join(draft.text),
            finish_reason=draft.finish_reason,
            policy=hold.policy,
            num_tokens=draft.num_tokens,
            spans_swap=hold.spans_swap,
        )
        for index, draft in enumerate(drafts)
    ]


def sign(
    keyring: token.Keyring, sample_id: str, user_id: str, completions: list[types_pb2.Completion], ttl_seconds: float
) -> tuple[str, Timestamp]:
    """Returns the feedback token of a sample, and when it expires."""
    issued, expires = Timestamp(), Timestamp()
    issued.GetCurrentTime()
    expires.FromNanoseconds(issued.ToNanoseconds() + int(ttl_seconds * 1e9))
    claims = feedback_token_pb2.FeedbackClaims(
        key_id=keyring.current, sample_id=sample_id, user_id=user_id, issue_time=issued, expire_time=expires
    )
    for completion in completions:
        claims.completions.add(completion_id=completion.completion_id, policy_version=completion.policy.version)
    return token.sign(claims, keyring), expires
