"""What a server starts on: the live version if it is whole, or else the one before; version 1 is imported once."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from alignd.v1 import events_pb2
from alignd.v1.policy_service_pb2 import REPLICA_STATE_DEGRADED, STAGE_LIVE, STAGE_RETIRED
from deploy.cli.repair import repair_log
from deploy.config import AligndConfig
from deploy.models import make_tiny_llama
from feedback.bus.topics import TOPICS
from feedback.bus.url import open_bus
from policies.artifact import verify_artifact
from serving.bootstrap import NoPolicyError, imported_policy, register_first, startable_policy
from serving.config import ServingConfig
from serving.policy_log import PolicyLog
from tests.first_version import write_first
from tests.serving.policy_events import STAGE_CANDIDATE, moved
from tests.serving.rollout import flip_a_bit
from tests.serving.versions import write_version


@asynccontextmanager
async def log_at(path: Path) -> AsyncIterator[PolicyLog]:
    """Follows the log of an embedded bus."""
    bus = open_bus(f"sqlite:///{path}")
    bus.create_topics(TOPICS)
    followed = PolicyLog(bus)
    await followed.start()
    yield followed
    await followed.stop()
    bus.close()


@pytest.fixture
async def policies(tmp_path: Path) -> AsyncIterator[PolicyLog]:
    """The log of an embedded bus."""
    async with log_at(tmp_path / "bus.db") as followed:
        yield followed


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The folder of all versions, with the first."""
    return write_first(tmp_path / "policies", make_tiny_llama(tmp_path / "tiny")).parent


@pytest.fixture
def config() -> ServingConfig:
    return ServingConfig()


async def promoted(policies: PolicyLog, root: Path, version: int) -> Path:
    """Writes, registers and promotes a version, with no server there to try it."""
    path, manifest = await asyncio.to_thread(write_version, root, root / "v1", version)
    registered = events_pb2.PolicyRegistered(manifest=manifest, artifact_uri=str(path))
    await policies.propose(events_pb2.PolicyEvent(registered=registered))
    await policies.propose(moved(version, STAGE_CANDIDATE, STAGE_LIVE))
    return path


async def test_version_1_is_registered_once(policies: PolicyLog, root: Path, config: ServingConfig) -> None:
    imported = await startable_policy(config, root, policies)
    assert (imported.manifest.version, policies.changes) == (1, [])
    first = await register_first(imported, policies)
    assert (first.manifest, first.stage) == (imported.manifest, STAGE_LIVE)
    assert verify_artifact(root / "v1") == first.manifest
    changes = len(policies.changes)
    assert await startable_policy(ServingConfig(), root, policies) == first
    # Another replica was faster.
    assert await register_first(imported, policies) == first
    assert len(policies.changes) == changes


async def test_a_first_version_of_another_model_than_is_configured_is_not_taken_up(
    policies: PolicyLog, root: Path, config: ServingConfig
) -> None:
    with pytest.raises(NoPolicyError, match=r"policies/v1 was not made from serving\.initial_model; start again"):
        await startable_policy(config, root, policies, is_wanted=lambda: False)
    await register_first(imported_policy(root), policies)
    assert (await startable_policy(config, root, policies, is_wanted=lambda: False)).stage == STAGE_LIVE


async def test_another_model_than_the_first_of_the_log_is_not_registered(
    policies: PolicyLog, root: Path, tmp_path: Path
) -> None:
    await register_first(imported_policy(root), policies)
    other = write_first(tmp_path / "elsewhere", make_tiny_llama(tmp_path / "other", seed=1)).parent
    with pytest.raises(NoPolicyError, match="version 1 is taken by other weights"):
        await register_first(imported_policy(other), policies)


async def test_without_a_version_it_says_what_to_do(policies: PolicyLog, config: ServingConfig, tmp_path: Path) -> None:
    with pytest.raises(NoPolicyError, match=r"set serving\.initial_model .* or run `alignd policies import FOLDER`"):
        await startable_policy(config, tmp_path / "none", policies)


async def test_a_damaged_import_is_not_registered(policies: PolicyLog, root: Path, config: ServingConfig) -> None:
    flip_a_bit(root / "v1")
    with pytest.raises(NoPolicyError, match=r"no policy is registered, and .*v1 is damaged: .*; remove it, and import"):
        await startable_policy(config, root, policies)
    assert policies.changes == []


async def test_a_damaged_live_version_gives_way_to_the_one_before_and_is_not_rejected_for_all(
    policies: PolicyLog, root: Path, config: ServingConfig
) -> None:
    await register_first(imported_policy(root), policies)
    await promoted(policies, root, 2)
    flip_a_bit(await promoted(policies, root, 3))
    assert (await startable_policy(config, root, policies)).manifest.version == 2
    assert policies.state.policies[3].stage == STAGE_LIVE
    assert (await startable_policy(config, root, policies, without={2: "a test"})).manifest.version == 1


async def test_where_no_version_can_be_read_it_says_so_and_waits(
    policies: PolicyLog, root: Path, config: ServingConfig, tmp_path: Path
) -> None:
    """Only this replica fails to see the folder. Others may see it, and so may this one later."""
    await register_first(imported_policy(root), policies)
    await promoted(policies, root, 2)
    root.rename(tmp_path / "elsewhere")
    starting = asyncio.ensure_future(startable_policy(config, root, policies))
    async with asyncio.timeout(30):
        while config.replica_id not in policies.state.replicas:
            await policies.changed()
    status = policies.state.replicas[config.replica_id]
    assert (status.state, status.HasField("policy"), status.failed_version) == (REPLICA_STATE_DEGRADED, False, 0)
    assert status.error_message.startswith("v2: its files cannot be read: ")
    assert [policies.state.policies[version].stage for version in (1, 2)] == [STAGE_RETIRED, STAGE_LIVE]
    (tmp_path / "elsewhere").rename(root)
    assert (await starting).manifest.version == 2


async def test_a_damaged_only_version_is_an_error_and_is_kept(
    policies: PolicyLog, root: Path, config: ServingConfig
) -> None:
    await register_first(imported_policy(root), policies)
    flip_a_bit(root / "v1")
    with pytest.raises(NoPolicyError, match=r"no policy can be used, not the live one either \(v1: "):
        await startable_policy(config, root, policies)
    assert policies.state.live_version == 1


async def test_versions_without_their_log_are_not_imported_anew(
    policies: PolicyLog, root: Path, config: ServingConfig, tmp_path: Path
) -> None:
    """The bus was lost: version 1 would go live without a word, and what was learned since would be forgotten."""
    await register_first(imported_policy(root), policies)
    await promoted(policies, root, 2)
    async with log_at(tmp_path / "other.db") as empty:
        with pytest.raises(NoPolicyError, match=r"holds v1, v2: the bus was lost.*`alignd policies repair`"):
            await startable_policy(config, root, empty)
        assert (empty.state.policies, empty.changes) == ({}, [])
    settings = AligndConfig(data_dir=tmp_path, bus=f"sqlite:///{tmp_path}/other.db")
    for dry_run in (True, False):
        said = await asyncio.to_thread(repair_log, settings, 2, "operator/a", "a test", dry_run=dry_run)
        assert said[-1] == "v2 becomes LIVE"
    async with log_at(tmp_path / "other.db") as repaired:
        assert len(repaired.changes) == 5, "a dry run changes nothing"
        assert (await startable_policy(config, root, repaired)).manifest.version == 2
