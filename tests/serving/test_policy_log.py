"""Replicas that follow one policies topic agree, on both buses, whatever is in it."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import grpc
import pytest

from alignd.v1 import events_pb2
from alignd.v1.policy_service_pb2 import (
    GetPolicyRequest,
    ListPoliciesRequest,
    PromoteRequest,
    RegisterPolicyRequest,
    RollbackRequest,
    WatchResponse,
)
from feedback.bus.contract import Bus, Record
from feedback.bus.topics import POLICIES, TOPICS
from feedback.bus.url import open_bus
from serving import policy_log
from serving.errors import Refusal
from serving.policy_log import PolicyLog, PolicyLogError
from serving.policy_service import PolicyService
from tests.serving.policy_events import (
    STAGE_CANDIDATE,
    STAGE_LIVE,
    STAGE_REJECTED,
    STAGE_RETIRED,
    moved,
    registered,
    reported,
)

TIMEOUT_SECONDS = 30.0


@asynccontextmanager
async def replica(bus_url: str) -> AsyncIterator[PolicyLog]:
    """Runs a log of its own on the bus, read to the end."""
    bus = await asyncio.to_thread(open_bus, bus_url)
    await asyncio.to_thread(bus.create_topics, TOPICS)
    followed = PolicyLog(bus)
    try:
        await asyncio.wait_for(followed.start(), TIMEOUT_SECONDS)
        yield followed
    finally:
        await followed.stop()
        await asyncio.to_thread(bus.close)


async def until(followed: PolicyLog, is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(TIMEOUT_SECONDS):
        while not is_so():
            await followed.changed()


async def put(bus: Bus, event_id: str, value: bytes) -> None:
    await asyncio.to_thread(bus.publish, [Record(POLICIES, event_id.encode(), value, event_id)])


async def rolled_out(followed: PolicyLog) -> None:
    """Makes version 1 live, then version 2."""
    for event in (
        registered(1),
        moved(1, STAGE_CANDIDATE, STAGE_LIVE),
        registered(2, "b", parent=1, reference=1),
        moved(2, STAGE_CANDIDATE, STAGE_LIVE, expected_live=1),
    ):
        assert not (await followed.propose(event)).refusal


async def test_two_replicas_agree(bus_url: str) -> None:
    async with replica(bus_url) as one, replica(bus_url) as other:
        await rolled_out(one)
        await until(other, lambda: other.state.live_version == 2)
        assert not (await other.propose(moved(1, STAGE_RETIRED, STAGE_LIVE))).refusal
        await other.propose(reported("other", 1))
        await until(one, lambda: "other" in one.state.replicas)
        assert one.state == other.state
        assert one.changes == other.changes
        assert one.state.live_version == 1


async def test_of_two_proposals_at_once_one_wins_and_the_other_is_told(bus_url: str) -> None:
    async with replica(bus_url) as one, replica(bus_url) as other:
        await rolled_out(one)
        for version in (3, 4):
            await one.propose(registered(version, parent=2, reference=1))
        await until(other, lambda: 4 in other.state.policies)
        outcomes = await asyncio.gather(
            one.propose(moved(3, STAGE_CANDIDATE, STAGE_LIVE, expected_live=2)),
            other.propose(moved(4, STAGE_CANDIDATE, STAGE_LIVE, expected_live=2)),
        )
        assert sorted(bool(outcome.refusal) for outcome in outcomes) == [False, True]
        winner = 3 if outcomes[1].refusal else 4
        assert {outcome.refusal for outcome in outcomes} == {"", f"version {winner} is live, not 2"}
        await until(one, lambda: len(one.changes) == len(other.changes) == 9)
        assert one.state == other.state
        assert one.state.live_version == winner


async def test_a_replica_that_starts_later_comes_to_the_same(bus_url: str) -> None:
    async with replica(bus_url) as first:
        await rolled_out(first)
        await first.propose(moved(2, STAGE_LIVE, STAGE_REJECTED))
    async with replica(bus_url) as again:
        assert again.state == first.state
        assert again.changes == first.changes
        assert again.state.live_version == 1


async def test_what_is_no_event_or_came_twice_is_passed_over(bus_url: str) -> None:
    unknown_stage = moved(1, STAGE_LIVE, 99)  # type: ignore[arg-type]
    unknown_stage.event_id = "later-release"
    async with replica(bus_url) as followed:
        await rolled_out(followed)
        event = moved(1, STAGE_RETIRED, STAGE_LIVE)
        await followed.propose(event)
        for event_id, value in [
            ("garbage", b"\xff\xff"),
            ("empty", b""),
            (event.event_id, event.SerializeToString()),
            (unknown_stage.event_id, unknown_stage.SerializeToString()),
        ]:
            await put(followed.bus, event_id, value)
        assert not (await followed.propose(moved(2, STAGE_RETIRED, STAGE_LIVE))).refusal
        assert followed.state.live_version == 2
        await put(followed.bus, "last", b"\xff")
    async with replica(bus_url) as again:
        assert again.state == followed.state


async def test_what_can_never_be_used_is_passed_over_by_all_alike(
    bus_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Two such events, a version at a relative path and its promotion, once kept every server from starting."""
    nowhere = registered(3, parent=2, reference=1)
    nowhere.registered.artifact_uri = "relative/path"
    async with replica(bus_url) as followed:
        await rolled_out(followed)
        before = followed.state
        for event in (nowhere, moved(3, STAGE_CANDIDATE, STAGE_LIVE), reported("", 3)):
            assert (await followed.propose(event)).refusal
        assert followed.state == before
    assert "passed over: version 3 cannot be used: artifact URI 'relative/path'" in caplog.text
    async with replica(bus_url) as again:
        assert again.state == before
        assert len(again.passed_over) == 3


