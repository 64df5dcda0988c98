"""A run of SFT whose end was disturbed by a kill, or by a server that does not answer or refuses."""

import errno
import json
from pathlib import Path
from typing import Any, cast

import pytest

from alignd.v1 import policy_manifest_pb2, policy_service_pb2
from feedback.store.engine import open_engine
from policies.artifact import ArtifactError, write_artifact
from policies.server_connection import ServerConnection
from tests.policies.test_artifact import make_manifest, make_writer
from tests.training.serving_errors import AWAY, REFUSAL, Answer
from training.config import TrainingConfig
from training.context import TrainerContext
from training.errors import TrainingError
from training.loop import run_sft_once
from training.models.parallel import ALONE
from training.runs.folder import SFT, RunFolder
from training.runs.lease import TrainerLease
from training.sft_run import run_sft


class Registered:
    """A policy service that has a version of this run."""

    def __init__(self, run_id: str) -> None:
        lineage = policy_manifest_pb2.TrainingLineage(run_id=run_id)
        manifest = policy_manifest_pb2.PolicyManifest(version=3, training=lineage)
        self.policy = policy_service_pb2.Policy(version=3, manifest=manifest)

    def newest(self, count: int) -> list[policy_service_pb2.Policy]:
        return [self.policy]


class Forgetful(Registered):
    """A policy service without a version, which does not answer when it is first asked to register one."""

    def __init__(self, run_id: str) -> None:
        super().__init__(run_id)
        self.offered: list[tuple[int, Path]] = []

    def newest(self, count: int) -> list[policy_service_pb2.Policy]:
        return []

    def register(
        self, manifest: policy_manifest_pb2.PolicyManifest, folder: Path, reason: str
    ) -> policy_service_pb2.Policy:
        self.offered.append((manifest.version, folder))
        if len(self.offered) == 1:
            raise AWAY
        return self.policy


def test_a_version_that_was_written_is_the_one_that_is_registered_however_late(tmp_path: Path) -> None:
    folder, policies = RunFolder.create(tmp_path, "run-sft", TrainingConfig(), origin=None), tmp_path / "policies"
    for version, run_id in ((2, "another"), (3, "run-sft"), (4, "another")):
        manifest = make_manifest(version)
        manifest.training.run_id = run_id
        manifest.evaluations.add(name="score", value=1.0, count=8)
        write_artifact(policies, manifest, make_writer())
    (policies / "v5").mkdir()  # It is no version.
    nobody, client = cast(Any, None), Forgetful("run-sft")
    context = TrainerContext(nobody, nobody, cast(Any, client), policies, nobody, lambda run_id: None, ALONE)
    with pytest.raises(Answer):
        run_sft(context, folder)
    assert run_sft(context, folder).version == 3
    assert client.offered == [(3, policies / "v3")] * 2
    assert json.loads((folder.path / "manifest.json").read_text())["version"] == 3


def run_once(folder: Path, config: TrainingConfig) -> int:
    return run_sft_once(
        config,
        store_url=f"sqlite:///{folder}/store.db",
        policies_dir=folder,
        runs_dir=folder / "runs",
        server=ServerConnection("127.0.0.1:1"),
    )


@pytest.fixture
def refusing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Exception]:
    """Returns a list of errors, of which `alignd sft` raises the next one each time it has begun."""
    errors: list[Exception] = []

    def fail(context: TrainerContext, folder: RunFolder) -> policy_service_pb2.Policy:
        raise errors.pop(0)

    monkeypatch.setattr("training.context.open_context", lambda *arguments: None)
    monkeypatch.setattr("training.sft_run.run_sft", fail)
    return errors


def test_sft_resumes_when_serving_is_back_and_ends_when_it_refuses(tmp_path: Path, refusing: list[Exception]) -> None:
    refusing += [AWAY, OSError(errno.ENOSPC, "No space left on device"), REFUSAL, ArtifactError("a file is missing")]
    with pytest.raises(TrainingError, match="serving is away: connection refused; `alignd sft` resumes"):
        run_once(tmp_path, TrainingConfig())
    with pytest.raises(OSError, match="No space"):
        run_once(tmp_path, TrainingConfig())
    begun = RunFolder.unfinished(tmp_path / "runs", SFT)
    assert begun is not None
    with pytest.raises(TrainingError, match="serving refused: cannot read the artifact"):
        run_once(tmp_path, TrainingConfig())
    (line,) = map(json.loads, (begun.path / "metrics.jsonl").read_text().splitlines())
    assert (line["phase"], line["reason"]) == ("stopped", "serving refused: cannot read the artifact")
    assert begun.ended
    with pytest.raises(TrainingError, match="a file is missing"):
        run_once(tmp_path, TrainingConfig())
    assert len(list((tmp_path / "runs").iterdir())) == 2


def test_the_trainer_with_the_lease_is_named_and_when_it_expires(tmp_path: Path) -> None:
    engine = open_engine(f"sqlite:///{tmp_path}/store.db")
    assert TrainerLease(engine, "host/1", 3600.0).acquire()
    with pytest.raises(TrainingError, match=r"host/1 trains on this store; stop it first.*60 s after"):
        run_once(tmp_path, TrainingConfig(lease_seconds=60))


def test_killed_once_its_version_was_registered_it_makes_no_other(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "run-sft", TrainingConfig(), origin=None)
    nobody, asked = cast(Any, None), []
    context = TrainerContext(nobody, nobody, cast(Any, Registered("run-sft")), tmp_path, nobody, asked.append, ALONE)
    for _ in range(2):  # the second time as after a kill once the line "register" was written
        assert run_sft(context, folder).version == 3
    assert asked == ["run-sft"] * 4  # before each of its two phases
    (line,) = map(json.loads, (folder.path / "metrics.jsonl").read_text().splitlines())
    assert (line["phase"], line["version"], line["promoted"]) == ("register", 3, 0.0)
