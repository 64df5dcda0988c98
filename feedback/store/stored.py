"""What the trainer reads of the store, made from the rows of its tables."""

from dataclasses import dataclass
from typing import Any

from sqlalchemy import Row

from alignd.v1 import events_pb2, types_pb2
from feedback.bus.contract import Position
from feedback.identity import qualified


@dataclass(frozen=True)
class DrawnTokens:
    """The tokens that a policy drew for a completion, and those of the prompt that it read.

    Both are empty if the sample would have been too long for the bus with them.
    """

    prompt: tuple[int, ...]
    completion: tuple[int, ...]
    """More than the completion's text says, if a stop string cut that."""
    cut: bool
    """Whether a stop string ended it."""
    tokenizer_digest: str
    """Names the tokenizer whose tokens they are."""
    end_token_id: int | None = None
    """The end token with which the policy ended it, if it did; the last of `completion`."""


# The values by which a policy's own distribution is drawn from.
_OWN = {
    "temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
    "repetition_penalty": 1.0,
}  # fmt: skip


@dataclass(frozen=True)
class RankedCompletion:
    """A completion and the rank that its labeler gave it. Rank 0 is the best; equal ranks are a tie."""

    completion_id: str
    text: str
    ended: bool
    """Whether the policy ended it: it was not cut off by a limit, nor, as far as is known, by a stop string."""
    rank: int
    policy_version: int
    drawn: DrawnTokens | None = None
    """None for samples of before these were kept."""


@dataclass(frozen=True)
class RankedGroup:
    """A ranking with its sample, best first. `position` is the ranking's place in the log.

    `completions` may be fewer than were ranked: those that span a swap are not among them.
    """

    seq: int
    ranking_id: str
    sample_id: str
    user_id: str
    prompt: types_pb2.Prompt
    completions: tuple[RankedCompletion, ...]
    position: Position
    first_user_id: str
    """Who sent the prompt first; see StoredPrompt."""
    spanning_ranks: tuple[int, ...] = ()
    """The ranks of the completions that span a swap."""
    off_distribution: bool = False
    """Whether the sample was drawn otherwise than from the policy's own distribution, by which PPO draws."""


@dataclass(frozen=True)
class RankingSenders:
    """Who gave a ranking, when, and who sent its prompt first."""

    seq: int
    user_id: str
    first_user_id: str
    time: float
    """When it was acknowledged, in Unix seconds."""


@dataclass(frozen=True)
class Tally:
    """How many rankings or demonstrations there are, and how many of these are never read."""

    stored: int
    no_sample: int
    """Their sample is not stored."""
    superseded: int
    """The same user replaced them by a later one of the same sample."""


@dataclass(frozen=True)
class StoredPrompt:
    """A prompt, the sample that it was last sent for, and the user who sent it first.

    The first is the one with the earliest event time, whenever it was stored, so that a store that is built anew from
    the log says the same. Prompts are told apart by feedback.store.prompt_identity.
    """

    sample_id: str
    first_user_id: str
    prompt: types_pb2.Prompt


@dataclass(frozen=True)
class StoredCompletion:
    """The text that a policy wrote, and whether the policy ended it; see RankedCompletion."""

    text: str
    ended: bool
    drawn: DrawnTokens | None = None


@dataclass(frozen=True)
class StoredSample:
    """A prompt, the user it was sampled for, and its completions, without those that span a swap."""

    sample_id: str
    user_id: str
    prompt: types_pb2.Prompt
    completions: tuple[StoredCompletion, ...]
    first_user_id: str
    """Who sent the prompt first; see StoredPrompt."""


@dataclass(frozen=True)
class StoredDemonstration:
    """The answer that a user wanted to a sample's prompt."""

    seq: int
    demonstration_id: str
    sample_id: str
    user_id: str
    prompt: types_pb2.Prompt
    text: str
    first_user_id: str
    """Who sent the prompt first; see StoredPrompt."""


def sample_of(sample: events_pb2.SampleEvent, first_user_id: str) -> StoredSample:
    """Returns a sample, with who was the first to send its prompt."""
    prompt = tuple(sample.prompt_token_ids)
    whole = tuple(
        StoredCompletion(each.text, _ended(sample, each), _drawn(sample, prompt, each))
        for each in sample.completions
        if not each.spans_swap
    )
    return StoredSample(
        sample.event_id, qualified(sample.application, sample.user_id), sample.prompt, whole, first_user_id
    )


def _drawn(
    sample: events_pb2.SampleEvent, prompt: tuple[int, ...], completion: types_pb2.Completion
) -> DrawnTokens | None:
    if not sample.tokenizer_digest:
        return None
    end = completion.end_token_id if completion.HasField("end_token_id") else None
    cut = completion.finish_reason == types_pb2.FINISH_REASON_STOP and end is None
    return DrawnTokens(prompt, tuple(completion.token_ids), cut, sample.tokenizer_digest, end)


def _ended(sample: events_pb2.SampleEvent, completion: types_pb2.Completion) -> bool:
    if sample.tokenizer_digest:
        return completion.HasField("end_token_id")
    # A sample of before end tokens were kept.
    # STOP means that the policy ended it or that a stop string was met. If the request had any, no end is assumed.
    return completion.finish_reason == types_pb2.FINISH_REASON_STOP and not sample.sampling.stop


def demonstration_of(row: Row[Any]) -> StoredDemonstration:
    """Returns a demonstration from a row that has its sample and its first user too."""
    prompt = events_pb2.SampleEvent.FromString(row.sample).prompt
    text = events_pb2.DemonstrationEvent.FromString(row.event).text
    return StoredDemonstration(row.seq, row.event_id, row.sample_id, row.user_id, prompt, text, row.first_user_id)


def ranked_group_of(row: Row[Any]) -> RankedGroup:
    """Returns a ranking from a row that has its sample and its first user too."""
    sample = events_pb2.SampleEvent.FromString(row.sample)
    ranking = events_pb2.RankingEvent.FromString(row.event)
    completions = {each.completion_id: each for each in sample.completions if not each.spans_swap}
    prompt = tuple(sample.prompt_token_ids)
    ranked = tuple(
        RankedCompletion(
            completion_id,
            completions[completion_id].text,
            _ended(sample, completions[completion_id]),
            rank,
            completions[completion_id].policy.version,
            _drawn(sample, prompt, completions[completion_id]),
        )
        for rank, group in enumerate(ranking.groups)
        for completion_id in group.completion_ids
        if completion_id in completions
    )
    position = Position(row.topic, row.partition, row.offset)
    return RankedGroup(
        row.seq, row.event_id, row.sample_id, row.user_id, sample.prompt, ranked, position, row.first_user_id,
        _spanning_ranks(sample, ranking), is_off_distribution(sample.sampling),
    )  # fmt: skip


def is_off_distribution(sampling: types_pb2.SamplingParams) -> bool:
    """Whether completions are drawn from another distribution than the policy's own, at temperature 1 and whole."""
    changed = any(sampling.HasField(name) and getattr(sampling, name) != value for name, value in _OWN.items())
    return changed or sampling.HasField("top_k") or sampling.HasField("structured") or sampling.ignore_eos


def _spanning_ranks(sample: events_pb2.SampleEvent, ranking: events_pb2.RankingEvent) -> tuple[int, ...]:
    spanning = {each.completion_id for each in sample.completions if each.spans_swap}
    return tuple(rank for rank, group in enumerate(ranking.groups) for each in group.completion_ids if each in spanning)
