"""TensorBoard is shown what metrics.jsonl says, and a run does without it."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

import pytest

from tests.training.report.made_run import make_folder, make_lines, ppo_step
from training.report import tensorboard


def test_events_are_the_scalars_of_the_run(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = make_folder(tmp_path, make_lines(3))
    assert tensorboard.write_events(folder) == tensorboard.write_events(folder) == folder / "tensorboard"
    assert len(list((folder / "tensorboard").iterdir())) == 1
    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    found = events.Scalars("objective/kl")
    assert [event.step for event in found] == [0, 1, 2]
    assert [event.value for event in found] == pytest.approx([ppo_step(i, 3)["objective/kl"] for i in range(3)])
    assert found[0].wall_time == make_lines(3)[5]["time"]
    assert events.Scalars("evaluate/low")[0].value == pytest.approx(0.59)
    assert "reward_model_evaluation/by_k" not in events.Tags()["scalars"]


def test_without_tensorboard_training_says_so_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = make_folder(tmp_path, make_lines(1))
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    tensorboard.summary_writer.cache_clear()
    try:
        with caplog.at_level(logging.INFO):
            assert [tensorboard.write_events(folder) for _ in range(2)] == [None, None]
    finally:
        tensorboard.summary_writer.cache_clear()
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "no TensorBoard events" in caplog.text
