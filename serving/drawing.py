"""What an engine is asked to draw, and what it gives."""

from collections.abc import Sequence
from dataclasses import dataclass

from alignd.v1.types_pb2 import FinishReason


@dataclass(frozen=True)
class Draw:
    """How completions are drawn; every value is decided."""

    num_completions: int
    temperature: float
    top_p: float
    max_tokens: int
    stop: tuple[str, ...] = ()
    seed: int | None = None
    top_k: int = 0
    """0 for all."""
    min_p: float = 0.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    ignore_eos: bool = False
    json_schema: str = ""
    regex: str = ""
    top_logprobs: int | None = None
    """How many of the likeliest tokens are given beside each one, with log-probabilities; None for none at all."""
    prompt_logprobs: int | None = None
    """The same for the tokens of the prompt."""


Logprob = tuple[int, float]
"""A token, and its log-probability in nats."""


@dataclass(frozen=True)
class Delta:
    """New text of one completion, and the tokens that were drawn for it."""

    index: int
    text: str
    token_ids: Sequence[int]
    finish_reason: FinishReason
    end_token_id: int | None = None
    """Set with the finish reason, if it was an end token of the model."""
    logprobs: Sequence[Sequence[Logprob]] = ()
    """For each of the tokens: its own, and after it the likeliest ones at its place, if they were asked for."""
    prompt_logprobs: Sequence[Sequence[Logprob]] = ()
    """The same for each token of the prompt, in the first delta alone. The first token has 0."""
