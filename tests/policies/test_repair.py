"""A policy log that leaves no version to serve is mended by events that every replica applies."""

import shutil
from pathlib import Path

import pytest

from alignd.v1.policy_manifest_pb2 import PolicyManifest
from policies.artifact import write_artifact
from policies.repair import Repair, RepairError, plan_repair
from policies.state import PolicyState
from tests.policies.test_artifact import make_manifest, make_writer
from tests.policies.test_state import stages
from tests.serving.policy_events import STAGE_CANDIDATE, STAGE_LIVE, STAGE_REJECTED, STAGE_RETIRED


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Versions 1 to 4: each was made from the one before, except for 4, which was made from 2."""
    for version, parent in ((1, 0), (2, 1), (3, 2), (4, 2)):
        manifest = make_manifest(version)
        manifest.parent_version = parent
        write_artifact(tmp_path, manifest, make_writer(seed=version))
    (tmp_path / "v9").mkdir()
    return tmp_path


def repaired(state: PolicyState, root: Path, live: int = 0) -> Repair:
    return plan_repair(state, root, live, "operator/a", "a test")


@pytest.fixture
def log(root: Path) -> PolicyState:
    """A log in which version 3 is live, after 1 and 2."""
    return repaired(PolicyState(), root, 3).state


def damage(root: Path, version: int) -> None:
    (root / f"v{version}" / "config.json").write_text('{"seed": 9999}')


def test_a_log_that_was_lost_is_written_anew_from_the_manifests(root: Path) -> None:
    repair = repaired(PolicyState(), root, 4)
    assert stages(repair.state) == {1: STAGE_RETIRED, 2: STAGE_RETIRED, 3: STAGE_CANDIDATE, 4: STAGE_LIVE}
    assert repair.state.live_order == (1, 2, 4), "training begins from what is live"
    assert repair.said[0].startswith("v9 is left out: cannot read the manifest: ")
    assert repair.state.policies[3].artifact_uri == str(root / "v3")


def test_which_version_of_a_lost_log_is_live_is_for_the_operator_to_say(root: Path) -> None:
    with pytest.raises(RepairError, match=r"(?s)v1: made .*imported.*v4: made .*from v2.*--live V"):
        repaired(PolicyState(), root)
    with pytest.raises(RepairError, match=r"there is no v7 that can be read"):
        repaired(PolicyState(), root, 7)
    damage(root, 4)
    with pytest.raises(RepairError, match=r"v4 cannot be served: config.json is not what was written"):
        repaired(PolicyState(), root, 4)
    with pytest.raises(RepairError, match="no version in"):
        repaired(PolicyState(), root / "elsewhere", 1)


def test_a_version_that_was_deleted_does_not_keep_its_children_from_the_log(root: Path) -> None:
    shutil.rmtree(root / "v2")
    assert stages(repaired(PolicyState(), root, 3).state) == {1: STAGE_CANDIDATE, 3: STAGE_LIVE, 4: STAGE_CANDIDATE}


def test_a_log_that_is_whole_needs_nothing(root: Path, log: PolicyState) -> None:
    repair = repaired(log, root)
    assert (repair.events, repair.said) == ([], ["v3 is live, and whole: there is nothing to repair"])


def test_a_damaged_live_version_gives_way_to_the_last_one_that_is_whole(root: Path, log: PolicyState) -> None:
    damage(root, 3)
    damage(root, 2)
    repair = repaired(log, root)
    assert stages(repair.state) == {
        1: STAGE_LIVE, 2: STAGE_RETIRED, 3: STAGE_REJECTED, 4: STAGE_CANDIDATE,
    }  # fmt: skip
    assert repair.state.policies[3].history[-1].reason == "repair: config.json is not what was written"
    damage(root, 1)
    with pytest.raises(RepairError, match="No version that was live before can be served"):
        repaired(log, root)
    assert repaired(log, root, 4).state.live_version == 4


def test_what_cannot_be_read_now_is_not_given_up(root: Path, log: PolicyState) -> None:
    (root / "v3").rename(root / "hidden")
    with pytest.raises(RepairError, match=r"v3 is live, and its files cannot be read now.*\n.*--live V"):
        repaired(log, root)
    assert stages(repaired(log, root, 2).state)[3] == STAGE_RETIRED


def test_a_rejected_version_that_an_operator_names_is_live_again(root: Path, log: PolicyState) -> None:
    damage(root, 3)
    rejected = repaired(log, root).state
    shutil.rmtree(root / "v3")
    manifest = PolicyManifest()
    manifest.CopyFrom(rejected.policies[3].manifest)
    write_artifact(root, manifest, make_writer(seed=3))
    repair = repaired(rejected, root, 3)
    assert stages(repair.state) == {1: STAGE_RETIRED, 2: STAGE_RETIRED, 3: STAGE_LIVE, 4: STAGE_CANDIDATE}
