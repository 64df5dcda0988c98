"""The finding says what the figures allow, and no more."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.training.report.made_run import make_folder, make_lines, phase
from training.config import PpoConfig, TrainingConfig
from training.report.history import read_run
from training.report.summary import finding, settings, stops


def finding_of(root: Path, lines: Sequence[Mapping[str, Any]]) -> str:
    return finding(read_run(make_folder(root, lines)))


@pytest.mark.parametrize(
    ("low", "high", "beginning"),
    [
        (0.55, 0.8, "Version 2 beats the reference policy in 71% of pairs of completions of 64 held-out prompts"),
        (0.45, 0.8, "Version 2 is not clearly better or worse than the reference policy: it wins 71%"),
        (0.2, 0.45, "Version 2 falls behind the reference policy: it wins only 71%"),
    ],
)
def test_finding_follows_the_interval(tmp_path: Path, low: float, high: float, beginning: str) -> None:
    bounds = {"low": low, "high": high}
    lines = [line | bounds if line["phase"] == "evaluate" else line for line in make_lines(2)]
    assert finding_of(tmp_path, lines).startswith(beginning)


def test_a_run_of_an_earlier_release_compared_one_pair_of_each_prompt(tmp_path: Path) -> None:
    pairs = {"wins": 45, "ties": 1, "losses": 18}
    lines = [line | pairs if line["phase"] == "evaluate" else line for line in make_lines(2)]
    phase(lines, "evaluate")[0].pop("prompts")  # type: ignore[attr-defined]
    assert "of 64 held-out prompts" in finding_of(tmp_path, lines)


def test_finding_reports_where_the_two_reward_models_part(tmp_path: Path) -> None:
    lines = make_lines(200)
    assert "below its best, a sign of over-optimisation; it was promoted" in finding_of(tmp_path / "parted", lines)
    for line in phase(lines, "ppo"):
        line["objective/held_out_score"] = line["objective/score"]  # type: ignore[index]
    agreed = finding_of(tmp_path / "agreed", lines)
    assert "the held-out reward model rose by" in agreed
    assert "over-optimisation" not in agreed


def test_a_run_that_was_killed_is_not_taken_for_one_that_ended(tmp_path: Path) -> None:
    run = read_run(make_folder(tmp_path, make_lines(5)[:8]))
    assert finding(run) == "The run has not ended: its records break off in PPO, after round 3 of 5."
    assert stops(run) == [
        "The records break off in PPO, after round 3 of 5: the run was killed, or is still under way."
    ]


def test_settings_say_what_is_not_the_default() -> None:
    recipe = TrainingConfig(ppo=PpoConfig(kl_coef=0.02)).model_dump(mode="json")
    assert [(s.name, s.value, s.default) for s in settings(recipe) if s.default] == [("ppo.kl_coef", "0.02", "0.05")]
