"""The requests of the demo's users: few during training, many around the swap, and the held-out prompts."""

import asyncio
import itertools
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from alignd.client import AsyncClient, SampleResponse, SamplingParams
from deploy.simulation.config import SimulationConfig
from deploy.simulation.labelers import Labeler
from deploy.simulation.user import Turn, as_prompt, run_users

# Between two requests while the trainer works: short enough to show that serving continues, long enough to leave the
# processor to the trainer. Around the swap _BUSY_USERS ask at once.
_GENTLE_PAUSE_SECONDS = 4.0
_BUSY_USERS = 4


@dataclass
class Tally:
    """Counts the requests of all users so far."""

    samples: int = 0
    rankings: int = 0
    failures: list[str] = field(default_factory=list)

    def add(self, turn: Turn) -> None:
        """Counts a turn."""
        if turn.error:
            self.failures.append(turn.error)
        sampled = turn.ranking_seconds is not None
        self.samples += sampled
        self.rankings += sampled and not turn.error


class Traffic:
    """Users who keep asking until `stop` is called."""

    def __init__(
        self, address: str, prompts: Sequence[str], labelers: Sequence[Labeler], config: SimulationConfig, tally: Tally
    ) -> None:
        self._address = address
        self._prompts = itertools.cycle(prompts)
        self._labelers = labelers
        self._config = config
        self._tally = tally
        self._stop = asyncio.Event()
        self.busy = False

    async def run(self) -> None:
        """Asks until `stop` is called: one request at a time, or several at once while `busy`."""
        while not self._stop.is_set():
            count = _BUSY_USERS if self.busy else 1
            prompts = [next(self._prompts) for _ in range(count)]
            await run_users(self._address, prompts, self._labelers[:count], self._config, self._tally.add)
            if not self.busy:
                await self._pause()

    def stop(self) -> None:
        """Begins no more requests. Those in flight are finished."""
        self._stop.set()

    async def _pause(self) -> None:
        try:
            await asyncio.wait_for(self._stop.wait(), _GENTLE_PAUSE_SECONDS)
        except TimeoutError:
            return


async def answers(
    address: str, prompts: Sequence[str], config: SimulationConfig, tally: Tally, on_answer: Callable[[int], None]
) -> list[SampleResponse]:
    """Returns completions of each prompt from the live policy, which users compare and nobody ranks.

    Raises:
        AligndError: a request failed; none is tried twice.
    """
    done = itertools.count(1)
    in_flight = asyncio.Semaphore(config.num_users)
    async with AsyncClient(address, timeout=config.deadline_seconds, max_attempts=1) as client:

        async def ask(prompt: str) -> SampleResponse:
            async with in_flight:
                response = await client.sample(
                    as_prompt(config.system_prompt, prompt),
                    user_id="demo-held-out",
                    num_completions=config.held_out_completions,
                    sampling=SamplingParams(max_tokens=config.max_tokens),
                )
            tally.samples += 1
            on_answer(next(done))
            return response

        asked: list[Awaitable[SampleResponse]] = [ask(prompt) for prompt in prompts]
        return list(await asyncio.gather(*asked))
