"""The engine's life beneath the open port: started on the live policy, watched, and started again when it fails."""

import asyncio
import gc
import logging
import multiprocessing
import time
from collections.abc import Awaitable, Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from feedback.retry import backoff_seconds, place
from policies.location import artifact_folder
from policies.state import PolicyRecord
from serving.bootstrap import NOT_REGISTERED, NoPolicyError, startable_policy
from serving.config import ServingConfig
from serving.engine_guard import EngineGuard
from serving.engine_watch import watch
from serving.inference_service import Serving
from serving.proof import ProofError
from serving.slot import Slot
from serving.swapper import Swapper
from serving.vllm_engine import Engine, EngineError
from serving.vllm_start import start_engine

logger = logging.getLogger(__name__)

_LOOK_SECONDS = 0.05
_LONGEST_START_SECONDS = 1800.0
_FIRST_RESTART_SECONDS, _LONGEST_RESTART_SECONDS = 0.5, 30.0
_HEALTHY_AFTER_SECONDS = 300.0
_MOST_SAME_FAILURES = 3
_MOST_STARTS = 2
_LAST_CALLS_SECONDS = 5.0

SetServing = Callable[[bool], Awaitable[None]]
"""Reports whether the engine serves, to whoever asks for the server's health."""


@dataclass
class Failures:
    """How often in a row the engine has failed early, and how often with the same words, figures aside."""

    count: int = 0
    same: int = 0
    said: str = ""
    starting: int = 0
    """The version on which an engine is being started, or 0."""
    without: dict[int, str] = field(default_factory=dict)
    """The versions on which engines do not start, so that one before them is served, and why."""

    def note(self, why: str, lived_seconds: float, live_order: Collection[int] = (), served: int = 0) -> None:
        """Counts a failure; one after a long life is a first one again.

        Args:
            why: what failed.
            lived_seconds: how long the engine lived.
            live_order: all versions that could be served.
            served: the version that the engine served last, or 0.
        """
        said = place(why)
        lived_long = lived_seconds > _HEALTHY_AFTER_SECONDS
        # Only what has been served since: another may have ended this very engine, when it was tried again.
        self.without.pop(served, None)
        self.same = self.same + 1 if said == self.said and not lived_long else 1
        self.count = 1 if lived_long else self.count + 1
        self.said = said
        version, self.starting = self.starting, 0
        if version and self.same >= _MOST_STARTS and set(live_order) - {version, *self.without}:
            self.without[version] = why

    @property
    def is_hopeless(self) -> bool:
        """Whether another start would end as these did."""
        return self.same >= _MOST_SAME_FAILURES

    @property
    def wait_seconds(self) -> float:
        """How long to wait before the next start: longer after each failure."""
        return backoff_seconds(self.count, _LONGEST_RESTART_SECONDS, _FIRST_RESTART_SECONDS)


