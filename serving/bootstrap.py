"""Finds the policy that an engine can be started on; imports version 1 if there is none yet."""

import asyncio
import logging
import shutil
from pathlib import Path

from alignd.v1 import events_pb2
from alignd.v1.policy_service_pb2 import STAGE_CANDIDATE, STAGE_LIVE, STAGE_REJECTED, STAGE_UNSPECIFIED
from policies.artifact import ArtifactError, verify_artifact, write_artifact
from policies.location import artifact_folder
from policies.manifest import new_manifest
from policies.state import PolicyRecord, new_change
from serving.config import ServingConfig
from serving.policy_log import PolicyLog

logger = logging.getLogger(__name__)

_ACTOR = "serving/bootstrap"


class NoPolicyError(Exception):
    """There is nothing to serve; the message says what to do."""


async def startable_policy(config: ServingConfig, folder: Path, policies: PolicyLog) -> PolicyRecord:
    """Returns the live policy, whose files have been verified.

    If the files of the live version are damaged, it is rejected and the one before takes its place. If no version is
    whole, none is rejected: the fault is then likely to be this replica's, which may not see the folder.

    Raises:
        NoPolicyError: no version is live and none can be imported, or no version that was ever live is whole.
    """
    if not policies.state.live_version:
        await import_first(config, folder, policies)
    while True:
        damaged: list[tuple[int, str]] = []
        for version in reversed(policies.state.live_order):
            record = policies.state.policies[version]
            try:
                await asyncio.to_thread(verify_artifact, artifact_folder(record.artifact_uri), None)
            except ArtifactError as error:
                damaged.append((version, str(error)))
            else:
                break
        else:
            tried = next((f"v{bad}: {why}" for bad, why in damaged), "none was ever live")
            raise NoPolicyError(
                f"no policy is whole, not the live one either ({tried}); is their folder there, and mounted? "
                "If it is, restore a version from a backup"
            )
        for bad, why in damaged:
            await reject(policies, policies.state.policies[bad], f"its files are damaged: {why}")
        if policies.state.live_version == version:
            return policies.state.policies[version]


async def reject(policies: PolicyLog, record: PolicyRecord, why: str) -> None:
    """Rejects the live version, so that the one before it is live again.

    Raises:
        NoPolicyError: there is none before it.
    """
    logger.error("v%d cannot be used: %s", record.manifest.version, why)
    if len(policies.state.live_order) < 2:
        raise NoPolicyError(f"the only live policy, v{record.manifest.version}, cannot be used: {why}")
    await _change_stage(policies, record, STAGE_REJECTED, why[:1024])


async def import_first(config: ServingConfig, folder: Path, policies: PolicyLog) -> None:
    """Registers the configured model as version 1 and makes it live.

    Raises:
        NoPolicyError: none is configured, or it cannot be read.
    """
    model = config.initial_model
    if model is None:
        raise NoPolicyError("no policy is registered; set serving.initial_model to a Hugging Face model folder")
    if not (model / "config.json").is_file():
        raise NoPolicyError(f"serving.initial_model: {model} has no config.json")
    manifest = new_manifest(1, reference_version=1)
    path = folder / "v1"
    if path.exists():
        manifest = await asyncio.to_thread(verify_artifact, path, None)
    else:
        path, manifest = await asyncio.to_thread(
            write_artifact, folder, manifest, lambda target: _copy_model(model, target)
        )
    change = new_change(1, STAGE_UNSPECIFIED, STAGE_CANDIDATE, _ACTOR, f"imported from {model.name}")
    registered = events_pb2.PolicyRegistered(manifest=manifest, artifact_uri=str(path.resolve()), change=change)
    await policies.propose(events_pb2.PolicyEvent(registered=registered))
    if not policies.state.live_version:
        await _change_stage(policies, policies.state.policies[1], STAGE_LIVE, "the first policy")


def _copy_model(model: Path, target: Path) -> None:
    """Copies a model's files, except those that would have to be unpickled."""
    for source in sorted(model.iterdir()):
        if source.is_file() and source.suffix in {".json", ".jinja", ".safetensors", ".txt", ".model"}:
            shutil.copyfile(source, target / source.name)


async def _change_stage(policies: PolicyLog, record: PolicyRecord, stage: int, reason: str) -> None:
    change = new_change(record.manifest.version, record.stage, stage, _ACTOR, reason)  # type: ignore[arg-type]
    await policies.propose(events_pb2.PolicyEvent(stage_changed=events_pb2.PolicyStageChanged(change=change)))
