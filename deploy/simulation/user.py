"""Simulated users at work: each asks, reads, ranks and asks again over the public gRPC API, as an application would.

Nothing is retried, so that a request that counts as served was served at the first try. A user's preferences, and the
order in which completions are shown, follow from the seeds; the server's completions do not.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from alignd.client import AligndError, AsyncClient, SampleResponse, SamplingParams
from alignd.v1 import types_pb2
from deploy.simulation.config import SimulationConfig
from deploy.simulation.labelers import Labeler, calibrate_temperature, make_labelers
from deploy.simulation.utility import Utility, load_utility, measure

_PAUSE_AFTER_FAILURE_SECONDS = 1.0  # a server that is down gets one try a second from each user, not thousands


@dataclass(frozen=True)
class Turn:
    """The outcome of one prompt: of a Sample request and, if it was served, of a SubmitRanking request."""

    user_id: str
    prompt: str
    sample_seconds: float
    ranking_seconds: float | None
    """None if there was nothing to rank."""
    error: str | None
    """Status code and message of the request that failed, if one did."""

    @property
    def requests_failed(self) -> int:
        return 0 if self.error is None else 1

    @property
    def requests_made(self) -> int:
        return 1 if self.ranking_seconds is None else 2


@dataclass(frozen=True)
class _Application:
    """The application that the users sit in front of."""

    client: AsyncClient
    config: SimulationConfig
    utility: Utility
    # Utilities are measured off the event loop, on one thread: they may hold a model that is not safe to share.
    thread: ThreadPoolExecutor

    async def sample(self, user_id: str, prompt: str) -> SampleResponse:
        return await self.client.sample(
            as_prompt(self.config.system_prompt, prompt),
            user_id=user_id,
            num_completions=self.config.num_completions,
            sampling=SamplingParams(max_tokens=self.config.max_tokens),
        )

    async def utilities(self, prompt: str, texts: list[str]) -> list[float]:
        return await asyncio.get_running_loop().run_in_executor(self.thread, measure, self.utility, prompt, texts)

    async def rank(self, labeler: Labeler, prompt: str, sample: SampleResponse) -> None:
        texts = [completion.text for completion in sample.completions]
        ids = [completion.completion_id for completion in sample.completions]
        groups = labeler.rank(prompt, texts, await self.utilities(prompt, texts))
        await self.client.rank(
            sample.feedback_token,
            [[ids[i] for i in group] for group in groups],
            user_id=labeler.user_id,
            shown=random.Random(f"{labeler.seed} {prompt}").sample(ids, len(ids)),
        )

    async def turn(self, labeler: Labeler, prompt: str) -> Turn:
        started = time.monotonic()
        sampled: float | None = None
        error: str | None = None
        try:
            sample = await self.sample(labeler.user_id, prompt)
            sampled = time.monotonic()
            await self.rank(labeler, prompt, sample)
        except AligndError as failure:
            error = str(failure)
        ended = time.monotonic()
        sample_seconds = (sampled or ended) - started
        ranking_seconds = None if sampled is None else ended - sampled
        return Turn(labeler.user_id, prompt, sample_seconds, ranking_seconds, error)


def as_prompt(system_prompt: str, prompt: str) -> types_pb2.Prompt:
    """Returns what the application sends for a user's prompt."""
    messages = [types_pb2.Message(role=types_pb2.ROLE_USER, content=prompt)]
    if system_prompt:
        messages.insert(0, types_pb2.Message(role=types_pb2.ROLE_SYSTEM, content=system_prompt))
    return types_pb2.Prompt(chat=types_pb2.Chat(messages=messages))


async def run_users(
    address: str,
    prompts: Sequence[str],
    labelers: Sequence[Labeler],
    config: SimulationConfig,
    on_turn: Callable[[Turn], None] | None = None,
    stop: asyncio.Event | None = None,
) -> list[Turn]:
    """Lets all labelers work through their shares of `prompts` at once, and returns every turn.

    Labeler i of n takes prompts i, i + n, i + 2n, …, one at a time. A request that fails is recorded in its turn, and
    does not stop the others.

    Args:
        address: host:port of the server.
        prompts: what is asked, once each.
        labelers: who asks.
        config: how they ask.
        on_turn: is called after each turn.
        stop: once it is set, no new turn begins.
    """
    turns: list[Turn] = []

    async def work(application: _Application, labeler: Labeler, share: Iterable[str]) -> None:
        for prompt in share:
            if stop is not None and stop.is_set():
                return
            turn = await application.turn(labeler, prompt)
            turns.append(turn)
            if on_turn is not None:
                on_turn(turn)
            if turn.error is not None:
                await asyncio.sleep(_PAUSE_AFTER_FAILURE_SECONDS)

    with ThreadPoolExecutor(max_workers=1) as thread:
        async with _client(address, config) as client:
            application = _Application(client, config, load_utility(config.utility), thread)
            shares = [prompts[i :: len(labelers)] for i in range(len(labelers))]
            await asyncio.gather(*map(work, [application] * len(labelers), labelers, shares))
    return turns


async def calibrated_labelers(address: str, prompts: Sequence[str], config: SimulationConfig) -> list[Labeler]:
    """Returns `config.num_users` labelers who agree on the share `config.agreement` of comparisons.

    Calibrates them on the server's completions of the first `config.calibration_prompts` of `prompts`. Ranks nothing.

    Raises:
        CalibrationError: the utilities of the completions differ too little.
        AligndError: a request failed.
    """
    with ThreadPoolExecutor(max_workers=1) as thread:
        async with _client(address, config) as client:
            application = _Application(client, config, load_utility(config.utility), thread)
            in_flight = asyncio.Semaphore(config.num_users)

            async def utilities(prompt: str) -> list[float]:
                async with in_flight:
                    sample = await application.sample("simulated-calibration", prompt)
                return await application.utilities(prompt, [completion.text for completion in sample.completions])

            groups = await asyncio.gather(*map(utilities, prompts[: config.calibration_prompts]))
    return make_labelers(config.num_users, config.seed, calibrate_temperature(groups, config.agreement))


def _client(address: str, config: SimulationConfig) -> AsyncClient:
    return AsyncClient(address, timeout=config.deadline_seconds, max_attempts=1)
