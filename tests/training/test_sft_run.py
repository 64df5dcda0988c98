"""A run of SFT that was killed once its version was registered."""

import json
from pathlib import Path
from typing import Any, cast

from alignd.v1 import policy_manifest_pb2, policy_service_pb2
from training.config import TrainingConfig
from training.parallel import ALONE
from training.run_folder import RunFolder
from training.sft_run import run_sft
from training.workplace import Workplace


class Registered:
    """A policy service that has a version of this run."""

    def __init__(self, run_id: str) -> None:
        lineage = policy_manifest_pb2.TrainingLineage(run_id=run_id)
        manifest = policy_manifest_pb2.PolicyManifest(version=3, training=lineage)
        self.policy = policy_service_pb2.Policy(version=3, manifest=manifest)

    def newest(self, count: int) -> list[policy_service_pb2.Policy]:
        return [self.policy]


def test_killed_once_its_version_was_registered_it_makes_no_other(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "run-sft", TrainingConfig(), origin=None)
    nobody, asked = cast(Any, None), []
    place = Workplace(nobody, nobody, cast(Any, Registered("run-sft")), tmp_path, nobody, asked.append, ALONE)
    for _ in range(2):  # killed once more, behind the line that says so
        assert run_sft(place, folder).version == 3
    assert asked == ["run-sft"] * 2
    (line,) = map(json.loads, (folder.path / "metrics.jsonl").read_text().splitlines())
    assert (line["phase"], line["version"], line["promoted"]) == ("register", 3, 0.0)
