"""What keeps a new version from going live."""

from pathlib import Path
from typing import Any, cast

import pytest

from alignd.v1 import policy_manifest_pb2, policy_service_pb2
from tests.training.trainer_process import lines
from training.config import PpoConfig, TrainingConfig
from training.handover.verdict import KL, WIN_RATE
from training.handover.version import go_live
from training.runs.folder import RunFolder

NOBODY = cast(Any, None)


@pytest.mark.parametrize(
    ("low", "kl", "promote"),
    [(0.49, 1.0, True), (0.9, 8.5, True), (0.9, 1.0, False)],
    ids=["its win rate", "its KL, over ppo.max_kl", "the operator's word"],
)
def test_a_version_stays_a_candidate_for(low: float, kl: float, promote: bool, tmp_path: Path) -> None:
    config = TrainingConfig(min_win_rate=0.5, promote=promote, ppo=PpoConfig(max_kl=8.0))
    folder = RunFolder.create(tmp_path, "run", config, origin=None)
    found = [
        policy_manifest_pb2.Evaluation(name=WIN_RATE, value=0.95, low=low, high=1.0, count=64),
        policy_manifest_pb2.Evaluation(name=KL, value=kl, low=kl - 0.1, high=kl + 0.1, count=64),
    ]
    policy = policy_service_pb2.Policy(
        manifest=policy_manifest_pb2.PolicyManifest(version=7, evaluations=found),
        stage=policy_service_pb2.STAGE_CANDIDATE,
    )
    # There is no server to ask, so that promoting it would be an error.
    assert go_live(NOBODY, folder, policy) == 7
    (line,) = lines(folder.path / "metrics.jsonl")
    assert (line["phase"], line["version"], line["promoted"]) == ("register", 7, 0.0)
