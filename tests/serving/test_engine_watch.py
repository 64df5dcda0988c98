"""What counts as progress of an engine, and when it hangs. tests/serving/test_start.py has a real one that does."""

import asyncio
from collections.abc import Iterator
from typing import Any, cast

import pytest

from serving import engine_watch
from serving.engine_life import Failures
from serving.engine_watch import watch
from serving.vllm_engine import EngineError

TIMEOUT_SECONDS = 0.2


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """It looks a hundred times as often."""
    monkeypatch.setattr(engine_watch, "_LOOK_SECONDS", 0.01)
    yield


class Stuck:
    """An engine that answers no probe. It may write for others all the same."""

    def __init__(self, *, writes: bool = False, loading: bool = False, has_answered: bool = True) -> None:
        self.loading, self.has_answered, self.writes = loading, has_answered, writes
        self.count = self.num_probes = 0

    def num_tokens(self) -> dict[str, int]:
        self.count += self.writes
        # A request comes at each look, which is no progress, and one has waited from the first.
        return {"first": self.count, **{f"r{each}": 0 for each in range(self.count)}}

    async def check_health(self) -> None:
        pass

    async def probe(self, request_id: str) -> None:
        self.num_probes += 1
        await asyncio.Event().wait()


async def outcome(engine: Any, seconds: float) -> str:
    """Returns what watching the engine so long fails with; nothing if it does not."""
    try:
        await asyncio.wait_for(watch(engine, TIMEOUT_SECONDS), seconds)
    except EngineError as error:
        return str(error)
    except TimeoutError:
        return ""


async def test_an_engine_that_answers_no_probe_hangs() -> None:
    engine = Stuck()
    assert "hangs: it has made no token" in await outcome(engine, 5)
    assert engine.num_probes == 1


async def test_tokens_of_any_request_are_progress() -> None:
    assert await outcome(Stuck(writes=True), 4 * TIMEOUT_SECONDS) == ""


async def test_weights_that_are_loaded_and_a_first_token_may_take_longer() -> None:
    assert await outcome(Stuck(loading=True), 3 * TIMEOUT_SECONDS) == ""
    assert await outcome(Stuck(has_answered=False), 3 * TIMEOUT_SECONDS) == ""


async def test_a_server_that_was_held_up_itself_says_nothing_of_its_engine() -> None:
    import time

    watching = asyncio.ensure_future(outcome(Stuck(), 4 * TIMEOUT_SECONDS))
    await asyncio.sleep(TIMEOUT_SECONDS / 4)
    time.sleep(2 * TIMEOUT_SECONDS)
    await asyncio.sleep(TIMEOUT_SECONDS / 4)
    assert not watching.done()
    assert "hangs" in await watching


async def test_a_probe_that_is_answered_is_progress_and_one_that_fails_is_the_end() -> None:
    async def probe(request_id: str) -> None:
        answers.append(request_id)
        if len(answers) == 3:
            raise EngineError("vLLM failed")

    answers: list[str] = []
    engine = Stuck()
    engine.probe = probe  # type: ignore[method-assign]
    assert await outcome(cast(Any, engine), 20) == "vLLM failed"
    assert answers == ["progress-1", "progress-2", "progress-3"]


def test_an_engine_that_fails_at_the_same_place_three_times_is_hopeless() -> None:
    failures = Failures()
    for why in ("needs 13.7 GiB", "needs 9 GiB"):
        failures.note(why, 1)
        assert not failures.is_hopeless
    failures.note("dead by SIGKILL", 1)
    failures.note("needs 9 GiB", 1)
    failures.note("needs 9 GiB", 1)
    assert (failures.same, failures.count, failures.is_hopeless) == (2, 5, False)
    failures.note("needs 9 GiB", 1000)
    assert (failures.same, failures.count) == (1, 1)
    failures.note("needs 9 GiB", 1)
    failures.note("needs 9 GiB", 1)
    assert failures.is_hopeless
