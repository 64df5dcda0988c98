"""Decides what must be appended to the policy log so that a version that can be served is live again."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from alignd.v1 import events_pb2
from alignd.v1.policy_manifest_pb2 import PolicyManifest
from alignd.v1.policy_service_pb2 import (
    STAGE_CANDIDATE,
    STAGE_LIVE,
    STAGE_REJECTED,
    STAGE_RETIRED,
    STAGE_UNSPECIFIED,
    Stage,
)
from policies.artifact import ArtifactError, UnreadableError, read_manifest
from policies.location import version_folders
from policies.registered import verify_registered
from policies.state import PolicyState, apply, new_change, reinstated_stage, was_live


class RepairError(Exception):
    """The log cannot be repaired like this; the message says what to do instead."""


@dataclass
class Repair:
    """The events that mend the log, with what each does, in words; and the state that they lead to."""

    state: PolicyState
    actor: str
    reason: str
    events: list[events_pb2.PolicyEvent] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    def append(self, event: events_pb2.PolicyEvent, what: str) -> bool:
        """Adds an event, if every replica would apply it; returns whether."""
        outcome = apply(self.state, event)
        if outcome.refusal:
            self.said.append(f"not done: {what}: {outcome.refusal}")
            return False
        self.state = outcome.state
        self.events.append(event)
        self.said.append(what)
        return True

    def register(self, manifest: PolicyManifest, folder: Path) -> bool:
        """Registers a version by its manifest."""
        change = new_change(manifest.version, STAGE_UNSPECIFIED, STAGE_CANDIDATE, self.actor, self.reason)
        event = events_pb2.PolicyRegistered(
            manifest=manifest, artifact_uri=str(folder.resolve()), change=change, rebuilt=True
        )
        return self.append(
            events_pb2.PolicyEvent(registered=event), f"v{manifest.version} is registered, from {folder}"
        )

    def move(self, version: int, stage: Stage, reason: str = "") -> bool:
        """Changes a version's stage."""
        change = new_change(
            version, self.state.policies[version].stage, stage, self.actor, (reason or self.reason)[:1024]
        )
        event = events_pb2.PolicyStageChanged(change=change, expected_live_version=self.state.live_version)
        name = Stage.Name(stage).removeprefix("STAGE_")
        return self.append(events_pb2.PolicyEvent(stage_changed=event), f"v{version} becomes {name}")


def plan_repair(state: PolicyState, root: Path, live: int, actor: str, reason: str) -> Repair:
    """Returns what mends the log; nothing, if a version is live that can be served.

    Args:
        state: the state of the log.
        root: the folder of all versions.
        live: the version that is to be live. 0 for the present one, or the one before it if that is damaged.
        actor: who repairs it.
        reason: why.

    Raises:
        RepairError: an operator must say which version is to be live, or the one that was named cannot be served.
    """
    repair = Repair(state, actor, reason)
    on_disk = version_folders(root)
    if not state.policies:
        _rebuild(repair, on_disk, root, live)
    elif live and live not in state.policies:
        _register_named(repair, on_disk, live)
    if live:
        _make_live(repair, root, live)
    else:
        _mend_live(repair, root)
    return repair


def _rebuild(repair: Repair, on_disk: Mapping[int, Path], root: Path, live: int) -> None:
    """Registers every version on disk, since the log was lost. Those that `live` was made from were live before it."""
    manifests = dict(_manifests(on_disk, repair.said.append))
    if not manifests:
        raise RepairError(f"the policy log is empty, and there is no version in {root}: `alignd up` begins anew")
    if live not in manifests:
        lines = [f"  v{version}: {_described(each)}" for version, each in manifests.items()]
        missing = f"there is no v{live} that can be read; " if live else ""
        raise RepairError(
            "\n".join([
                f"{missing}the policy log is empty, and does not say which version is live. On disk are:",
                *lines,
                *(f"  {each}" for each in repair.said),
                "`alignd policies repair --live V` registers these, and makes V live",
            ])
        )  # fmt: skip
    for version, manifest in manifests.items():
        repair.register(manifest, on_disk[version])
    for version in _ancestors(manifests, live):
        if version in repair.state.policies:
            repair.move(version, STAGE_LIVE)


