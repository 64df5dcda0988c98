"""Keeps the engine on the version that the policy log says is live, and proves each swap before users meet it.

A swap is proved by log-probabilities: those that the engine gives for the manifest's probes must match the trainer's,
and must differ from those it gave before. A version that cannot be loaded or proved is rejected, and the version before
it is restored.
"""

import asyncio
import logging
import time
from dataclasses import dataclass
from pathlib import Path

from alignd.v1 import events_pb2, policy_manifest_pb2
from alignd.v1.policy_service_pb2 import STAGE_LIVE, STAGE_REJECTED, ReplicaStatus
from alignd.v1.types_pb2 import PolicyRef
from policies.artifact import ArtifactError, ComparisonError, verify_artifact
from policies.location import artifact_folder
from policies.state import PolicyRecord, new_change
from serving.errors import Refusal
from serving.policy_log import PolicyLog
from serving.slot import Exchange, Slot
from serving.vllm_engine import Engine, EngineError

logger = logging.getLogger(__name__)

_RETRY_SECONDS = 5.0
_WARM_UP_TOKENS = (0, 1)


class ProofError(Exception):
    """The engine does not serve the weights that it was asked to load."""


@dataclass(frozen=True)
class _Proof:
    """The engine's log-probabilities of the probes, and how far they are from the trainer's, in nats."""

    logprobs: tuple[tuple[float, ...], ...]
    error: float


async def _prove(
    engine: Engine, manifest: policy_manifest_pb2.PolicyManifest, before: _Proof | None, tolerance: float
) -> _Proof:
    """Returns the proof that `engine` serves the version of `manifest`.

    Args:
        engine: the engine, with nothing else in flight.
        manifest: the version that it should serve.
        before: what the previous, different weights gave for the same probes; None if there were none.
        tolerance: largest mean difference from the trainer's log-probabilities, in nats.

    Raises:
        ProofError: the log-probabilities differ from the trainer's, or do not differ from those of the version before.
    """
    if any(len(probe.logprobs) != len(probe.token_ids) - 1 for probe in manifest.probes):
        raise ProofError("a probe must have one log-probability for each of its tokens but the first")
    served = await _measure(engine, manifest)
    trained = [logprob for probe in manifest.probes for logprob in probe.logprobs]
    flat = [logprob for row in served for logprob in row]
    error = sum(abs(a - b) for a, b in zip(flat, trained, strict=True)) / len(flat) if flat else 0.0
    if not error <= tolerance:
        raise ProofError(
            f"served log-probabilities differ from the trainer's by {error:.4f} nats, more than {tolerance}"
        )
    if flat and before is not None and before.logprobs == served:
        raise ProofError("the engine still gives the log-probabilities of the version before")
    return _Proof(served, error)


async def _measure(engine: Engine, manifest: policy_manifest_pb2.PolicyManifest) -> tuple[tuple[float, ...], ...]:
    """Returns the engine's log-probabilities of the manifest's probes."""
    rows = []
    for index, probe in enumerate(manifest.probes):
        rows.append(tuple(await engine.logprobs(probe.token_ids, f"probe-{manifest.version}-{index}-{time.time_ns()}")))
    return tuple(rows)


