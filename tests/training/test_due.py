"""When a run is due: by the number of new rankings, by their age or by the clock."""

import os
from pathlib import Path

import pytest

from tests.training.trainer_process import CONFIG
from training.loop import is_due, last_began
from training.runs.folder import SFT_SUFFIX, RunFolder

HOUR = 3600.0


@pytest.mark.parametrize(
    ("triggers", "num_new", "oldest_new", "last_began", "due"),
    [
        ({}, 7, 0.0, None, False),
        ({}, 8, 0.0, None, True),
        ({"max_wait_seconds": HOUR}, 1, 0.5 * HOUR, None, True),
        ({"max_wait_seconds": HOUR}, 1, 1.5 * HOUR, None, False),
        ({"max_wait_seconds": HOUR}, 0, None, None, False),
        ({"run_every_seconds": HOUR}, 1, 1.9 * HOUR, 0.9 * HOUR, True),
        ({"run_every_seconds": HOUR}, 1, 0.1 * HOUR, 1.1 * HOUR, False),
        ({"run_every_seconds": HOUR}, 1, 0.1 * HOUR, None, True),
        ({"run_every_seconds": HOUR}, 0, None, None, False),
    ],
)
def test_a_run_is_due_by_count_by_age_or_by_the_clock(
    triggers: dict[str, float], num_new: int, oldest_new: float | None, last_began: float | None, due: bool
) -> None:
    config = CONFIG.model_copy(update=triggers)
    found = is_due(config, num_new=num_new, oldest_new=oldest_new, last_began=last_began, now=2 * HOUR)
    assert found == due


def test_the_clock_runs_from_the_last_run_on_rankings_whatever_sft_did_since(tmp_path: Path) -> None:
    assert last_began(tmp_path) is None
    for name, began in (("1", 100), ("2", 200), (f"3{SFT_SUFFIX}", 300)):
        folder = RunFolder.create(tmp_path, name, CONFIG, origin=None)
        os.utime(folder.path / "recipe.json", (began, began))
    assert last_began(tmp_path) == 200
