"""The slot pins a request's version, and lets an exchange take place between requests."""

import asyncio

import grpc
import pytest

from alignd.v1.types_pb2 import PolicyRef
from serving.errors import Refusal
from serving.slot import Hold, Slot

V1, V2 = PolicyRef(version=1), PolicyRef(version=2)


async def stay(slot: Slot, leave: asyncio.Event, holds: list[Hold]) -> int:
    """Holds the slot until `leave` is set; returns the version that it then has."""
    async with slot.hold() as hold:
        holds.append(hold)
        await leave.wait()
        return hold.policy.version


async def settle() -> None:
    """Lets every task go as far as it can."""
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.fixture
async def slot() -> Slot:
    """An open slot, with version 1."""
    opened = Slot()
    opened.open(V1)
    return opened


async def test_requests_wait_until_there_is_a_policy() -> None:
    slot, leave, holds = Slot(), asyncio.Event(), list[Hold]()
    request = asyncio.ensure_future(stay(slot, leave, holds))
    await settle()
    assert holds == []
    slot.open(V1)
    leave.set()
    assert await request == 1


async def test_an_exchange_waits_for_those_inside_and_makes_others_wait(slot: Slot) -> None:
    leave, holds = asyncio.Event(), list[Hold]()
    inside = [asyncio.ensure_future(stay(slot, leave, holds)) for _ in range(3)]
    await settle()
    closing = asyncio.ensure_future(slot.close(timeout_seconds=30))
    await settle()
    late = asyncio.ensure_future(stay(slot, leave, holds))
    await asyncio.sleep(0.05)
    assert len(holds) == 3
    assert not closing.done()
    leave.set()
    exchange = await closing
    assert exchange.drain_seconds >= 0.05
    await settle()
    assert not late.done()
    slot.open(V2)
    assert await late == 2
    assert await asyncio.gather(*inside) == [1, 1, 1]
    assert not any(hold.spans_swap for hold in holds)
    assert slot.idle


async def test_an_exchange_that_cannot_wait_longer_marks_those_inside(slot: Slot) -> None:
    leave, holds = asyncio.Event(), list[Hold]()
    inside = asyncio.ensure_future(stay(slot, leave, holds))
    await settle()
    exchange = await slot.close(timeout_seconds=0.05)
    slot.open(V2)
    late = asyncio.ensure_future(stay(slot, leave, holds))
    await settle()
    leave.set()
    assert list(await asyncio.gather(inside, late)) == [1, 2]
    assert [hold.spans_swap for hold in holds] == [True, False]
    assert exchange.drain_seconds >= 0.05


async def test_an_empty_slot_is_exchanged_at_once(slot: Slot) -> None:
    assert (await slot.close(timeout_seconds=30)).drain_seconds < 15


async def test_a_request_that_is_cancelled_leaves(slot: Slot) -> None:
    holds: list[Hold] = []
    requests = [asyncio.ensure_future(stay(slot, asyncio.Event(), holds)) for _ in range(2)]
    await settle()
    assert not slot.idle
    for request in requests:
        request.cancel()
    await asyncio.gather(*requests, return_exceptions=True)
    assert slot.idle
    assert (await slot.close(timeout_seconds=30)).drain_seconds < 15


async def test_a_request_that_is_cancelled_while_it_waits_leaves_nothing(slot: Slot) -> None:
    await slot.close(timeout_seconds=0)
    waiting = asyncio.ensure_future(stay(slot, asyncio.Event(), []))
    await settle()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)
    assert slot.idle


async def test_a_request_that_waited_does_not_slip_into_the_next_exchange(slot: Slot) -> None:
    leave, holds = asyncio.Event(), list[Hold]()
    await slot.close(timeout_seconds=0)
    waiting = asyncio.ensure_future(stay(slot, leave, holds))
    await settle()
    slot.open(V1)
    await slot.close(timeout_seconds=0)
    await settle()
    assert holds == []
    slot.open(V2)
    leave.set()
    assert await waiting == 2


async def test_a_slot_that_is_shut_refuses_who_waits_and_who_comes(slot: Slot) -> None:
    leave, holds = asyncio.Event(), list[Hold]()
    inside = asyncio.ensure_future(stay(slot, leave, holds))
    await settle()
    closing = asyncio.ensure_future(slot.close(timeout_seconds=30))
    await settle()
    waiting = asyncio.ensure_future(stay(slot, leave, holds))
    await settle()
    slot.shut()
    closing.cancel()
    for request in (waiting, asyncio.ensure_future(stay(slot, leave, holds))):
        with pytest.raises(Refusal) as raised:
            await asyncio.wait_for(request, 5)
        assert raised.value.code is grpc.StatusCode.UNAVAILABLE
    leave.set()
    assert await inside == 1
