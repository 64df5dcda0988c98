"""Draws one sample: turns a request into an engine's draw, and the text into completions with ids and a feedback token.

It knows neither gRPC nor the bus: what it yields is what the two RPCs of InferenceService send.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import jinja2
from google.protobuf.timestamp_pb2 import Timestamp

from alignd.v1 import events_pb2, feedback_token_pb2, inference_service_pb2, types_pb2
from alignd.v1.types_pb2 import FINISH_REASON_UNSPECIFIED, FinishReason
from feedback import token
from feedback.bus.contract import MAX_RECORD_BYTES
from policies.rendering import prompt_token_ids
from serving.drawing import Delta, Draw, Logprob
from serving.errors import bad_field, exhausted
from serving.logprobs import as_logprobs
from serving.slot import Hold
from serving.vllm_engine import Engine

# What is added to the event later (its time, its key, a signature) has room in the rest.
_MAX_EVENT_BYTES = MAX_RECORD_BYTES - 64 * 1024

# The most completions that one request can ask for, so that a batch is never refused for good.
_LARGEST = 16

Priority = inference_service_pb2.Priority
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
    token_ids: list[int] = field(default_factory=list)
    finish_reason: FinishReason = FINISH_REASON_UNSPECIFIED
    end_token_id: int | None = None
    spans_swap: bool = False
    logprobs: list[Sequence[Logprob]] = field(default_factory=list)
    prompt_logprobs: list[Sequence[Logprob]] = field(default_factory=list)


class Quota:
    """Limits how many completions are generated at a time."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.taken = 0

    @contextmanager
    def taken_for(self, count: int, priority: Priority) -> Iterator[None]:
        """Holds room for `count` completions. A batch gets none of the last third.

        Raises:
            Refusal: RESOURCE_EXHAUSTED, with a retry delay, if there is no room.
        """
        is_batch = priority == inference_service_pb2.PRIORITY_BATCH
        limit = max(_LARGEST, self.limit * 2 // 3) if is_batch else self.limit
        if self.taken + count > limit:
            what = f"{limit} that a batch may take" if is_batch else str(limit)
            raise exhausted("TOO_MANY_COMPLETIONS", f"{self.taken} of {what} completions are in flight")
        self.taken += count
        try:
            yield
        finally:
            self.taken -= count


def plan(request: Request, engine: Engine, default_max_tokens: int) -> Plan:
    """Returns what to draw for `request`.

    Raises:
        Refusal: INVALID_ARGUMENT if the prompt cannot be rendered or does not fit the context.
    """
    token_ids = render(request.prompt, engine)
    _check_vocabulary(token_ids, engine)
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
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty if sampling.HasField("repetition_penalty") else 1.0,
        ignore_eos=sampling.ignore_eos,
        json_schema=sampling.structured.json_schema,
        regex=sampling.structured.regex,
        top_logprobs=request.top_logprobs if request.HasField("top_logprobs") else None,
        prompt_logprobs=request.prompt_logprobs if request.HasField("prompt_logprobs") else None,
    )
    return Plan(token_ids, draw)


def _check_vocabulary(token_ids: list[int], engine: Engine) -> None:
    """Refuses tokens that the tokenizer has and the model does not: one of them would end the engine.

    Raises:
        Refusal: INVALID_ARGUMENT, naming the first of them.
    """
    beyond = next((token_id for token_id in token_ids if token_id >= engine.vocabulary), None)
    if beyond is not None:
        token = engine.tokenizer.convert_ids_to_tokens(beyond)
        raise bad_field(
            "prompt", f"has token {token!r} ({beyond}), which the model does not have: it has {engine.vocabulary}"
        )


def render(prompt: types_pb2.Prompt, engine: Engine) -> list[int]:
    """Returns the prompt's tokens, after checks that the contract's rules cannot express.

    Raises:
        Refusal: INVALID_ARGUMENT if the policy's chat template cannot render the prompt.
    """
    if prompt.WhichOneof("content") == "chat":
        _check_turns(prompt.chat)
        if not engine.tokenizer.chat_template:
            raise bad_field("prompt.chat", "the policy has no chat template; send prompt.text")
    try:
        return prompt_token_ids(engine.tokenizer, prompt)
    except jinja2.TemplateError as error:
        if prompt.WhichOneof("content") == "text":
            raise bad_field("prompt.text", f"cannot be encoded: {error}") from error
        raise bad_field("prompt.chat", f"the policy's chat template refuses it: {error}") from error


def _check_turns(chat: types_pb2.Chat) -> None:
    """Checks who speaks last, and that every turn has a text that must have one.

    Raises:
        Refusal: INVALID_ARGUMENT.
    """
    last = len(chat.messages) - 1
    if chat.messages[last].role not in (types_pb2.ROLE_USER, types_pb2.ROLE_ASSISTANT):
        raise bad_field(
            "prompt.chat.messages", "the last message must be the user's, or the assistant's to be continued"
        )
    for index, message in enumerate(chat.messages):
        field = f"prompt.chat.messages[{index}].content"
        if not message.content and message.role != types_pb2.ROLE_ASSISTANT:
            raise bad_field(field, "must be at least 1 byte; only an earlier turn of the assistant may be empty")
        if not message.content and index == last:
            raise bad_field(field, "has no text that could be continued; leave the turn out to have a new one written")


