"""A replica that cannot serve the live version speaks for itself; all replicas, or an operator, speak for the version.

The engine is a stand-in: in these tests a version's files fail before an engine is asked, except where loading fails.
"""

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from alignd.v1 import events_pb2
from alignd.v1.policy_manifest_pb2 import Probe
from alignd.v1.policy_service_pb2 import (
    REPLICA_STATE_DEGRADED,
    REPLICA_STATE_SERVING,
    STAGE_CANDIDATE,
    STAGE_LIVE,
    STAGE_REJECTED,
    ReinstateRequest,
    RejectRequest,
    RollbackRequest,
)
from feedback.bus.topics import TOPICS
from feedback.bus.url import open_bus
from policies.artifact import write_artifact
from policies.state import PolicyRecord
from serving import policy_log
from serving.errors import Refusal
from serving.policy_log import PolicyLog
from serving.policy_service import PolicyService
from serving.slot import Slot
from serving.swapper import Swapper
from serving.vllm_engine import EngineError
from tests.policies.test_artifact import make_manifest, make_writer
from tests.serving.policy_events import moved, reported
from tests.serving.rollout import add_a_file

LOGPROB = -1.0


class Engine:
    """Serves whatever it is given, and fails to load it as often as it is told."""

    def __init__(self) -> None:
        self.loaded: list[str] = []
        self.load_failures = 0

    async def load_weights(self, folder: Path) -> None:
        self.loaded.append(folder.name)
        if self.load_failures:
            self.load_failures -= 1
            raise EngineError("out of memory")

    async def logprobs(self, token_ids: Sequence[int], request_id: str) -> list[float]:
        # Different for each version, as those of different weights are.
        return [LOGPROB - len(self.loaded) / 1000 for _ in token_ids[1:]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "policies"


@asynccontextmanager
async def following(tmp_path: Path, root: Path, engine: Engine) -> AsyncIterator[Swapper]:
    """Runs a replica that serves version 1, with version 2 registered."""
    bus = open_bus(f"sqlite:///{tmp_path}/bus.db")
    bus.create_topics(TOPICS)
    policies = PolicyLog(bus)
    await policies.start()
    for version in (1, 2):
        manifest = make_manifest(version)
        manifest.parent_version = version - 1
        manifest.probes.append(Probe(token_ids=[1, 2], logprobs=[LOGPROB]))
        folder, manifest = write_artifact(root, manifest, make_writer(seed=version))
        registered = events_pb2.PolicyRegistered(manifest=manifest, artifact_uri=str(folder))
        await policies.propose(events_pb2.PolicyEvent(registered=registered))
    await policies.propose(moved(1, STAGE_CANDIDATE, STAGE_LIVE))
    engine_: Any = engine
    swapper = Swapper(engine_, Slot(), policies, root=root, replica_id="one", drain_timeout_seconds=0.0, tolerance=0.1)
    await swapper.begin(policies.state.policies[1])
    task = asyncio.ensure_future(swapper.follow())
    try:
        await until(swapper, lambda: "one" in policies.state.replicas)
        yield swapper
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await policies.stop()
        bus.close()


async def until(swapper: Swapper, is_so: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not is_so():
            await swapper.policies.changed()


def record(swapper: Swapper, version: int) -> PolicyRecord:
    return swapper.policies.state.policies[version]


async def test_a_wrong_bit_on_one_disk_of_two_degrades_that_replica_alone(tmp_path: Path, root: Path) -> None:
    async with following(tmp_path, root, Engine()) as swapper:
        policies, state = swapper.policies, lambda: swapper.policies.state
        good = (root / "v2" / "config.json").read_bytes()
        (root / "v2" / "config.json").write_bytes(good.replace(b"2", b"3"))
        await policies.propose(reported("two", 1))
        await policies.propose(moved(2, STAGE_CANDIDATE, STAGE_LIVE))
        await until(swapper, lambda: state().replicas["one"].failed_version == 2)
        await policies.propose(reported("two", 2))
        status = state().replicas["one"]
        assert (status.state, status.policy.version) == (REPLICA_STATE_DEGRADED, 1)
        assert "config.json is not what was written" in status.error_message
        assert record(swapper, 2).stage == STAGE_LIVE
        # Once the disk has been repaired it serves what all serve, without being asked.
        (root / "v2" / "config.json").write_bytes(good)
        await until(swapper, lambda: state().replicas["one"].policy.version == 2)
        assert state().replicas["one"].state == REPLICA_STATE_SERVING
        assert [change.to_stage for change in record(swapper, 2).history] == [STAGE_CANDIDATE, STAGE_LIVE]


async def test_what_every_replica_finds_wrong_is_rejected_for_all(tmp_path: Path, root: Path) -> None:
    async with following(tmp_path, root, Engine()) as swapper:
        policies = swapper.policies
        add_a_file(root / "v2")
        await policies.propose(reported("two", 1))
        await policies.propose(moved(2, STAGE_CANDIDATE, STAGE_LIVE))
        await until(swapper, lambda: policies.state.replicas["one"].failed_version == 2)
        assert record(swapper, 2).stage == STAGE_LIVE
        await policies.propose(reported("two", 1, failed=2))
        await until(swapper, lambda: policies.state.live_version == 1)
        assert record(swapper, 2).history[-1].actor == "serving/one"
        await until(swapper, lambda: policies.state.replicas["one"].state == REPLICA_STATE_SERVING)


async def test_weights_that_do_not_load_are_tried_again_before_they_are_found_wrong(tmp_path: Path, root: Path) -> None:
    engine = Engine()
    async with following(tmp_path, root, engine) as swapper:
        engine.load_failures = 1
        await swapper.policies.propose(moved(2, STAGE_CANDIDATE, STAGE_LIVE))
        await until(swapper, lambda: swapper.policies.state.replicas["one"].policy.version == 2)
        assert engine.loaded == ["v2", "v1", "v2"]
        assert record(swapper, 2).stage == STAGE_LIVE


async def test_an_operator_rejects_for_all_and_takes_it_back(tmp_path: Path, root: Path) -> None:
    async with following(tmp_path, root, Engine()) as swapper:
        policies, service = swapper.policies, PolicyService(swapper.policies, root)
        with pytest.raises(Refusal, match="no other version was live before it"):
            await service.Reject(RejectRequest(version=1, actor="a", reason="b"), None)
        with pytest.raises(Refusal, match=r"^no version is left that was live before the present one"):
            await service.Rollback(RollbackRequest(actor="a"), None)
        with pytest.raises(Refusal, match="it is CANDIDATE: promote it instead"):
            await service.Rollback(RollbackRequest(version=2, actor="a"), None)
        await policies.propose(moved(2, STAGE_CANDIDATE, STAGE_LIVE))
        await until(swapper, lambda: policies.state.replicas["one"].policy.version == 2)
        for _ in range(2):
            rejected = await service.Reject(RejectRequest(version=2, actor="op", reason="users"), None)
            assert (rejected.policy.stage, policies.state.live_version) == (STAGE_REJECTED, 1)
        await until(swapper, lambda: policies.state.replicas["one"].policy.version == 1)
        with pytest.raises(Refusal) as raised:
            await service.Rollback(RollbackRequest(version=2, actor="a"), None)
        assert "it is REJECTED" in raised.value.message
        assert "never live" not in raised.value.message
        for _ in range(2):
            taken_back = await service.Reinstate(ReinstateRequest(version=2, actor="op", reason="the disk"), None)
            assert taken_back.policy.history[-1].reason == "the disk"
        with pytest.raises(Refusal, match="only a REJECTED version"):
            await service.Reinstate(ReinstateRequest(version=1, actor="op", reason="b"), None)
        await service.Rollback(RollbackRequest(version=2, actor="op"), None)
        await until(swapper, lambda: policies.state.replicas["one"].policy.version == 2)


async def test_a_replica_reports_also_while_nothing_happens(
    tmp_path: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that says nothing would be taken to be gone, and others would decide for it."""
    monkeypatch.setattr("serving.swapper.REPORT_SECONDS", 0.3)
    async with following(tmp_path, root, Engine()) as swapper:
        seen = len(swapper.policies.changes)
        await until(swapper, lambda: len(swapper.policies.changes) >= seen + 2)
        status = swapper.policies.state.replicas["one"]
        assert status.report_time.ToNanoseconds() > status.swap_time.ToNanoseconds()


def test_waits_grow_up_to_a_limit() -> None:
    first, last = policy_log.retry_wait_seconds(1), policy_log.retry_wait_seconds(1000)
    assert 0.5 <= first <= 1.0
    assert 150 <= last <= 300
