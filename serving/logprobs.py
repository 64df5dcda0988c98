"""Log-probabilities: whether they can be given, and how an answer has them."""

from collections.abc import Callable, Sequence

from alignd.v1 import inference_service_pb2, types_pb2
from serving.drawing import Draw, Logprob
from serving.errors import bad_field

# About 1 MiB of an answer, and a tenth of a second of work.
_MOST_LOGPROBS = 32_768


def check_prompt_logprobs(
    request: inference_service_pb2.SampleRequest | inference_service_pb2.StreamSampleRequest, *, stored: bool
) -> None:
    """Checks what a request asks for beside log-probabilities of its prompt.

    Raises:
        Refusal: INVALID_ARGUMENT if they do not go together.
    """
    if not request.HasField("prompt_logprobs"):
        return
    if stored:
        why = "goes with store = false: it asks about a text, and the completion is not for a user to rank"
        raise bad_field("prompt_logprobs", why)
    if request.num_completions > 1:
        raise bad_field("prompt_logprobs", "goes with one completion: the prompt would be read for each")


def check_logprobs(draw: Draw, num_prompt_tokens: int) -> None:
    """Checks that an answer with log-probabilities is one that can be made and sent.

    Raises:
        Refusal: INVALID_ARGUMENT if it is not.
    """
    read = 0 if draw.prompt_logprobs is None else num_prompt_tokens * (1 + draw.prompt_logprobs)
    if read > _MOST_LOGPROBS:
        why = f"these are {read} log-probabilities, and {_MOST_LOGPROBS} can be returned; shorten the prompt"
        raise bad_field("prompt_logprobs", why)
    if draw.top_logprobs is None:
        return
    entries = draw.num_completions * draw.max_tokens * (1 + draw.top_logprobs)
    if read + entries > _MOST_LOGPROBS:
        why = (
            f"with {draw.num_completions} completions of {draw.max_tokens} tokens these are {entries} "
            f"log-probabilities, and {_MOST_LOGPROBS - read} can be returned; set max_tokens"
        )
        raise bad_field("top_logprobs", why)


def as_logprobs(rows: Sequence[Sequence[Logprob]], token_text: Callable[[int], str]) -> list[types_pb2.TokenLogprob]:
    """Returns each token's log-probability, with those of the likeliest ones at its place."""
    return [_as_logprob(row, token_text) for row in rows]


def _as_logprob(row: Sequence[Logprob], token_text: Callable[[int], str]) -> types_pb2.TokenLogprob:
    own, *top = (
        types_pb2.TokenLogprob(token_id=token_id, token=token_text(token_id), logprob=logprob)
        for token_id, logprob in row
    )
    own.top.extend(top)
    return own
