"""What `alignd status` says of the last run, whatever state its folder was left in."""

from pathlib import Path

import pytest

from deploy.config import AligndConfig
from deploy.status import print_last_run, print_rankings

LINE = '{"time": 1.0, "phase": "ppo", "step": 2, "num_steps": 10}\n'


@pytest.mark.parametrize(
    ("metrics", "says"),
    [
        ("", "it has begun"),
        (LINE, "ppo 2 of 10"),
        (LINE + '{"time": 2.0, "pha', "ppo 2 of 10"),
        ('{"ti', "it has begun"),
    ],
    ids=["nothing yet", "a line", "a line and a part of one", "a part of one"],
)
def test_the_last_run_is_told_by_its_last_whole_line(
    metrics: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = AligndConfig(data_dir=tmp_path)
    run = config.runs_dir / "20261126T140004-01fb6b"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text(metrics)
    print_last_run(config)
    assert capsys.readouterr().out == f"training  {run.name}: {says}\n"


def test_a_store_that_is_away_is_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    print_rankings(AligndConfig(store="postgresql://alignd:secret@127.0.0.1:1/store"))
    said = capsys.readouterr().out
    assert said.startswith("rankings  the store postgresql://alignd:***@127.0.0.1:1/store cannot be used: ")
    assert len(said.splitlines()) == 1