class Swapper:
    """Swaps the policy in `slot` whenever the log makes another one live."""

    def __init__(
        self,
        engine: Engine,
        slot: Slot,
        policies: PolicyLog,
        *,
        replica_id: str,
        drain_timeout_seconds: float,
        tolerance: float,
    ) -> None:
        self.engine = engine
        self.slot = slot
        self.policies = policies
        self.replica_id = replica_id
        self.drain_timeout_seconds = drain_timeout_seconds
        self.tolerance = tolerance
        self.served: PolicyRecord | None = None

    async def begin(self, record: PolicyRecord) -> None:
        """Opens the slot with the version that the engine was started on.

        Raises:
            ProofError: the engine does not serve it.
        """
        # vLLM's first log-probabilities of a prompt take seconds. An imported version has no probes, so without this
        # the first swap would wait for them while it admits nobody.
        await self.engine.logprobs(_WARM_UP_TOKENS, "warm-up")
        proof = await _prove(self.engine, record.manifest, None, self.tolerance)
        self._open(record)
        await self._report(ReplicaStatus(probe_error=proof.error))

    async def follow(self) -> None:
        """Swaps whenever another version is live, without end.

        Raises:
            EngineError: neither the new nor the old version can be served; the process must be started again.
        """
        while True:
            live = self.policies.state.policies.get(self.policies.state.live_version)
            if live and self.served and live.manifest.version != self.served.manifest.version:
                await self.swap(live)
            else:
                await self.policies.changed()

    async def swap(self, record: PolicyRecord) -> None:
        """Serves `record` from now on; if that fails, rejects it and continues with the version that was served."""
        version = record.manifest.version
        try:
            path = artifact_folder(record.artifact_uri)
            # Verified again, before any request has to wait: files that were whole at registration may not be now.
            await asyncio.to_thread(self._verify, path, record)
        except ArtifactError as error:
            await self._reject(record, f"its files cannot be used: {error}")
            return
        exchange = await self.slot.close(self.drain_timeout_seconds)
        try:
            before = await self._before(record)
            await self.engine.load_weights(path)
            proof = await _prove(self.engine, record.manifest, before, self.tolerance)
        except (EngineError, ProofError) as error:
            await self._restore()
            await self._reject(record, str(error))
            return
        self._open(record)
        status = _timed(exchange)
        status.probe_error = proof.error
        logger.info("serving v%d after a pause of %.2f s", version, status.pause_seconds)
        await self._report(status)

    def _verify(self, path: Path, record: PolicyRecord) -> None:
        assert self.served is not None
        try:
            found = verify_artifact(path, artifact_folder(self.served.artifact_uri))
        except ComparisonError as error:
            # The served version cannot be read, perhaps the very reason for this swap. The engine checks shapes later.
            logger.warning("v%d is not compared with what is served: %s", record.manifest.version, error)
            found = verify_artifact(path)
        if found.weight_digest != record.manifest.weight_digest:
            raise ArtifactError("the manifest on disk names other weights than the registered one")

    async def _before(self, record: PolicyRecord) -> _Proof | None:
        """Returns what the present weights give for the probes of `record`, or None if it has the same weights."""
        assert self.served is not None
        if self.served.manifest.weight_digest == record.manifest.weight_digest:
            return None
        return _Proof(await _measure(self.engine, record.manifest), 0.0)

    async def _restore(self) -> None:
        """Loads and proves the version that was served before.

        Raises:
            EngineError: that failed too, and the process must be started again.
        """
        assert self.served is not None
        await self.engine.load_weights(artifact_folder(self.served.artifact_uri))
        try:
            await _prove(self.engine, self.served.manifest, None, self.tolerance)
        except ProofError as error:
            raise EngineError(f"the version before cannot be restored: {error}") from error
        self._open(self.served)

    def _open(self, record: PolicyRecord) -> None:
        self.served = record
        self.slot.open(PolicyRef(version=record.manifest.version, weight_digest=record.manifest.weight_digest))

    async def _reject(self, record: PolicyRecord, why: str) -> None:
        """Reports to all replicas that the version is bad. The log then makes the one before it live again."""
        version = record.manifest.version
        logger.error("v%d is rejected: %s", version, why)
        await self._report(ReplicaStatus(error_message=f"v{version}: {why}"))
        change = new_change(version, STAGE_LIVE, STAGE_REJECTED, f"serving/{self.replica_id}", why[:1024])
        event = events_pb2.PolicyEvent(stage_changed=events_pb2.PolicyStageChanged(change=change))
        while self.policies.state.live_version == version:
            await self._propose(event)

    async def _report(self, status: ReplicaStatus) -> None:
        """Publishes what this replica serves."""
        assert self.slot.policy is not None
        status.replica_id = self.replica_id
        status.policy.CopyFrom(self.slot.policy)
        status.swap_time.GetCurrentTime()
        await self._propose(events_pb2.PolicyEvent(replica_status=status))

    async def _propose(self, event: events_pb2.PolicyEvent) -> None:
        """Appends `event`, and retries while the bus is away: serving continues without the bus."""
        while True:
            try:
                await self.policies.propose(event)
            except Refusal as refusal:
                logger.warning("%s; trying again", refusal)
                await asyncio.sleep(_RETRY_SECONDS)
            else:
                return


def _timed(exchange: Exchange) -> ReplicaStatus:
    """Returns a status with the times of an exchange that ends now."""
    return ReplicaStatus(drain_seconds=exchange.drain_seconds, pause_seconds=time.monotonic() - exchange.emptied_at)