def _register_named(repair: Repair, on_disk: Mapping[int, Path], live: int) -> None:
    """Registers the version that is to be live, and the reference that it needs, from their folders."""
    if live not in on_disk:
        raise RepairError(f"v{live} is neither registered nor on disk; `alignd policies list` lists those there are")
    manifests = dict(_manifests(on_disk, lambda said: None))
    named = manifests.get(live)
    if named is None:
        raise RepairError(f"the manifest of v{live} cannot be used; `alignd policies repair` says what is on disk")
    for version in sorted({named.reference_version, live}):
        if version not in repair.state.policies and version in manifests:
            repair.register(manifests[version], on_disk[version])


def _make_live(repair: Repair, root: Path, live: int) -> None:
    """Makes the version live that was named, whatever its stage."""
    record = repair.state.policies.get(live)
    if record is None:
        raise RepairError("\n".join([f"v{live} cannot be registered:", *repair.said]))
    try:
        verify_registered(record, root)
    except ArtifactError as error:
        raise RepairError(f"v{live} cannot be served: {error}") from error
    if record.stage == STAGE_LIVE:
        repair.said.append(f"v{live} is live, and whole")
        return
    if record.stage == STAGE_REJECTED:
        repair.move(live, reinstated_stage(record))
    repair.move(live, STAGE_LIVE)


def _mend_live(repair: Repair, root: Path) -> None:
    """Makes the version before live again, if none is live, or the live one is damaged."""
    state = repair.state
    why = ""
    if state.live_version:
        try:
            verify_registered(state.policies[state.live_version], root)
        except UnreadableError as error:
            raise RepairError(
                f"v{state.live_version} is live, and its files cannot be read now: {error}\n"
                "Bring them back, or name another version: `alignd policies repair --live V`"
            ) from error
        except ArtifactError as error:
            why = str(error)
        else:
            repair.said.append(f"v{state.live_version} is live, and whole: there is nothing to repair")
            return
    good = next(_whole_before(repair, root), 0)
    if not good:
        raise RepairError(
            "\n".join([
                f"v{state.live_version} is live, and damaged: {why}" if why else "no version is live",
                *(f"  {each}" for each in repair.said),
                "No version that was live before can be served: restore one from a backup, or name one: "
                "`alignd policies repair --live V`",
            ])
        )  # fmt: skip
    repair.move(good, STAGE_LIVE)
    if why:
        repair.move(state.live_version, STAGE_REJECTED, f"repair: {why}")


def _whole_before(repair: Repair, root: Path) -> Iterator[int]:
    """Yields the versions that were live before, the last one first, whose files are whole."""
    state = repair.state
    retired = {version for version, each in state.policies.items() if each.stage == STAGE_RETIRED and was_live(each)}
    last_first = [*reversed(state.live_order), *sorted(retired - set(state.live_order), reverse=True)]
    for version in last_first:
        if version in retired:
            try:
                verify_registered(state.policies[version], root)
            except ArtifactError as error:
                repair.said.append(f"v{version} cannot be served: {error}")
            else:
                yield version


def _manifests(on_disk: Mapping[int, Path], say: Callable[[str], None]) -> Iterator[tuple[int, PolicyManifest]]:
    """Yields the manifests of the versions on disk, in order; says which cannot be used."""
    for version in sorted(on_disk):
        try:
            manifest = read_manifest(on_disk[version])
        except ArtifactError as error:
            say(f"v{version} is left out: {error}")
            continue
        if manifest.version == version:
            yield version, manifest
        else:
            say(f"v{version} is left out: its manifest is that of v{manifest.version}")


def _ancestors(manifests: Mapping[int, PolicyManifest], version: int) -> list[int]:
    """Returns the versions that a version was made from, the first one first: training begins from what is live."""
    chain: list[int] = []
    parent = manifests[version].parent_version
    while parent in manifests and parent not in chain:
        chain.append(parent)
        parent = manifests[parent].parent_version
    return chain[::-1]


def _described(manifest: PolicyManifest) -> str:
    made = manifest.create_time.ToDatetime().isoformat(" ", "seconds")
    origin = f"from v{manifest.parent_version}" if manifest.parent_version else "imported"
    measured = "".join(f", {each.name} {each.value:.3f}" for each in manifest.evaluations)
    return f"made {made}, {origin}{measured}"
