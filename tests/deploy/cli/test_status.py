"""What `alignd status` says of store and trainer, whatever state they were left in, and whether the server is there."""

from pathlib import Path

import pytest

from deploy.cli.status import print_rankings, print_training
from deploy.config import AligndConfig
from feedback.store.engine import open_engine
from feedback.store.ledger import Ledger
from tests.feedback.events import ranking, sample
from tests.feedback.store.test_store import write_events
from training.config import TrainingConfig
from training.loop import CURSOR_FILE, Cursor
from training.runs.folder import Origin, RunFolder
from training.runs.lease import Control, TrainerLease

LINE = '{"time": 1.0, "phase": "ppo", "index": 2, "count": 10}\n'
NAME = "20261126T140004-01fb6b"


@pytest.mark.parametrize(
    ("metrics", "says"),
    [
        ("", "running"),
        (LINE, "running, ppo 3 of 10 rounds"),
        (LINE + '{"time": 2.0, "pha', "running, ppo 3 of 10 rounds"),
        ('{"ti', "running"),
        (LINE + '{"time": 3.0, "phase": "done", "index": 0, "count": 1, "version": 2}\n', "done: made v2"),
        (
            LINE + '{"time": 3.0, "phase": "stopped", "index": 0, "count": 1, "reason": "no room"}\n',
            "stopped: no room",
        ),
    ],
    ids=["nothing yet", "a line", "a line and a part of one", "a part of one", "done", "stopped"],
)
def test_the_last_run_is_told_by_its_last_whole_line(
    metrics: str, says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = AligndConfig(data_dir=tmp_path)
    folder = RunFolder.create(config.runs_dir, NAME, TrainingConfig(), Origin(1, 1, 0, 0))
    (folder.path / "metrics.jsonl").write_text(metrics)
    print_training(config, None)
    assert capsys.readouterr().out == f"training  {NAME}: {says}\n"
    print_training(config, Control(paused=True, abort_run="", holder="", expires_at=0.0))
    waits = "; ".join(["paused; `alignd runs resume` resumes it", "no trainer runs now"])
    assert capsys.readouterr().out.removesuffix("\n").endswith(waits) == says.startswith("running")


def test_new_rankings_are_told_from_those_that_a_run_has_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = AligndConfig(data_dir=tmp_path, training=TrainingConfig(min_new_rankings=7))
    ledger = Ledger(config.store_url)
    write_events(ledger, sample(), *(ranking(f"r{number}", time_seconds=number) for number in range(3)))
    ledger.close()
    config.runs_dir.mkdir()
    Cursor(config.runs_dir / CURSOR_FILE).write(1)
    assert TrainerLease(open_engine(config.store_url), "host/1", 60.0).acquire()
    control = print_rankings(config)
    assert capsys.readouterr().out == "rankings  3 in the store, 2 new; 7 begin a run\n"
    assert control is not None
    assert control.holder == "host/1"


def test_a_store_that_is_away_is_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert print_rankings(AligndConfig(store="postgresql://alignd:secret@127.0.0.1:1/store")) is None
    said = capsys.readouterr().out
    assert said.startswith("rankings  the store postgresql://alignd:***@127.0.0.1:1/store cannot be used: ")
    assert len(said.splitlines()) == 1
