"""Finds the policy that an engine can be started on; registers the imported version 1 once an engine has proved it."""

import asyncio
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from alignd.v1 import events_pb2
from alignd.v1.policy_service_pb2 import (
    REPLICA_STATE_DEGRADED,
    STAGE_CANDIDATE,
    STAGE_LIVE,
    STAGE_REJECTED,
    STAGE_UNSPECIFIED,
    ReplicaStatus,
)
from policies.artifact import ArtifactError, UnreadableError, read_manifest, verify_artifact
from policies.location import version_folders
from policies.registered import verify_registered
from policies.state import PolicyRecord, new_change
from serving.config import ServingConfig
from serving.errors import Refusal
from serving.policy_log import PolicyLog, retry_wait_seconds

logger = logging.getLogger(__name__)

_ACTOR = "serving/bootstrap"
RETRY_SECONDS = 5.0
NOT_REGISTERED = (
    "It is in no log yet: mend serving.initial_model, or set what the reason names (serving.dtype, "
    "serving.probe_tolerance, serving.max_model_len, ...), and start again"
)
"""What to do where the first version cannot be served."""


class NoPolicyError(Exception):
    """There is nothing to serve; the message says what to do."""


async def startable_policy(
    config: ServingConfig,
    folder: Path,
    policies: PolicyLog,
    without: Mapping[int, str] = {},
    is_wanted: Callable[[], bool] = lambda: True,
) -> PolicyRecord:
    """Returns the live policy, or else the one that was live last before it, whose files have been verified.

    Where the log is empty, this is the imported version 1, which is not registered yet: see `register_first`. Nothing
    is rejected for what one replica finds on its disk. While no version can be used, but one that cannot be read now
    may come back, this is reported, and tried again with growing waits.

    Args:
        config: names the replica.
        folder: the folder of all versions.
        policies: the log.
        without: versions that are not to be used, and why.
        is_wanted: whether the imported version 1 was made from the model that is configured; it may read that model.

    Raises:
        NoPolicyError: no version is live and none was imported, or none that was ever live can be used.
    """
    failures = 0
    while True:
        bad = [_Bad(f"v{version}: {why}", may_come_back=False) for version, why in without.items()]
        try:
            if not policies.state.live_version:
                return await _first_policy(folder, policies, without.get(1, ""), is_wanted)
        except UnreadableError as error:
            bad.append(_Bad(str(error), may_come_back=True))
        candidates = [version for version in reversed(policies.state.live_order) if version not in without]
        for version in candidates:
            found = await _try(policies.state.policies[version], folder)
            if found is None:
                return policies.state.policies[version]
            bad.append(found)
        why = next((each.why for each in bad if each.may_come_back), "")
        if not why:
            raise NoPolicyError(
                f"no policy can be used, not the live one either ({bad[0].why}). Restore a version from a backup if "
                "its files are damaged; `alignd policies repair` says what it finds of each"
            )
        logger.error("no policy can be read now (%s); is its folder there, and mounted? Trying again", why)
        failures += 1
        await _report_nothing_served(config, policies, why)
        await asyncio.sleep(retry_wait_seconds(failures))


@dataclass(frozen=True)
class _Bad:
    """Why a version cannot be used, and whether that may pass."""

    why: str
    may_come_back: bool


async def _try(record: PolicyRecord, folder: Path) -> _Bad | None:
    """Returns why a version cannot be used, or None if its files are whole."""
    try:
        await asyncio.to_thread(verify_registered, record, folder)
    except ArtifactError as error:
        may_come_back = isinstance(error, UnreadableError)
        how = "read" if may_come_back else "used"
        found = _Bad(f"v{record.manifest.version}: its files cannot be {how}: {error}", may_come_back)
        logger.error("%s", found.why)
        return found
    return None