async def write(
    engine: Engine, planned: Plan, sample_id: str, hold: Hold, drafts: list[Draft], add: Callable[[Delta], None] | None
) -> None:
    """Fills `drafts`; new text is also given to `add`, unless that is None."""
    generation = engine.generate(
        sample_id, planned.token_ids, planned.draw, hold.policy.weight_digest, stream=add is not None
    )
    async for deltas in generation:
        for delta in deltas:
            append(drafts[delta.index], delta, hold.spans_swap)
            if add:
                add(delta)


def append(draft: Draft, delta: Delta, spans_swap: bool = False) -> None:
    """Adds new text to a completion. Only one that was still being written when a swap came spans that swap."""
    draft.text.append(delta.text)
    draft.token_ids += delta.token_ids
    draft.logprobs += delta.logprobs
    draft.prompt_logprobs += delta.prompt_logprobs
    draft.finish_reason = delta.finish_reason
    draft.end_token_id = delta.end_token_id
    draft.spans_swap |= spans_swap


def as_deltas(texts: dict[int, str], reasons: dict[int, FinishReason]) -> inference_service_pb2.CompletionDeltas:
    return inference_service_pb2.CompletionDeltas(
        deltas=[
            inference_service_pb2.CompletionDelta(index=index, text=texts[index], finish_reason=reasons[index])
            for index in sorted(texts)
        ]
    )


def as_completions(
    sample_id: str, hold: Hold, drafts: list[Draft], token_text: Callable[[int], str]
) -> list[types_pb2.Completion]:
    """Returns the finished completions; a completion's id is its sample's and its index."""
    return [
        types_pb2.Completion(
            completion_id=f"{sample_id}.{index}",
            index=index,
            text="".join(draft.text),
            finish_reason=draft.finish_reason,
            policy=hold.policy,
            num_tokens=len(draft.token_ids),
            spans_swap=draft.spans_swap,
            token_ids=draft.token_ids,
            end_token_id=draft.end_token_id,
            logprobs=as_logprobs(draft.logprobs, token_text),
        )
        for index, draft in enumerate(drafts)
    ]


def as_event(
    request: Request,
    application: str,
    sample_id: str,
    completions: Sequence[types_pb2.Completion],
    planned: Plan,
    tokenizer_digest: str,
) -> events_pb2.SampleEvent:
    """Returns what is stored of a sample.

    Its tokens are left out if it would be too long for the bus with them. 16 completions of 32,768 tokens are 1.6 MB of
    tokens, of at most three bytes each; the bus takes 16 MiB.
    """
    event = events_pb2.SampleEvent(
        event_id=sample_id,
        user_id=request.user_id,
        application=application,
        prompt=request.prompt,
        sampling=request.sampling,
        completions=completions,
        prompt_token_ids=planned.token_ids,
        tokenizer_digest=tokenizer_digest,
    )
    for completion in event.completions:
        completion.ClearField("logprobs")
    if event.ByteSize() > _MAX_EVENT_BYTES:
        for completion in event.completions:
            # The end token stays: it says that the policy ended the completion.
            completion.ClearField("token_ids")
        event.ClearField("prompt_token_ids")
    return event


def without_token_ids(completions: Sequence[types_pb2.Completion]) -> list[types_pb2.Completion]:
    """Returns copies of the completions, as text alone."""
    copies = [types_pb2.Completion.FromString(completion.SerializeToString()) for completion in completions]
    for copy in copies:
        copy.ClearField("token_ids")
        copy.ClearField("end_token_id")
    return copies


def sign(
    keyring: token.Keyring,
    sample_id: str,
    application: str,
    user_id: str,
    completions: Sequence[types_pb2.Completion],
    ttl_seconds: float,
    drawn_at: Timestamp | None = None,
) -> tuple[str, Timestamp]:
    """Returns the feedback token of a sample, and when it expires: so long after it was drawn, or after now."""
    issued, expires = Timestamp(), Timestamp()
    if drawn_at:
        issued.CopyFrom(drawn_at)
    else:
        issued.GetCurrentTime()
    expires.FromNanoseconds(issued.ToNanoseconds() + int(ttl_seconds * 1e9))
    claims = feedback_token_pb2.FeedbackClaims(
        key_id=keyring.current,
        sample_id=sample_id,
        application=application,
        user_id=user_id,
        issue_time=issued,
        expire_time=expires,
    )
    for completion in completions:
        claims.completions.add(completion_id=completion.completion_id, policy_version=completion.policy.version)
    return token.sign(claims, keyring), expires
