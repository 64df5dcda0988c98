"""Writes what a trainer reads to a store: rankings, demonstrations, and a sample that cannot be rendered."""

from contextlib import closing
from typing import Any

from alignd.v1 import events_pb2, types_pb2
from feedback.bus.contract import Delivered, Position
from feedback.bus.topics import DEMONSTRATIONS, RANKINGS, SAMPLES
from feedback.signature import signed
from feedback.store.ledger import Ledger, Offset
from tests.feedback.events import KEYRING, chat, delivered, demonstration, ranking, sample
from training.data.split import is_held_out

POLICY = types_pb2.PolicyRef(version=1, weight_digest="0" * 64)
REFUSED = "Say nothing of this."


def write_rankings(store_url: str, count: int) -> None:
    """Writes rankings of four completions each, by four users who prefer the longer, and samples that nobody ranked.

    One of these samples has a held-out prompt, and one is for a held-out user.
    """
    batch, prompts = [], []
    for index in range(count):
        user, sample_id = f"user-{index % 4}", f"s{index}"
        texts = [" ".join(["in the garden"] * (n + 1)) for n in range(4)]
        completions = [
            types_pb2.Completion(
                completion_id=f"{sample_id}-{n}", index=n, text=text, finish_reason=types_pb2.FINISH_REASON_STOP,
                policy=POLICY,
            )
            for n, text in enumerate(texts)
        ]  # fmt: skip
        message = types_pb2.Message(role=types_pb2.ROLE_USER, content=f"What is number {index}?")
        prompt = types_pb2.Prompt(chat=types_pb2.Chat(messages=[message]))
        prompts.append(prompt)
        sample = events_pb2.SampleEvent(event_id=sample_id, user_id=user, prompt=prompt, completions=completions)
        groups = [types_pb2.RankingGroup(completion_ids=[f"{sample_id}-{n}"]) for n in (3, 2, 1, 0)]
        ranking = events_pb2.RankingEvent(event_id=f"r{index}", user_id=user, sample_id=sample_id, groups=groups)
        for topic, event in ((SAMPLES, sample), (RANKINGS, ranking)):
            event.event_time.FromSeconds(1_700_000_000 + index)
            batch.append(
                Delivered(Position(topic, 0, index), sample_id.encode(), signed(event, KEYRING), event.event_id)
            )
    learned, held_out = (
        next(index for index in range(4) if is_held_out(f"user-{index}", 0.4) == side) for side in (False, True)
    )
    for index, (first, user) in enumerate([(learned, learned), (held_out, learned), (learned, held_out)]):
        unranked = events_pb2.SampleEvent(
            event_id=f"unranked {index}", user_id=f"user-{user}", prompt=prompts[first], completions=completions[:2]
        )
        unranked.event_time.FromSeconds(1_700_000_040)
        place = Position(SAMPLES, 0, count + index)
        batch.append(Delivered(place, b"unranked", signed(unranked, KEYRING), unranked.event_id))
    ledger = Ledger(store_url)
    after = {(SAMPLES, 0): Offset("log", count + 3), (RANKINGS, 0): Offset("log", count)}
    ledger.write(batch, ledger.offsets(), after, KEYRING)
    ledger.close()


def write_refused(store_url: str) -> None:
    """Writes a ranking and a demonstration, by a user who is learned from, of a sample that cannot be rendered."""
    user: str = "user-0"
    asked: Any = sample("refused", user_id=user)
    assert not is_held_out(user, 0.4)
    asked.prompt.CopyFrom(chat(REFUSED))
    told: tuple[Any, ...] = (ranking("r", "refused"), demonstration("d", "refused"))
    for each in told:
        each.user_id = user
    batch = [delivered(each, 0, partition=1) for each in (asked, *told)]
    after = {(each.position.topic, 1): Offset("log", 1) for each in batch}
    with closing(Ledger(store_url)) as ledger:
        ledger.write(batch, ledger.offsets(), after, KEYRING)


def write_demonstrations(store_url: str, count: int) -> None:
    """Writes demonstrations of the store's samples, and of one whose prompt is too long for the engine."""
    held_out = next(index for index in range(4) if is_held_out(f"user-{index}", 0.4))
    long = events_pb2.SampleEvent(
        event_id=f"s{count}", user_id=f"user-{held_out}", prompt=types_pb2.Prompt(text="why " * 400),
        completions=[types_pb2.Completion(completion_id="long", text="so", policy=POLICY)],
    )  # fmt: skip
    long.event_time.FromSeconds(1_700_000_050)
    batch = [Delivered(Position(SAMPLES, 0, count + 3), b"long", signed(long, KEYRING), long.event_id)]
    for index in (*range(count), count):
        user = index % 4 if index < count else held_out
        event = events_pb2.DemonstrationEvent(
            event_id=f"d{index}", user_id=f"user-{user}", sample_id=f"s{index}", text="in the garden, with soil"
        )
        event.event_time.FromSeconds(1_700_000_100 + index)
        position = Position(DEMONSTRATIONS, 0, index)
        batch.append(Delivered(position, event.sample_id.encode(), signed(event, KEYRING), event.event_id))
    ledger = Ledger(store_url)
    after = {(SAMPLES, 0): Offset("log", count + 4), (DEMONSTRATIONS, 0): Offset("log", count + 1)}
    ledger.write(batch, ledger.offsets(), after, KEYRING)
    ledger.close()
