"""Says which model a version was made from, and whether the policies here began with a given one.

A version's weights are not the bytes of its model's, so the version has a file beside them that names those.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import time
from contextlib import closing
from pathlib import Path

from alignd.v1.policy_manifest_pb2 import PolicyManifest
from deploy.config import AligndConfig
from deploy.importing.files import ModelFiles, find_files
from deploy.models import ModelError
from feedback.bus.contract import BusError
from feedback.bus.topics import TOPICS
from feedback.bus.url import open_bus
from policies.artifact import ArtifactError, UnreadableError, read_manifest, weight_files
from policies.manifest import SOURCE_FILE
from policies.state import PolicyState
from serving.policy_log import PolicyLog

_BUS_TIMEOUT_SECONDS = 15.0


def write_origin(files: ModelFiles, target: Path) -> None:
    """Writes the file that names what a version was made from."""
    (target / SOURCE_FILE).write_bytes(_origin(files))


def began_with(folder: Path, state: PolicyState) -> bool:
    """Whether an imported version was made from the model in a folder.

    Raises:
        ModelError: the folder's files cannot be read.
    """
    imported = [each.manifest for each in state.policies.values() if not each.manifest.HasField("training")]
    return any(_made_from(folder, manifest) for manifest in imported)


def is_left(folder: Path, config: AligndConfig) -> bool:
    """Whether v1 is on disk though the bus knows no version, made from the model in `folder`.

    An interrupted start left it, or vLLM did not serve it, or its bus is gone.

    Raises:
        ModelError: it cannot be read now.
    """
    left = config.policies_dir / "v1"
    if not left.exists():
        return False
    try:
        return _made_from(folder, read_manifest(left))
    except UnreadableError as error:
        raise ModelError(f"{left} cannot be read now: {error}") from error
    except ArtifactError:
        return False


def put_aside(root: Path) -> Path | None:
    """Gives v1 another name, which no version has, and returns it; None if there is no v1.

    It is not removed: if the bus was lost, and is only thought to know no version, it is all that is left.

    Raises:
        ModelError: its folder cannot be changed.
    """
    aside = root / f"unregistered-{time.strftime('%Y%m%dT%H%M%S')}"
    try:
        (root / "v1").rename(aside)
    except FileNotFoundError:
        return None
    except OSError as error:
        raise ModelError(f"{root / 'v1'} was made from another model, and cannot be renamed: {error}") from error
    return aside


def elsewhere(config: AligndConfig) -> str:
    """Returns in words what to name so that another model has a place of its own."""
    if config.bus or config.store:
        return "another ALIGND_DATA_DIR, with an ALIGND_BUS and ALIGND_STORE of its own,"
    return "another ALIGND_DATA_DIR"


def policies_here(config: AligndConfig) -> PolicyState:
    """Returns the state of all policies, from the bus.

    Raises:
        BusError: the bus does not answer.
    """
    if not config.bus and not (config.data_dir / "bus.db").exists():
        return PolicyState()
    return asyncio.run(_policies(config))


async def _policies(config: AligndConfig) -> PolicyState:
    try:
        with closing(await asyncio.to_thread(open_bus, config.bus_url)) as bus:
            await asyncio.to_thread(bus.create_topics, TOPICS)
            policies = PolicyLog(bus)
            try:
                await asyncio.wait_for(policies.start(), _BUS_TIMEOUT_SECONDS)
            finally:
                await policies.stop()
            return policies.state
    except TimeoutError as error:
        raise BusError(str(error) or "timed out") from error


def _made_from(folder: Path, manifest: PolicyManifest) -> bool:
    """Whether a version was made from the model in a folder, byte by byte."""
    named = next((file.sha256 for file in manifest.files if file.path == SOURCE_FILE), None)
    if named is None:
        # A version of an earlier release, which has the model's own files.
        return _holds(folder, manifest)
    try:
        return hashlib.sha256(_origin(find_files(folder))).hexdigest() == named
    except ModelError:
        # A model that cannot be imported has not been.
        return False


def _origin(files: ModelFiles) -> bytes:
    """Returns the sizes and SHA-256 of a model's files, as JSON."""
    described = {}
    for name in sorted({*files.settings, *files.weights}):
        path = files.folder / name
        described[name] = {"size_bytes": path.stat().st_size, "sha256": _sha256(path)}
    return (json.dumps({"files": described}, indent=2) + "\n").encode()


def _holds(folder: Path, manifest: PolicyManifest) -> bool:
    """Whether the weights in a folder are those of a version."""
    weights = {file.path: file for file in weight_files(manifest.files)}
    found = {path.name: path for path in folder.glob("*.safetensors")}
    if weights.keys() != found.keys():
        return False
    if any(path.stat().st_size != weights[name].size_bytes for name, path in found.items()):
        return False
    return all(_sha256(path) == weights[name].sha256 for name, path in found.items())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
