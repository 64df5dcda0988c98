"""Keeps the engine on the version that the policy log says is live, and proves each swap before users meet it.

A replica that cannot serve the live version keeps what it serves, reports why, and tries again. What could not be read
says nothing about the version. Of what was read and found wrong, the version is rejected for all once every replica has
reported it; the log then makes the version before it live again.
"""

import asyncio
import contextlib
import logging
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from alignd.v1 import events_pb2
from alignd.v1.policy_service_pb2 import (
    REPLICA_STATE_DEGRADED,
    REPLICA_STATE_SERVING,
    STAGE_LIVE,
    STAGE_REJECTED,
    ReplicaStatus,
)
from alignd.v1.types_pb2 import PolicyRef
from policies.artifact import ArtifactError, UnreadableError
from policies.location import artifact_folder
from policies.registered import verify_registered
from policies.state import PolicyRecord, new_change
from serving.bootstrap import RETRY_SECONDS, register_first
from serving.errors import Refusal
from serving.policy_log import LONGEST_WAIT_SECONDS, PolicyLog, retry_wait_seconds
from serving.proof import WARM_UP_TOKENS, Proof, ProofError, measure, prove
from serving.slot import Exchange, Slot
from serving.vllm_engine import Engine, EngineError

logger = logging.getLogger(__name__)

# A replica that says nothing for policies.state.GONE_AFTER_SECONDS is taken to be gone.
REPORT_SECONDS = 3600.0
_MOST_LOADS = 2


@dataclass(frozen=True)
class _Failure:
    """Why the live version could not be served."""

    why: str
    is_verdict: bool = False
    """Whether it was read and found wrong. Otherwise nothing is known of the version."""
    is_final: bool = False
    """Whether to try again is of no use: the engine has computed with the weights."""


