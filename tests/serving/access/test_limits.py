"""Limits hold for all that a caller sends, however much of it at once, and what is refused takes nothing."""

import contextlib
from collections.abc import Callable
from typing import Any

import grpc
import pytest

from serving.access.callers import NOBODY, Caller
from serving.access.limits import Limits
from serving.config import LimitsConfig
from serving.errors import Refusal

SHOP, BANK = Caller("web", "shop", ("sample",)), Caller("web", "bank", ("sample",))


def refusal(call: Callable[[], Any]) -> Refusal:
    with pytest.raises(Refusal) as raised:
        call()
    assert raised.value.code is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert raised.value.reason == "LIMIT_REACHED"
    return raised.value


def test_no_limit_is_set_unless_it_is_asked_for() -> None:
    limits = Limits(LimitsConfig())
    for _ in range(100):
        limits.request(NOBODY, "ada", "sample")
        limits.reserve(NOBODY, "ada", 10**9)
    with limits.in_flight(NOBODY, "ada", 10**6):
        # Nothing is counted where nothing is limited, so nothing grows.
        assert not limits._counts
        assert not limits._in_flight


def test_requests_that_come_at_once_do_not_pass_a_limit_together() -> None:
    limits = Limits(LimitsConfig(requests_per_minute=10, user_requests_per_minute=4))
    done = 0
    for i in range(30):
        with contextlib.suppress(Refusal):
            limits.request(SHOP, f"user-{i % 3}", "sample")
            done += 1
    assert done == 10
    # Feedback, and another application, have counts of their own.
    limits.request(SHOP, "user-0", "feedback")
    limits.request(BANK, "user-0", "sample")


def test_a_refusal_names_the_limit_and_when_to_come_back_and_takes_nothing() -> None:
    limits = Limits(LimitsConfig(requests_per_minute=5, user_requests_per_minute=2))
    for _ in range(2):
        limits.request(SHOP, "ada", "sample")
    for _ in range(10):
        found = refusal(lambda: limits.request(SHOP, "ada", "sample"))
    assert found.metadata == {"limit": "user_requests_per_minute"}
    assert found.message == "limits.user_requests_per_minute: 2 of 2 a minute are taken, and 1 are asked for"
    assert found.retry_after_seconds
    assert 1 <= found.retry_after_seconds <= 61
    # Of the key's five, two are taken: what was refused to ada is left to others.
    for user in ("bob", "cyd", "dan"):
        limits.request(SHOP, user, "sample")
    assert (refusal(lambda: limits.request(SHOP, "eve", "sample"))).metadata == {"limit": "requests_per_minute"}


def test_tokens_are_reserved_and_what_is_not_used_is_given_back() -> None:
    limits = Limits(LimitsConfig(tokens_per_minute=1000))
    first = limits.reserve(SHOP, "ada", 700)
    assert "700 of 1000" in (refusal(lambda: limits.reserve(SHOP, "bob", 400))).message
    first.used = 100
    limits.settle(first)
    second = limits.reserve(SHOP, "bob", 900)
    second.used = 0
    assert (refusal(lambda: limits.reserve(SHOP, "bob", 1))).retry_after_seconds
    limits.settle(second)
    too_much = refusal(lambda: limits.reserve(SHOP, "bob", 1001))
    assert too_much.retry_after_seconds is None
    assert "more than the limit" in too_much.message


def test_completions_in_flight_are_counted_while_they_are_written() -> None:
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


def test_what_was_reserved_in_a_minute_that_is_over_gives_nothing_to_the_next(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [600.0]
    monkeypatch.setattr("serving.access.limits.time.time", lambda: now[0])
    limits = Limits(LimitsConfig(tokens_per_minute=1000))
    first = limits.reserve(SHOP, "ada", 1000)
    now[0] = 661.0
    second = limits.reserve(SHOP, "ada", 900)
    first.used = 0
    limits.settle(first)
    assert "900 of 1000" in refusal(lambda: limits.reserve(SHOP, "ada", 200)).message
    limits.settle(second)
    # It had not ended: it keeps all that it reserved.
    assert refusal(lambda: limits.reserve(SHOP, "ada", 200)).retry_after_seconds == 59.0