async def _first_policy(folder: Path, policies: PolicyLog, why_not: str, is_wanted: Callable[[], bool]) -> PolicyRecord:
    """Returns the first policy, which an import has written, and which may not be registered yet.

    Raises:
        NoPolicyError: there have been other versions, and which of them should be live is for an operator to say; or
            the first version is not there, damaged, of another model, or was found wrong: `why_not`.
        UnreadableError: the folder of versions, or the first version, cannot be read now.
    """
    others = sorted(version for version in policies.state.policies if version > 1)
    rejected = [version for version, each in policies.state.policies.items() if each.stage == STAGE_REJECTED]
    if others or rejected:
        raise NoPolicyError("no version is live, though some are registered; `alignd policies repair` makes one live")
    if why_not:
        raise NoPolicyError(f"v1 cannot be served: {why_not}. {NOT_REGISTERED}")
    try:
        left = await asyncio.to_thread(version_folders, folder)
    except OSError as error:
        raise UnreadableError(f"the folder of versions cannot be read now: {error}") from error
    if set(left) - {1}:
        names = ", ".join(f"v{version}" for version in sorted(left))
        raise NoPolicyError(
            f"the policy log is empty, but {folder} holds {names}: the bus was lost, or is another one. Restore its "
            "topic of policies from a backup, or let `alignd policies repair` write it anew from these versions"
        )
    if 1 not in left:
        raise NoPolicyError(
            "no policy is registered; set serving.initial_model to a Hugging Face model folder, or run "
            "`alignd policies import FOLDER`"
        )
    record = await asyncio.to_thread(imported_policy, folder)
    if not policies.state.policies and not await asyncio.to_thread(is_wanted):
        raise NoPolicyError(
            f"no policy is registered, and {folder.name}/v1 was not made from serving.initial_model; start again, so "
            "that this is imported"
        )
    return record


def imported_policy(folder: Path) -> PolicyRecord:
    """Returns version 1, which an import has written and tried, as it is before it is registered.

    Raises:
        NoPolicyError: it is damaged.
        UnreadableError: it cannot be read now.
    """
    path = folder / "v1"
    try:
        manifest = verify_artifact(path, None)
    except UnreadableError:
        raise
    except ArtifactError as error:
        raise NoPolicyError(
            f"no policy is registered, and {folder.name}/v1 is damaged: {error}; remove it, and import the model again"
        ) from error
    return PolicyRecord(manifest, str(path.resolve()), STAGE_UNSPECIFIED, ())


async def register_first(record: PolicyRecord, policies: PolicyLog) -> PolicyRecord:
    """Registers version 1, which an engine has proved, and makes it live; a registered version is returned as it is.

    So a model that vLLM cannot load, or computes otherwise than the trainer, is in no log, and another can be imported.

    Args:
        record: the version that the engine serves.
        policies: the log.

    Raises:
        NoPolicyError: meanwhile its folder has got, or the log has registered, another version 1.
    """
    while record.stage == STAGE_UNSPECIFIED:
        try:
            return await _register(record, policies)
        except (Refusal, UnreadableError) as error:
            # Says nothing of the version, nor of the engine, which took long to start.
            logger.warning("v1 cannot be registered now: %s; trying again", error)
            await asyncio.sleep(RETRY_SECONDS)
    return record


async def _register(record: PolicyRecord, policies: PolicyLog) -> PolicyRecord:
    """Registers version 1 and makes it live, so far as that has not been done.

    Raises:
        NoPolicyError: its folder or the log has another version 1.
        UnreadableError: its folder cannot be read now.
        Refusal: the bus is away.
    """
    try:
        is_same = await asyncio.to_thread(read_manifest, Path(record.artifact_uri)) == record.manifest
    except UnreadableError:
        raise
    except ArtifactError:
        is_same = False
    if not is_same:
        raise NoPolicyError(f"{record.artifact_uri} has changed while the engine started; start again")
    change = new_change(1, STAGE_UNSPECIFIED, STAGE_CANDIDATE, _ACTOR, "imported")
    registered = events_pb2.PolicyRegistered(manifest=record.manifest, artifact_uri=record.artifact_uri, change=change)
    outcome = await policies.propose(events_pb2.PolicyEvent(registered=registered))
    if outcome.refusal:
        raise NoPolicyError(
            f"v1 cannot be registered: {outcome.refusal}. Has another replica begun with another model?"
        )
    if not policies.state.live_version:
        change = new_change(1, policies.state.policies[1].stage, STAGE_LIVE, _ACTOR, "the first policy")
        await policies.propose(events_pb2.PolicyEvent(stage_changed=events_pb2.PolicyStageChanged(change=change)))
    return policies.state.policies[1]


async def _report_nothing_served(config: ServingConfig, policies: PolicyLog, why: str) -> None:
    """Reports that this replica serves nothing, once for each reason. Without the bus it is in the log alone."""
    status = ReplicaStatus(replica_id=config.replica_id, state=REPLICA_STATE_DEGRADED, error_message=why)
    last = policies.state.replicas.get(config.replica_id)
    if last and (last.state, last.error_message) == (status.state, why) and not last.HasField("policy"):
        return
    status.report_time.GetCurrentTime()
    try:
        await policies.propose(events_pb2.PolicyEvent(replica_status=status))
    except Refusal as refusal:
        logger.warning("%s", refusal)