class Swapper:
    """Swaps the policy in `slot` whenever the log makes another one live."""

    def __init__(
        self,
        engine: Engine,
        slot: Slot,
        policies: PolicyLog,
        *,
        root: Path,
        replica_id: str,
        drain_timeout_seconds: float,
        tolerance: float,
    ) -> None:
        self.engine = engine
        self.slot = slot
        self.policies = policies
        self.root = root
        self.replica_id = replica_id
        self.drain_timeout_seconds = drain_timeout_seconds
        self.tolerance = tolerance
        self.served: PolicyRecord | None = None
        self._status = ReplicaStatus()
        self._passed_over: PolicyRecord | None = None
        self._reported_at = time.monotonic()

    async def begin(self, record: PolicyRecord, passed_over: Mapping[int, str] = {}) -> None:
        """Opens the slot with the version that the engine was started on; `follow` reports that.

        Args:
            record: the version. If it is the first of all, it is registered once it has been proved.
            passed_over: the versions on which no engine starts, and why.

        Raises:
            ProofError: the engine does not serve it.
            NoPolicyError: it cannot be registered.
        """
        # vLLM's first log-probabilities of a prompt take seconds. A version may have no probes, so without this the
        # first swap would wait for them while it admits nobody.
        await self.engine.logprobs(WARM_UP_TOKENS, "warm-up")
        proof = await prove(self.engine, record.manifest, None, self.tolerance)
        self._open(await register_first(record, self.policies))
        # Asked only now: another version may have been made live since the engine was started.
        live = self.policies.state.live_version
        self._status = ReplicaStatus(state=REPLICA_STATE_SERVING, probe_error=proof.error)
        if record.manifest.version != live:
            why = passed_over.get(live, "")
            self._passed_over = self.policies.state.policies[live] if why else None
            self._status.state = REPLICA_STATE_DEGRADED
            self._status.error_message = f"v{live}: {why}" if why else f"v{live} is tried next"

    async def follow(self) -> None:
        """Swaps whenever another version is live, without end; tries again, with growing waits, where it cannot.

        Raises:
            EngineError: neither the new nor the old version can be served; the engine must be started again.
        """
        # Here and not in `begin`: a report waits for the bus, and serving does not.
        await self._report(self._status)
        if self._passed_over:
            # What ends every engine that starts on it would most likely end this one too: users are served meanwhile.
            why = _Failure(self._status.error_message)
            await self._wait_while_live(self._passed_over, why, LONGEST_WAIT_SECONDS)
        going_live, failures = (0, 0), 0
        while True:
            live = self.policies.state.policies.get(self.policies.state.live_version)
            if live is None or self.served is None or live.manifest.version == self.served.manifest.version:
                await self._say_that_all_is_well()
                await self._wait(REPORT_SECONDS)
                continue
            if going_live != _going_live(live):
                going_live, failures = _going_live(live), 0
            failure = await self.swap(live, may_load_again=failures + 1 < _MOST_LOADS)
            if failure is None:
                continue
            failures += 1
            await self._report_failure(live, failure)
            wait = math.inf if failure.is_final else retry_wait_seconds(failures)
            await self._wait_while_live(live, failure, wait)

    async def swap(self, record: PolicyRecord, *, may_load_again: bool = False) -> _Failure | None:
        """Serves `record` from now on; if that fails, continues with the version that was served, and returns why.

        Args:
            record: the version.
            may_load_again: whether weights that do not load are to be tried again, rather than be found wrong.
        """
        version = record.manifest.version
        # Verified again, before any request has to wait: files that were whole at registration may not be now.
        path, failure = await self._verified(record)
        if failure:
            return failure
        exchange = await self.slot.close(self.drain_timeout_seconds)
        is_loading = False
        try:
            before = await self._before(record)
            is_loading = True
            await self.engine.load_weights(path)
            is_loading = False
            proof = await prove(self.engine, record.manifest, before, self.tolerance)
        except (EngineError, ProofError) as error:
            await self._restore()
            # Files that cannot be read, or that have changed since they were verified, explain whatever happened.
            _, failure = await self._verified(record)
            may_pass = is_loading and may_load_again
            return failure or _Failure(str(error), is_verdict=not may_pass, is_final=not may_pass)
        self._open(record)
        status = _timed(exchange)
        status.state, status.probe_error = REPLICA_STATE_SERVING, proof.error
        logger.info("serving v%d after a pause of %.2f s", version, status.pause_seconds)
        await self._report(status)
        return None

    async def _verified(self, record: PolicyRecord) -> tuple[Path, _Failure | None]:
        """Returns the folder of a version, and what is wrong with its files, if anything is."""
        assert self.served is not None
        like = artifact_folder(self.served.artifact_uri)
        try:
            return await asyncio.to_thread(verify_registered, record, self.root, like), None
        except UnreadableError as error:
            return Path(), _Failure(f"its files cannot be read: {error}")
        except ArtifactError as error:
            return Path(), _Failure(f"its files cannot be used: {error}", is_verdict=True)

    async def _before(self, record: PolicyRecord) -> Proof | None:
        """Returns what the present weights give for the probes of `record`, or None if it has the same weights."""
        assert self.served is not None
        if self.served.manifest.weight_digest == record.manifest.weight_digest:
            return None
        return Proof(await measure(self.engine, record.manifest), 0.0)

    async def _restore(self) -> None:
        """Loads and proves the version that was served before.

        Raises:
            EngineError: that failed too, and the engine must be started again.
        """
        assert self.served is not None
        await self.engine.load_weights(artifact_folder(self.served.artifact_uri))
        try:
            await prove(self.engine, self.served.manifest, None, self.tolerance)
        except ProofError as error:
            raise EngineError(f"the version before cannot be restored: {error}") from error
        self._open(self.served)

    def _open(self, record: PolicyRecord) -> None:
        self.served = record
        self.slot.open(PolicyRef(version=record.manifest.version, weight_digest=record.manifest.weight_digest))

    async def _wait_while_live(self, record: PolicyRecord, failure: _Failure, seconds: float) -> None:
        """Waits to try again. Returns early once another version is live, or this one has been made live anew.

        Args:
            record: the live version, which failed.
            failure: why.
            seconds: how long to wait at most.
        """
        until = time.monotonic() + seconds
        while (left := until - time.monotonic()) > 0:
            state = self.policies.state
            live = state.policies.get(state.live_version)
            if live is None or _going_live(live) != _going_live(record):
                return
            # The only version that was ever live stays so: without one, no server could start.
            if failure.is_verdict and state.all_found_wrong and len(state.live_order) > 1:
                await self._reject(live, failure.why)
            else:
                await self._wait(left)

    async def _reject(self, record: PolicyRecord, why: str) -> None:
        """Asks for the live version to be rejected, since every replica has found it wrong."""
        version = record.manifest.version
        logger.error("v%d is rejected: every replica has found it wrong; here: %s", version, why)
        change = new_change(version, STAGE_LIVE, STAGE_REJECTED, f"serving/{self.replica_id}", why[:1024])
        changed = events_pb2.PolicyStageChanged(change=change, needs_quorum=True)
        await self._propose(events_pb2.PolicyEvent(stage_changed=changed))

    async def _wait(self, seconds: float) -> None:
        """Returns when the log has changed, or after `seconds`. Reports in time that this replica is still there."""
        due = self._reported_at + REPORT_SECONDS - time.monotonic()
        with contextlib.suppress(TimeoutError):
            # Not asyncio.wait_for: in Python 3.11 it forgets a cancellation that comes together with the change.
            async with asyncio.timeout(max(0.0, min(seconds, due))):
                await self.policies.changed()
        if time.monotonic() >= self._reported_at + REPORT_SECONDS:
            await self._publish(self._status)

    async def _report_failure(self, record: PolicyRecord, failure: _Failure) -> None:
        """Reports that this replica goes on with what it serves, and why; once, if it is why it did so before."""
        version = record.manifest.version
        status = ReplicaStatus()
        status.CopyFrom(self._status)
        status.state, status.error_message = REPLICA_STATE_DEGRADED, f"v{version}: {failure.why}"
        status.failed_version = version if failure.is_verdict else 0
        if status != self._status:
            assert self.served is not None
            logger.error("v%d is not served, v%d still is: %s", version, self.served.manifest.version, failure.why)
            await self._publish(status)

    async def _say_that_all_is_well(self) -> None:
        """Reports that the live version is served, if it was not at the last report. Why that was so stays said."""
        if self._status.state != REPLICA_STATE_SERVING:
            status = ReplicaStatus()
            status.CopyFrom(self._status)
            status.state, status.failed_version = REPLICA_STATE_SERVING, 0
            await self._publish(status)

    async def _report(self, status: ReplicaStatus) -> None:
        """Reports what this replica serves from now on."""
        assert self.slot.policy is not None
        status.replica_id = self.replica_id
        status.policy.CopyFrom(self.slot.policy)
        status.swap_time.GetCurrentTime()
        await self._publish(status)

    async def _publish(self, status: ReplicaStatus) -> None:
        self._status, self._reported_at = status, time.monotonic()
        event = events_pb2.PolicyEvent(replica_status=status)
        event.replica_status.report_time.GetCurrentTime()
        await self._propose(event)

    async def _propose(self, event: events_pb2.PolicyEvent) -> None:
        """Appends `event`, and retries while the bus is away: serving continues without the bus."""
        while True:
            try:
                await self.policies.propose(event)
            except Refusal as refusal:
                logger.warning("%s; trying again", refusal)
                await asyncio.sleep(RETRY_SECONDS)
            else:
                return


def _going_live(record: PolicyRecord) -> tuple[int, int]:
    """Returns what is the same until this version is made live another time."""
    return record.manifest.version, len(record.history)


def _timed(exchange: Exchange) -> ReplicaStatus:
    """Returns a status with the times of an exchange that ends now."""
    return ReplicaStatus(drain_seconds=exchange.drain_seconds, pause_seconds=time.monotonic() - exchange.emptied_at)
