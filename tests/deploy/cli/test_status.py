"""What `alignd status` says of store and trainer, whatever state they were left in, and whether the server is there."""

import os
import time
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from deploy.cli.status import print_processes, print_rankings, print_training
from deploy.config import AligndConfig
from feedback import heartbeat
from feedback.durable import write_json
from feedback.store.engine import open_engine
from feedback.store.ledger import Ledger, Offset
from tests.feedback.events import ranking, sample
from tests.feedback.store.writing import write_events
from training.config import TrainingConfig
from training.data.split import is_held_out
from training.data.waiting import Counted, tell
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
    print_training(config, Control(paused=True, abort_run="", holder="", seconds_left=0.0))
    waits = "; ".join(["paused; `alignd runs resume` resumes it", "no trainer runs now"])
    assert capsys.readouterr().out.removesuffix("\n").endswith(waits) == says.startswith("running")


def test_a_run_that_waits_for_room_on_the_disk_is_told_as_waiting(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = AligndConfig(data_dir=tmp_path)
    folder = RunFolder.create(config.runs_dir, NAME, TrainingConfig(), Origin(1, 1, 0, 0))
    (folder.path / "metrics.jsonl").write_text(LINE)
    folder.wait("[Errno 28] No space left on device")
    print_training(config, None)
    said = f"training  {NAME}: waiting, ppo 3 of 10 rounds: [Errno 28] No space left on device\n"
    assert capsys.readouterr().out == said


def test_a_process_that_makes_no_progress_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_json(tmp_path / "up.json", {"supervisor": os.getpid(), "relay": os.getpid(), "train": os.getpid()})
    for verb in ("relay", "train"):
        heartbeat.make(tmp_path, verb)
        os.truncate(heartbeat.path_of(tmp_path, verb), 1)
        os.utime(heartbeat.path_of(tmp_path, verb), (time.time() - 45,) * 2)
    print_processes(AligndConfig(data_dir=tmp_path))
    me = os.getpid()
    assert capsys.readouterr().out == f"processes supervisor {me}, relay {me} (no progress for 45 s), train {me}\n"


def test_a_file_of_processes_that_names_none_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "up.json").write_text("[]")
    print_processes(AligndConfig(data_dir=tmp_path))
    assert capsys.readouterr().out == f"processes nobody knows: {tmp_path}/up.json names no processes\n"


def test_new_rankings_are_told_from_those_that_a_run_has_seen(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = AligndConfig(data_dir=tmp_path, training=TrainingConfig(min_new_rankings=7))
    ledger = Ledger(config.store_url)
    # Of this user's three rankings of one sample, the last one counts.
    user = next(f"u{number}" for number in range(99) if not is_held_out(f"u{number}", 0.35))
    rankings: list[Any] = [ranking(f"r{number}", time_seconds=number) for number in range(3)]
    for each in rankings:
        each.user_id = user
    write_events(ledger, sample(user_id=user), *rankings)
    ledger.close()
    config.runs_dir.mkdir()
    Cursor(config.runs_dir / CURSOR_FILE).write(1)
    assert TrainerLease(open_engine(config.store_url), "host/1", 60.0).acquire()
    control = print_rankings(config)
    said = "rankings  3 in the store, 2 new: not counted by the trainer yet; 7 begin a run\n"
    assert capsys.readouterr().out == said
    assert control is not None
    assert control.holder == "host/1"
    tell(config.runs_dir, Counted(1, 1, {"held_out": 1, "too_long": 2}), 7)
    print_rankings(config)
    said = (
        "2 new: 1 to learn from; 7 begin a run; 3 left out: 2 longer than reward_model.micro_batch_tokens, 1 held out"
    )
    assert said in capsys.readouterr().out


def test_what_the_last_run_left_out_is_said_with_the_reasons(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = AligndConfig(data_dir=tmp_path)
    folder = RunFolder.create(config.runs_dir, NAME, TrainingConfig(), Origin(1, 1, 0, 0))
    folder.log(
        "data",
        0,
        1,
        {"rankings/read": 9, "rankings/learned": 6, "rankings/measured": 1, "rankings/left_out/superseded": 2},
    )
    print_training(config, None)
    assert capsys.readouterr().out.splitlines()[1:] == [
        "          9 rankings: 6 learned from, 1 to measure with, 2 left out: "
        "2 superseded by the user's later one of the sample"
    ]


def test_a_bus_that_lost_what_was_stored_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = AligndConfig(data_dir=tmp_path)
    with closing(Ledger(config.store_url)) as ledger:
        write_events(ledger, sample())
        ((partition, offset),) = ledger.offsets().items()
        assert ledger.begin_again(partition, offset, "another log")
        assert not ledger.begin_again(partition, offset, "another log")
        assert ledger.offsets() == {partition: Offset("another log", 0)}
    print_rankings(config)
    assert "the bus lost records that were stored, 1 time;" in capsys.readouterr().out


def test_a_store_that_is_away_is_a_line_of_its_own(capsys: pytest.CaptureFixture[str]) -> None:
    assert print_rankings(AligndConfig(store="postgresql://alignd:secret@127.0.0.1:1/store")) is None
    said = capsys.readouterr().out
    assert said.startswith("rankings  the store postgresql://alignd:***@127.0.0.1:1/store cannot be used: ")
    assert len(said.splitlines()) == 1
