"""The trainer does what operators ask between two rounds, and ends when another has taken its lease."""

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import Engine

from feedback.store.engine import open_engine
from training.config import TrainingConfig
from training.errors import RunAbortedError
from training.runs.control import OperatorControl
from training.runs.lease import TrainerLease, request_abort, set_paused

CONFIG = TrainingConfig(poll_seconds=0.01, lease_seconds=60.0)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Engine]:
    opened = open_engine(f"sqlite:///{tmp_path}/store.db")
    yield opened
    opened.dispose()


@pytest.fixture
def control(engine: Engine) -> OperatorControl:
    lease = TrainerLease(engine, "host/1", CONFIG.lease_seconds)
    assert lease.acquire()
    return OperatorControl(CONFIG, engine, lease)


def test_a_paused_trainer_waits_until_it_is_resumed(control: OperatorControl, engine: Engine) -> None:
    set_paused(engine, True)
    step = threading.Thread(target=control.between_rounds, args=("run",), daemon=True)
    step.start()
    step.join(0.5)
    assert step.is_alive()
    set_paused(engine, False)
    step.join(30)
    assert not step.is_alive()


@pytest.mark.parametrize("paused", [False, True])
def test_a_run_ends_that_was_asked_to_and_no_other(control: OperatorControl, engine: Engine, paused: bool) -> None:
    request_abort(engine, "run")
    assert control.between_rounds("another") is None
    assert control.between_rounds("") is None  # between two runs
    set_paused(engine, paused)
    with pytest.raises(RunAbortedError, match="an operator asked"):
        control.between_rounds("run")


def test_a_trainer_that_lost_its_lease_ends(engine: Engine) -> None:
    late = TrainerLease(engine, "host/1", 1e-6)
    assert late.acquire()
    assert TrainerLease(engine, "host/2", 60.0).acquire()  # by now it has expired
    with pytest.raises(SystemExit) as ended:
        OperatorControl(CONFIG, engine, late).between_rounds("run")
    assert ended.value.code == 1
