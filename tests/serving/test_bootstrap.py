"""What a server starts on: the live version if it is whole, or else the one before; version 1 is imported once."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from alignd.v1 import events_pb2
from alignd.v1.policy_service_pb2 import STAGE_LIVE, STAGE_REJECTED, STAGE_RETIRED
from deploy.models import make_tiny_llama
from feedback.bus.topics import TOPICS
from feedback.bus.url import open_bus
from policies.artifact import verify_artifact
from serving.bootstrap import NoPolicyError, startable_policy
from serving.config import ServingConfig
from serving.policy_log import PolicyLog
from tests.serving.policy_events import STAGE_CANDIDATE, moved
from tests.serving.rollout import flip_a_bit
from tests.serving.versions import write_version


@pytest.fixture
async def policies(tmp_path: Path) -> AsyncIterator[PolicyLog]:
    """The log of an embedded bus."""
    bus = open_bus(f"sqlite:///{tmp_path}/bus.db")
    bus.create_topics(TOPICS)
    followed = PolicyLog(bus)
    await followed.start()
    yield followed
    await followed.stop()
    bus.close()


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "policies"


@pytest.fixture
def config(tmp_path: Path) -> ServingConfig:
    return ServingConfig(initial_model=make_tiny_llama(tmp_path / "tiny"))


async def promoted(policies: PolicyLog, root: Path, version: int) -> Path:
    """Writes, registers and promotes a version, with no server there to try it."""
    path, manifest = await asyncio.to_thread(write_version, root, root / "v1", version)
    registered = events_pb2.PolicyRegistered(manifest=manifest, artifact_uri=str(path))
    await policies.propose(events_pb2.PolicyEvent(registered=registered))
    await policies.propose(moved(version, STAGE_CANDIDATE, STAGE_LIVE))
    return path


async def test_the_configured_model_becomes_version_1_once(
    policies: PolicyLog, root: Path, config: ServingConfig
) -> None:
    (config.initial_model or root).joinpath("code.py").write_text("print('never copied')")
    first = await startable_policy(config, root, policies)
    assert (first.manifest.version, first.stage) == (1, STAGE_LIVE)
    assert verify_artifact(root / "v1") == first.manifest
    assert not (root / "v1" / "code.py").exists()
    changes = len(policies.changes)
    assert await startable_policy(ServingConfig(), root, policies) == first
    assert len(policies.changes) == changes


async def test_an_import_that_was_interrupted_is_taken_up(
    policies: PolicyLog, root: Path, config: ServingConfig, tmp_path: Path
) -> None:
    """A crash came after the folder was written and before the version was registered."""
    written = (await startable_policy(config, root, policies)).manifest
    bus = open_bus(f"sqlite:///{tmp_path}/other.db")
    bus.create_topics(TOPICS)
    other = PolicyLog(bus)
    await other.start()
    again = await startable_policy(config, root, other)
    await other.stop()
    bus.close()
    assert again.manifest == written


async def test_without_a_model_it_says_what_to_set(policies: PolicyLog, root: Path) -> None:
    with pytest.raises(NoPolicyError, match=r"serving\.initial_model"):
        await startable_policy(ServingConfig(), root, policies)
    with pytest.raises(NoPolicyError, match=r"no config\.json"):
        await startable_policy(ServingConfig(initial_model=root), root, policies)


async def test_a_damaged_live_version_gives_way_to_the_one_before(
    policies: PolicyLog, root: Path, config: ServingConfig
) -> None:
    await startable_policy(config, root, policies)
    await promoted(policies, root, 2)
    flip_a_bit(await promoted(policies, root, 3))
    assert (await startable_policy(config, root, policies)).manifest.version == 2
    rejected = policies.state.policies[3]
    assert rejected.stage == STAGE_REJECTED
    assert "its files are damaged" in rejected.history[-1].reason


async def test_where_no_version_is_whole_none_is_rejected(
    policies: PolicyLog, root: Path, config: ServingConfig, tmp_path: Path
) -> None:
    """Only this replica fails to see the folder. Others may see it, and so may this one later."""
    await startable_policy(config, root, policies)
    await promoted(policies, root, 2)
    root.rename(tmp_path / "elsewhere")
    with pytest.raises(NoPolicyError, match=r"not the live one either \(v2: "):
        await startable_policy(config, root, policies)
    assert [policies.state.policies[version].stage for version in (1, 2)] == [STAGE_RETIRED, STAGE_LIVE]
    (tmp_path / "elsewhere").rename(root)
    assert (await startable_policy(config, root, policies)).manifest.version == 2


async def test_a_damaged_only_version_is_an_error_and_is_kept(
    policies: PolicyLog, root: Path, config: ServingConfig
) -> None:
    await startable_policy(config, root, policies)
    flip_a_bit(root / "v1")
    with pytest.raises(NoPolicyError, match=r"no policy is whole, not the live one either \(v1: "):
        await startable_policy(config, root, policies)
    assert policies.state.live_version == 1