async def watched(followed: PolicyLog, after_revision: int, count: int) -> list[WatchResponse]:
    """Returns the first changes that a watcher sees, who reads more slowly than they come."""
    seen = []
    async with asyncio.timeout(TIMEOUT_SECONDS):
        async for change in followed.watch(after_revision):
            seen.append(change)
            if len(seen) == count:
                return seen
            await asyncio.sleep(0.02)
    raise AssertionError("a watch does not end by itself")


async def test_a_watcher_sees_every_change_once_from_its_revision_on(bus_url: str) -> None:
    async with replica(bus_url) as followed:
        watchers = [asyncio.ensure_future(watched(followed, after, 7 - after)) for after in (0, 3, 6)]
        await rolled_out(followed)
        await followed.propose(reported("one", 2))
        await followed.propose(registered(3, parent=2, reference=1))
        everything, later, last = await asyncio.gather(*watchers)
    assert [change.revision for change in everything] == [1, 2, 3, 4, 5, 6, 7]
    assert (later, last) == (everything[3:], everything[6:])
    assert everything[5].replica_status.replica_id == "one"
    assert [(each.stage_change.version, each.stage_change.to_stage) for each in everything[3:5]] == [
        (1, STAGE_RETIRED),
        (2, STAGE_LIVE),
    ]


async def test_watches_end_when_the_replica_stops(bus_url: str) -> None:
    async with replica(bus_url) as followed:
        watching = asyncio.ensure_future(watched(followed, 0, 1))
        await asyncio.sleep(0.1)
        followed.end_watches()
        with pytest.raises(Refusal, match="watch again, after revision 0"):
            await watching


async def test_a_bus_that_is_gone_is_unavailable(bus_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(policy_log, "READ_BACK_TIMEOUT_SECONDS", 0.2)
    async with replica(bus_url) as followed:
        await followed.stop()
        with pytest.raises(Refusal) as raised:
            await followed.propose(events_pb2.PolicyEvent(registered=registered(1).registered))
        assert raised.value.code is grpc.StatusCode.UNAVAILABLE


async def test_who_waits_for_a_log_that_is_no_longer_followed_is_told(
    bus_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("nobody foresaw this")

    async with replica(bus_url) as first:
        await first.propose(registered(1))
        bus = await asyncio.to_thread(open_bus, bus_url)
        monkeypatch.setattr(bus, "consume", broken)
        starting = PolicyLog(bus)
        with pytest.raises(PolicyLogError, match="nobody foresaw this"):
            await asyncio.wait_for(starting.start(), TIMEOUT_SECONDS)
        with pytest.raises(PolicyLogError):
            await asyncio.wait_for(starting.changed(), TIMEOUT_SECONDS)
        await starting.stop()
        await asyncio.to_thread(bus.close)


async def test_nothing_is_said_of_policies_before_the_log_was_read(bus_url: str) -> None:
    """A version that is not read yet would seem to be missing, and a trainer that hears so gives up its run."""
    async with replica(bus_url) as first:
        await first.propose(registered(1))
        bus = await asyncio.to_thread(open_bus, bus_url)
        starting = PolicyLog(bus)
        service = PolicyService(starting, Path("/policies"))
        for call, request in (
            (service.ListPolicies, ListPoliciesRequest()),
            (service.GetPolicy, GetPolicyRequest(policy="v1")),
            (service.Promote, PromoteRequest(version=1, actor="a")),
            (service.Rollback, RollbackRequest(actor="a")),
            (service.RegisterPolicy, RegisterPolicyRequest()),
        ):
            with pytest.raises(Refusal) as raised:
                await call(request, None)  # type: ignore[operator]
            assert (raised.value.code, raised.value.reason) == (grpc.StatusCode.UNAVAILABLE, "STARTING")
        await asyncio.wait_for(starting.start(), TIMEOUT_SECONDS)
        assert len((await service.ListPolicies(ListPoliciesRequest(), None)).policies) == 1
        await starting.stop()
        await asyncio.to_thread(bus.close)
