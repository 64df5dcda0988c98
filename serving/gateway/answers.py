"""What the gateway answers, in OpenAI's shapes. What alignd adds stands under `alignd`, where clients pass it on."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from datetime import UTC
from typing import Any

from alignd.v1 import inference_service_pb2, types_pb2
from serving.gateway.requests import ChatRequest, CompletionRequest, measures

Json = dict[str, Any]
Body = ChatRequest | CompletionRequest

_PIECE = "\ufffd"
_REASONS = {types_pb2.FINISH_REASON_STOP: "stop", types_pb2.FINISH_REASON_LENGTH: "length"}


def completion(body: Body, sample: inference_service_pb2.SampleResponse) -> Json:
    """Returns the whole answer to a request."""
    is_chat = isinstance(body, ChatRequest)
    if measures(body) and body.max_tokens == 0:
        _leave_out_completion(sample)
    echo = body.prompt if isinstance(body, CompletionRequest) and body.echo else ""
    choices = []
    for each in sample.completions:
        text: Json = {"message": {"role": "assistant", "content": each.text}} if is_chat else {"text": echo + each.text}
        choices.append({"index": each.index, **text, **_ending(each, is_chat)})
        if sample.prompt_logprobs:
            choices[-1]["logprobs"] = _echoed_logprobs(echo, sample.prompt_logprobs, each.logprobs)
    return {
        **_head(body, sample.sample_id, sample.completions, "chat.completion" if is_chat else "text_completion"),
        "choices": choices,
        "usage": _usage(sample),
        "alignd": _alignd(sample),
    }


def text_chunk(body: Body, sample_id: str, delta: inference_service_pb2.CompletionDelta, *, first: bool) -> Json:
    """Returns the chunk of a stream that has new text of a completion; `first` is its first one."""
    if isinstance(body, ChatRequest):
        role = {"role": "assistant"} if first else {}
        text: Json = {"delta": {**role, "content": delta.text}}
    else:
        text = {"text": delta.text}
    return {**_chunk(body, sample_id, ()), "choices": [{"index": delta.index, **text, "finish_reason": None}]}


def last_chunks(body: Body, sample: inference_service_pb2.SampleResponse) -> Iterator[Json]:
    """Yields the chunks that end a stream: why each completion ended, and in the last one what to rank them by."""
    is_chat = isinstance(body, ChatRequest)
    asks_usage = body.stream_options is not None and body.stream_options.include_usage
    head = _chunk(body, sample.sample_id, sample.completions)
    for each in sample.completions:
        text: Json = {"delta": {}} if is_chat else {"text": ""}
        choice = {"index": each.index, **text, **_ending(each, is_chat)}
        is_last = each.index == len(sample.completions) - 1 and not asks_usage
        yield {**head, "choices": [choice], **({"alignd": _alignd(sample)} if is_last else {})}
    if asks_usage:
        yield {**head, "choices": [], "usage": _usage(sample), "alignd": _alignd(sample)}


def models(found: Sequence[inference_service_pb2.Model]) -> Json:
    """Returns the list of models."""
    return {
        "object": "list",
        "data": [
            {
                "id": each.name,
                "object": "model",
                "created": int(each.create_time.ToSeconds()),
                "owned_by": "alignd",
                "alignd": {"version": each.policy.version, "weight_digest": each.policy.weight_digest},
            }
            for each in found
        ],
    }


def _chunk(body: Body, sample_id: str, completions: Sequence[types_pb2.Completion]) -> Json:
    kind = "chat.completion.chunk" if isinstance(body, ChatRequest) else "text_completion"
    return _head(body, sample_id, completions, kind)


def _head(body: Body, sample_id: str, completions: Sequence[types_pb2.Completion], kind: str) -> Json:
    prefix = "chatcmpl" if isinstance(body, ChatRequest) else "cmpl"
    model = f"v{completions[0].policy.version}" if completions else body.model
    return {"id": f"{prefix}-{sample_id}", "object": kind, "created": int(time.time()), "model": model}


def _ending(each: types_pb2.Completion, is_chat: bool) -> Json:
    logprobs = (_chat_logprobs if is_chat else _text_logprobs)(each.logprobs) if each.logprobs else None
    found = {"completion_id": each.completion_id, "policy_version": each.policy.version}
    return {"finish_reason": _REASONS.get(each.finish_reason), "logprobs": logprobs, "alignd": found}


def _chat_logprobs(rows: Sequence[types_pb2.TokenLogprob]) -> Json:
    def entry(each: types_pb2.TokenLogprob) -> Json:
        # Of a piece of a character, whose text stands for its bytes, these are not known.
        known = _PIECE not in each.token
        return {"token": each.token, "logprob": each.logprob, "bytes": list(each.token.encode()) if known else None}

    return {"content": [{**entry(row), "top_logprobs": list(map(entry, row.top))} for row in rows]}


def _text_logprobs(rows: Sequence[types_pb2.TokenLogprob]) -> Json:
    offsets = [0]
    for row in rows:
        offsets.append(offsets[-1] + len(row.token))
    return {
        "tokens": [row.token for row in rows],
        "token_logprobs": [row.logprob for row in rows],
        # Several tokens may have one text; the likeliest of them comes first, and is the one to tell.
        "top_logprobs": [{each.token: each.logprob for each in reversed(row.top)} for row in rows],
        "text_offset": offsets[:-1],
    }


def _echoed_logprobs(
    prompt: str, read: Sequence[types_pb2.TokenLogprob], written: Sequence[types_pb2.TokenLogprob]
) -> Json:
    """Returns those of the prompt's tokens and of the completion's. The first has none: nothing stands before it."""
    found = _text_logprobs([*read, *written])
    found["token_logprobs"][0] = found["top_logprobs"][0] = None
    # A token that begins each text stands before the prompt, and is no part of what is echoed.
    first = found["tokens"][0]
    if not prompt.startswith(first):
        found["text_offset"][1:] = [offset - len(first) for offset in found["text_offset"][1:]]
    return found


def _leave_out_completion(sample: inference_service_pb2.SampleResponse) -> None:
    """Leaves out the token that was drawn although none was asked for."""
    for each in sample.completions:
        each.text, each.num_tokens, each.finish_reason = "", 0, types_pb2.FINISH_REASON_LENGTH
        each.ClearField("logprobs")


def _usage(sample: inference_service_pb2.SampleResponse) -> Json:
    written = sum(each.num_tokens for each in sample.completions)
    return {
        "prompt_tokens": sample.num_prompt_tokens,
        "completion_tokens": written,
        "total_tokens": sample.num_prompt_tokens + written,
    }


def _alignd(sample: inference_service_pb2.SampleResponse) -> Json:
    stored = bool(sample.feedback_token)
    expires = sample.feedback_expire_time.ToDatetime(tzinfo=UTC).isoformat(timespec="seconds") if stored else None
    return {"sample_id": sample.sample_id, "feedback_token": sample.feedback_token or None, "expires": expires}
