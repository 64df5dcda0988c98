"""Which version an engine is started on, and what becomes of a version that it does not start on or does not serve.

The engine is a stand-in, which gives the log-probabilities that it is told; tests/serving/test_start.py has a real one.
"""

import asyncio
from collections.abc import AsyncIterator, Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from alignd.v1 import events_pb2
from alignd.v1.policy_manifest_pb2 import PolicyManifest, Probe
from alignd.v1.policy_service_pb2 import REPLICA_STATE_DEGRADED, STAGE_CANDIDATE, STAGE_LIVE
from feedback.bus.contract import BusError, Record
from feedback.bus.topics import TOPICS
from feedback.bus.url import open_bus
from policies.artifact import UnreadableError, read_manifest, write_artifact
from policies.vllm_settings import MissingError
from serving import bootstrap, engine_life
from serving.bootstrap import NoPolicyError, imported_policy, register_first
from serving.config import ServingConfig
from serving.engine_life import EngineLife, Failures
from serving.inference_service import Serving
from serving.policy_log import PolicyLog
from serving.sampler import Quota
from serving.slot import Slot
from serving.vllm_engine import EngineError
from tests.policies.test_artifact import make_manifest, make_writer
from tests.serving.policy_events import moved

LOGPROB = -1.0


class Engine:
    """Gives every token the same log-probability, a little less after each load."""

    loading, has_answered = False, True

    def __init__(self, logprob: float) -> None:
        self.logprob = logprob

    async def logprobs(self, token_ids: Sequence[int], request_id: str) -> list[float]:
        return [self.logprob for _ in token_ids[1:]]

    async def load_weights(self, folder: Path) -> None:
        # Different for each version, as those of different weights are.
        self.logprob -= 0.001

    async def check_health(self) -> None:
        """Is well."""

    async def probe(self, request_id: str) -> None:
        """Answers at once."""

    def num_tokens(self) -> Mapping[str, int]:
        return {}

    def shutdown(self) -> None:
        """Has no process."""


class Guard:
    """Guards nothing."""

    def tell(self, pids: Iterable[int]) -> None:
        """Forgets them."""

    def kill_engine(self) -> None:
        """Finds none."""


class Starts:
    """Starts the stand-in: notes on which versions, and fails on some."""

    def __init__(self, failing: Mapping[str, Exception], logprob: float) -> None:
        self.failing, self.logprob = failing, logprob
        self.versions: list[str] = []

    def __call__(self, folder: Path, config: ServingConfig) -> Engine:
        self.versions.append(folder.name)
        if folder.name in self.failing:
            raise self.failing[folder.name]
        return Engine(self.logprob)


@pytest.fixture
async def policies(tmp_path: Path) -> AsyncIterator[PolicyLog]:
    """An empty log."""
    bus = open_bus(f"sqlite:///{tmp_path}/bus.db")
    bus.create_topics(TOPICS)
    followed = PolicyLog(bus)
    await followed.start()
    yield followed
    await followed.stop()
    bus.close()


def write(root: Path, version: int) -> events_pb2.PolicyRegistered:
    """Writes a version, with a probe, as the stand-in gives it."""
    manifest = make_manifest(version)
    manifest.parent_version = version - 1
    manifest.probes.append(Probe(token_ids=[1, 2], logprobs=[LOGPROB]))
    folder, manifest = write_artifact(root, manifest, make_writer(seed=version))
    return events_pb2.PolicyRegistered(manifest=manifest, artifact_uri=str(folder))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """The folder of all versions, with an imported first."""
    write(tmp_path / "policies", 1)
    return tmp_path / "policies"


def life_on(
    monkeypatch: pytest.MonkeyPatch,
    policies: PolicyLog,
    root: Path,
    failing: Mapping[str, Exception],
    logprob: float = LOGPROB,
) -> tuple[EngineLife, Starts]:
    starts = Starts(failing, logprob)
    monkeypatch.setattr(engine_life, "start_engine", starts)
    monkeypatch.setattr(engine_life, "backoff_seconds", lambda *failures: 0.0)

    async def set_serving(is_serving: bool) -> None:
        """Tells nobody."""

    guard: Any = Guard()
    config = ServingConfig(replica_id="one")
    return EngineLife(config, root, Serving(Slot(), policies, Quota(1)), guard, set_serving), starts


async def served(life: EngineLife, version: int = 0) -> int:
    """Runs the engine until it has reported that it serves this version, or any, and returns which."""
    policies = life.serving.policies
    running = asyncio.ensure_future(life.run())
    try:
        async with asyncio.timeout(20):
            while not running.done() and not _reports(policies, version):
                await asyncio.wait({running, asyncio.ensure_future(policies.changed())}, return_when="FIRST_COMPLETED")
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    return policies.state.replicas["one"].policy.version


def _reports(policies: PolicyLog, version: int) -> bool:
    status = policies.state.replicas.get("one")
    return status is not None and version in (0, status.policy.version)


