"""The demo compares all pairs of what it was answered, and reads the rest from the run that made the new policy."""

import json
from pathlib import Path
from typing import Any, cast

import pytest

from alignd.v1.inference_service_pb2 import SampleResponse
from alignd.v1.policy_service_pb2 import Policy
from alignd.v1.types_pb2 import Completion
from deploy.config import AligndConfig
from deploy.demo.follow import RunSoFar
from deploy.demo.frontier import as_sent
from deploy.demo.summary import Observed, compare
from deploy.simulation.config import SimulationConfig
from deploy.simulation.prompts import load_prompts
from tests.training.report.made_run import make_folder, make_lines, make_manifest, phase
from training.runs.folder import SAMPLES_FILE, SamplePair

NOTHING = cast(Any, None)
SIMULATION = SimulationConfig(utility="tests.deploy.test_demo_summary:worth")


def worth(prompt: str, completion: str) -> float:
    return float(completion)


def answered(*values: float) -> SampleResponse:
    return SampleResponse(completions=[Completion(text=str(value)) for value in values])


def test_policies_are_compared_by_all_pairs_and_by_the_samples_of_the_run(tmp_path: Path) -> None:
    asked = [as_sent(SIMULATION, prompt).text for prompt in load_prompts("train")[:2]]
    samples = [
        SamplePair(asked[0], "1.0", "3.0", 0, -1.0, 0.5), SamplePair(asked[0], "2.0", "5.0", 1, 1.0, 0.5),
        SamplePair(asked[1], "4.0", "4.0", 0, 1.0, 0.5), SamplePair(asked[1], "2.0", "2.0", 1, -1.0, 0.5),
    ]  # fmt: skip
    config = AligndConfig(data_dir=tmp_path)
    folder = make_folder(config.runs_dir, make_lines(2), samples=samples)
    observed = Observed(
        before=[answered(1, 2), answered(0, 5)],
        after=[answered(2, 3), answered(1, 1)],
        run=RunSoFar(folder, phase(make_lines(2), "evaluate")),
        replica=NOTHING,
        policy=Policy(version=2, manifest=make_manifest()),
        seconds_to_first_ranking=None,
    )
    found = compare(config, SIMULATION, observed)
    # 3.5 of the 4 pairs of the first prompt, and 2 of those of the second.
    assert found.won.value == pytest.approx((3.5 / 4 + 2 / 4) / 2)
    assert (found.won.wins, found.won.ties, found.won.losses, found.won.count) == (5, 1, 2, 2)
    assert found.frontier.new_policy.kl == 5.9
    assert found.frontier.new_policy.utility.value == pytest.approx((4.0 - 1.5 + 3.0 - 3.0) / 2)
    assert found.frontier.best_of_n[2].utility.value == pytest.approx((2.0 - 1.5 + 4.0 - 3.0) / 2)
    assert len(json.loads((folder / SAMPLES_FILE).read_text().splitlines()[0])) == 6
