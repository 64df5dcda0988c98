"""Events as the server writes them, made up for tests."""

from collections.abc import Sequence
from pathlib import Path

from google.protobuf.message import Message
from google.protobuf.timestamp_pb2 import Timestamp

from alignd.v1 import events_pb2, types_pb2
from feedback.bus.contract import Delivered, Position, Record
from feedback.bus.topics import DEMONSTRATIONS, RANKINGS, SAMPLES
from feedback.signature import signed
from feedback.token import read_keyring

KEYRING_FILE = Path(__file__).with_name("feedback_keys")
KEYRING = read_keyring(KEYRING_FILE)
TIME_SECONDS = 1_700_000_000
TOPIC_OF = {
    events_pb2.SampleEvent: SAMPLES,
    events_pb2.RankingEvent: RANKINGS,
    events_pb2.DemonstrationEvent: DEMONSTRATIONS,
}


def sample(
    sample_id: str = "s1", text: str = "Why?", num_completions: int = 3, spanning: int = -1, user_id: str = "u"
) -> Message:
    """Returns a sample whose completions are named s1-0, s1-1, ..."""
    completions = [
        types_pb2.Completion(
            completion_id=f"{sample_id}-{index}",
            index=index,
            text=f"because {index}",
            finish_reason=types_pb2.FINISH_REASON_STOP,
            policy=types_pb2.PolicyRef(version=7, weight_digest="0" * 64),
            spans_swap=index == spanning,
        )
        for index in range(num_completions)
    ]
    return events_pb2.SampleEvent(
        event_id=sample_id,
        event_time=Timestamp(seconds=TIME_SECONDS),
        user_id=user_id,
        prompt=types_pb2.Prompt(text=text),
        completions=completions,
    )


def chat(*contents: str) -> types_pb2.Prompt:
    """Returns a chat in which the user says the first message, and then speaks by turns with the assistant."""
    roles = (types_pb2.ROLE_USER, types_pb2.ROLE_ASSISTANT)
    messages = [types_pb2.Message(role=roles[n % 2], content=content) for n, content in enumerate(contents)]
    return types_pb2.Prompt(chat=types_pb2.Chat(messages=messages))


def ranking(
    ranking_id: str, sample_id: str = "s1", order: Sequence[Sequence[int]] = ((0,), (1,), (2,)), time_seconds: int = 0
) -> Message:
    """Returns a ranking of a sample's completions, best first, as groups of their indices."""
    groups = [types_pb2.RankingGroup(completion_ids=[f"{sample_id}-{index}" for index in group]) for group in order]
    return events_pb2.RankingEvent(
        event_id=ranking_id,
        event_time=Timestamp(seconds=TIME_SECONDS + time_seconds),
        user_id="u",
        sample_id=sample_id,
        groups=groups,
    )


def demonstration(demonstration_id: str, sample_id: str = "s1", text: str = "That is why.") -> Message:
    """Returns a demonstration for a sample's prompt."""
    return events_pb2.DemonstrationEvent(
        event_id=demonstration_id,
        event_time=Timestamp(seconds=TIME_SECONDS),
        user_id="u",
        sample_id=sample_id,
        text=text,
    )


def record(event: Message) -> Record:
    """Returns the event as it is published: signed by the keyring of the tests."""
    key = getattr(event, "sample_id", None) or event.event_id  # type: ignore[attr-defined]
    return Record(TOPIC_OF[type(event)], key.encode(), signed(event, KEYRING), event.event_id)  # type: ignore[attr-defined]


def delivered(event: Message, offset: int, partition: int = 0) -> Delivered:
    """Returns the event as it is read."""
    published = record(event)
    return Delivered(Position(published.topic, partition, offset), published.key, published.value, published.event_id)