async def test_the_first_version_is_in_no_log_until_an_engine_has_proved_it(
    monkeypatch: pytest.MonkeyPatch, policies: PolicyLog, root: Path
) -> None:
    life, _ = life_on(monkeypatch, policies, root, {}, LOGPROB - 1)
    with pytest.raises(NoPolicyError) as raised:
        await life.run()
    said = str(raised.value)
    assert said.startswith("v1 cannot be served: served log-probabilities differ from the trainer's by 1.0000 nats")
    assert "serving.probe_tolerance" in said and "serving.dtype" in said and "serving.initial_model" in said
    assert "backup" not in said
    assert (policies.state.policies, policies.changes) == ({}, [])
    life, _ = life_on(monkeypatch, policies, root, {})
    assert await served(life) == 1
    assert [each.to_stage for each in policies.state.policies[1].history] == [STAGE_CANDIDATE, STAGE_LIVE]


async def test_an_engine_that_has_proved_the_first_version_waits_for_its_folder_and_the_bus(
    monkeypatch: pytest.MonkeyPatch, policies: PolicyLog, root: Path
) -> None:
    monkeypatch.setattr(bootstrap, "RETRY_SECONDS", 0.01)
    publish, failures = policies.bus.publish, ["no folder", "no bus"]

    def fails_once(records: Sequence[Record]) -> None:
        if failures:
            raise BusError(failures.pop())
        publish(records)

    def cannot_read(folder: Path) -> PolicyManifest:
        monkeypatch.setattr(bootstrap, "read_manifest", read_manifest)
        raise UnreadableError(failures.pop(0))

    monkeypatch.setattr(policies.bus, "publish", fails_once)
    monkeypatch.setattr(bootstrap, "read_manifest", cannot_read)
    life, starts = life_on(monkeypatch, policies, root, {})
    assert await served(life) == 1
    assert (starts.versions, failures) == (["v1"], [])


async def test_a_first_version_on_which_no_engine_starts_leaves_no_trace(
    monkeypatch: pytest.MonkeyPatch, policies: PolicyLog, root: Path
) -> None:
    life, starts = life_on(monkeypatch, policies, root, {"v1": EngineError("vLLM did not start: no such layer")})
    with pytest.raises(EngineError, match=r"3 times at the same place: .*no such layer\. It is in no log yet: mend"):
        await life.run()
    assert starts.versions == ["v1"] * 3
    assert policies.changes == []


async def test_another_first_version_than_was_proved_is_not_registered(policies: PolicyLog, root: Path) -> None:
    """Another replica on the same folder has imported another model while this one's engine started."""
    record = imported_policy(root)
    (root / "v1").rename(root / "aside")
    write_artifact(root, make_manifest(1), make_writer(seed=7))
    with pytest.raises(NoPolicyError, match="has changed while the engine started"):
        await register_first(record, policies)
    assert policies.changes == []


async def test_where_no_engine_starts_on_the_live_version_the_one_before_is_served(
    monkeypatch: pytest.MonkeyPatch, policies: PolicyLog, root: Path
) -> None:
    await register_first(imported_policy(root), policies)
    await policies.propose(events_pb2.PolicyEvent(registered=write(root, 2)))
    await policies.propose(moved(2, STAGE_CANDIDATE, STAGE_LIVE))
    life, starts = life_on(monkeypatch, policies, root, {"v2": EngineError("vLLM did not start: no such layer")})
    assert await served(life) == 1
    assert starts.versions == ["v2", "v2", "v1"]
    status = policies.state.replicas["one"]
    assert (status.state, status.error_message) == (REPLICA_STATE_DEGRADED, "v2: vLLM did not start: no such layer")
    assert policies.state.live_version == 2


async def test_a_version_promoted_while_an_engine_starts_does_not_wait_for_the_one_passed_over(
    monkeypatch: pytest.MonkeyPatch, policies: PolicyLog, root: Path
) -> None:
    await register_first(imported_policy(root), policies)
    for version in (2, 3):
        await policies.propose(events_pb2.PolicyEvent(registered=write(root, version)))
    await policies.propose(moved(2, STAGE_CANDIDATE, STAGE_LIVE))
    life, _ = life_on(monkeypatch, policies, root, {"v2": EngineError("vLLM did not start: no such layer")})

    async def promote(is_serving: bool) -> None:
        if is_serving:
            await policies.propose(moved(3, STAGE_CANDIDATE, STAGE_LIVE))

    assert await served(replace(life, set_serving=promote), version=3) == 3


@pytest.mark.parametrize(("live_order", "without"), [((1, 2), {2}), ((2,), set()), ((), set())])
def test_a_version_is_left_out_only_where_another_could_be_served(
    live_order: Collection[int], without: set[int]
) -> None:
    failures = Failures()
    for lived_seconds in (0.0, 9.0):
        assert failures.without == {}
        failures.starting = 2
        failures.note("it failed", lived_seconds, live_order)
    assert failures.without.keys() == without
    failures.note("it failed", 1000.0, live_order, served=1)
    assert failures.without.keys() == without, "an engine that served another one may have ended when it tried this"
    failures.note("it failed", 1000.0, live_order, served=2)
    assert failures.without == {}


async def test_what_vllm_lacks_of_the_machine_ends_the_server_at_once(
    monkeypatch: pytest.MonkeyPatch, policies: PolicyLog, root: Path
) -> None:
    life, starts = life_on(monkeypatch, policies, root, {"v1": MissingError("vLLM needs the library libnuma.so.1")})
    with pytest.raises(MissingError, match="libnuma"):
        await life.run()
    assert starts.versions == ["v1"]