@dataclass(frozen=True)
class EngineLife:
    """What the engine lives with: settings, the folder of all versions, and who is told of it."""

    config: ServingConfig
    policies: Path
    serving: Serving
    guard: EngineGuard
    set_serving: SetServing
    is_wanted: Callable[[], bool] = lambda: True
    """Whether an imported version 1, which no log has yet, was made from the model that is configured."""

    async def run(self) -> None:
        """Keeps an engine on whichever policy is live, without end: starts another when one dies or hangs.

        Raises:
            EngineError: the engine has failed _MOST_SAME_FAILURES times in a row at the same place.
            NoPolicyError: there is no policy to start the first engine on; or, later, as often in a row.
            MissingError: something that vLLM needs of the machine is not there.
        """
        failures, served = Failures(), False
        kind: type[Exception] = EngineError
        while True:
            began = time.monotonic()
            try:
                await self._live(failures)
            except (EngineError, NoPolicyError) as error:
                served = served or self.serving.accepting
                if isinstance(error, NoPolicyError) and not served:
                    raise
                why, kind = str(error), type(error)
                policy = self.serving.slot.policy
                failures.note(
                    why,
                    time.monotonic() - began,
                    self.serving.policies.state.live_order,
                    served=policy.version if policy else 0,
                )
                wait_seconds = failures.wait_seconds
            # Here, where no traceback keeps the engine: vLLM's objects must not live to the end of the interpreter.
            await self._retire()
            if failures.is_hopeless:
                do = "" if self.serving.policies.state.live_version else f". {NOT_REGISTERED}"
                raise kind(f"the engine failed {failures.same} times at the same place: {why}{do}")
            logger.error("the engine failed; starting another in %.1f s: %s", wait_seconds, why)
            await asyncio.sleep(wait_seconds)

    async def _live(self, failures: Failures) -> None:
        """Starts an engine and keeps it on the live policy until it fails; `failures` learns on what it is started.

        Raises:
            EngineError: it did not start, is dead, or hangs.
        """
        record = await self._startable(failures.without)
        failures.starting = record.manifest.version
        logger.info("starting vLLM on v%d", failures.starting)
        engine = self.serving.engine = await self._start(artifact_folder(record.artifact_uri))
        failures.starting = 0
        tasks = {
            asyncio.create_task(self._follow(engine, record, failures.without)),
            asyncio.create_task(watch(engine, self.config.engine_timeout_seconds)),
        }
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            # Not awaited: what waits for a hanging engine ends when the engine does.
            for task in tasks:
                task.cancel()

    async def _startable(self, without: Mapping[int, str]) -> PolicyRecord:
        return await startable_policy(self.config, self.policies, self.serving.policies, without, self.is_wanted)

    async def _follow(self, engine: Engine, record: PolicyRecord, without: Mapping[int, str]) -> None:
        """Proves the engine, serves with it, and keeps it on whichever policy is live."""
        swapper = Swapper(
            engine,
            self.serving.slot,
            self.serving.policies,
            root=self.policies,
            replica_id=self.config.replica_id,
            drain_timeout_seconds=self.config.drain_timeout_seconds,
            tolerance=self.config.probe_tolerance,
        )
        record = await self._begin(swapper, record, without)
        self.serving.accepting = True
        await self.set_serving(True)
        logger.info("serving v%d", record.manifest.version)
        await swapper.follow()

    async def _begin(self, swapper: Swapper, record: PolicyRecord, without: Mapping[int, str]) -> PolicyRecord:
        """Opens the slot with `record`, on which the engine was started; if it cannot be proved, with one before it.

        Otherwise a version that was promoted while no replica could try it would keep every replica from starting. It
        is tried again as any version that is made live, and found wrong then.
        """
        unproved = dict(without)
        while True:
            try:
                await swapper.begin(record, without)
            except (ProofError, EngineError) as error:
                # Raises if the engine is dead: that says nothing about the version.
                await swapper.engine.check_health()
                logger.error("v%d cannot be used: %s", record.manifest.version, error)
                unproved[record.manifest.version] = str(error)
                record = await self._startable(unproved)
                await swapper.engine.load_weights(artifact_folder(record.artifact_uri))
            else:
                return record

    async def _start(self, folder: Path) -> Engine:
        """Starts an engine while the port answers. If the server is stopped meanwhile, the start is aborted.

        Raises:
            EngineError: vLLM did not start.
        """
        deadline = time.monotonic() + _LONGEST_START_SECONDS
        starting = asyncio.ensure_future(asyncio.to_thread(start_engine, folder, self.config))
        try:
            while not starting.done() and time.monotonic() < deadline:
                self._tell_guard()
                await asyncio.wait({starting}, timeout=_LOOK_SECONDS)
            if not starting.done():
                await self._abort(starting)
                raise EngineError(f"vLLM did not start within {_LONGEST_START_SECONDS:.0f} s")
        except asyncio.CancelledError:
            await self._abort(starting)
            raise
        finally:
            self._tell_guard()
        return starting.result()

    async def _abort(self, starting: asyncio.Future[Engine]) -> None:
        while not starting.done():
            # The start fails as soon as vLLM's process is gone.
            await asyncio.to_thread(self.guard.kill_engine)
            await asyncio.wait({starting}, timeout=4 * _LOOK_SECONDS)
        if starting.exception() is None:
            starting.result().shutdown()

    def _tell_guard(self) -> None:
        self.guard.tell(each.pid for each in multiprocessing.active_children() if each.pid is not None)

    async def _retire(self) -> None:
        """Ends what is left of the engine, alive, dead or stopped. Calls in flight and those that wait are refused."""
        serving = self.serving
        engine, serving.engine = serving.engine, None
        was_accepting, serving.accepting = serving.accepting, False
        if was_accepting:
            await self.set_serving(False)
        # What still holds the old slot must find it shut, and must not open the next engine's.
        old, serving.slot = serving.slot, Slot()
        old.shut()
        await asyncio.to_thread(self.guard.kill_engine)
        if engine is None:
            return
        deadline = time.monotonic() + _LAST_CALLS_SECONDS
        while time.monotonic() < deadline and not old.idle:
            # vLLM notices its process's death and fails the calls in flight. Shut down sooner, it would forget them.
            await asyncio.sleep(_LOOK_SECONDS)
        await asyncio.to_thread(engine.shutdown)
        del engine
        # Its tasks end at the loop's next turns. Its parts refer to each other, and sockets and threads go with them.
        await asyncio.sleep(4 * _LOOK_SECONDS)
        gc.collect()
