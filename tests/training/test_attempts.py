"""How often a run is attempted: it is given up if it kills its trainer again and again, and waits for all else."""

import errno
import json
import time
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
from sqlalchemy.exc import OperationalError

from feedback.store.reader import Store
from policies.artifact import UnreadableError
from tests.training.serving_errors import AWAY, REFUSAL, Answer
from training.attempts import MOST_ATTEMPTS, retry_until_done, run_once
from training.config import TrainingConfig
from training.context import TrainerContext
from training.models.parallel import ALONE, Ranks
from training.runs.folder import Origin, RunFolder

CONFIG = TrainingConfig()


def test_a_run_that_gets_no_further_is_given_up(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "run", CONFIG, Origin(1, 1, 0, 0))
    (folder.state / "rewards" / "round-0").mkdir(parents=True)
    assert [folder.begin_attempt() for _ in range(3)] == [1, 2, 3]
    (folder.state / "ppo" / "round-1").mkdir(parents=True)
    assert [folder.begin_attempt() for _ in range(MOST_ATTEMPTS)] == list(range(1, MOST_ATTEMPTS + 1))
    assert run_once(cast(TrainerContext, None), folder)
    (line,) = map(json.loads, (folder.path / "metrics.jsonl").read_text().splitlines())
    assert (line["phase"], str(MOST_ATTEMPTS) in line["reason"]) == ("stopped", True)


def test_a_run_that_signals_end_twice_at_the_same_place_is_given_up_with_the_reason(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "run", CONFIG, Origin(1, 1, 0, 0))
    folder.log("normalise", 0, 1, {})
    how = "was ended by SIGKILL from the kernel, which had no memory left for it"
    assert folder.begin_attempt() == 1
    RunFolder.note_end(tmp_path, how, "", 0.0)
    assert folder.waits_for == f"after sampling the reference policy the trainer {how}"
    # Further on, it counts from one again.
    folder.log("ppo", 0, 10, {})
    (folder.state / "ppo" / "round-1").mkdir(parents=True)
    for attempt in (1, 2):
        assert folder.begin_attempt() == attempt
        RunFolder.note_end(tmp_path, how, "", 0.0)
        # The next trainer does not come as far as to the run, which is not what ends it.
        RunFolder.note_end(tmp_path, how, "", time.time() + 1)
        assert folder.waits_for == f"before it came to the run, the trainer {how}"
    assert run_once(cast(TrainerContext, None), folder)
    line = json.loads((folder.path / "metrics.jsonl").read_text().splitlines()[-1])
    assert line["phase"] == "stopped"
    assert line["reason"].startswith(f"in PPO, after round 1 of 10 the trainer {how}, for the second time")


def test_a_run_that_hangs_at_one_place_is_given_up_with_what_alignd_up_has_seen(tmp_path: Path) -> None:
    """The trainer's own log does not say how it ended."""
    folder = RunFolder.create(tmp_path, "run", CONFIG, Origin(1, 1, 0, 0))
    for _ in range(MOST_ATTEMPTS):
        folder.begin_attempt()
        RunFolder.note_end(tmp_path, "", "had made no progress for 600 s, and was killed", 0.0)
    assert run_once(cast(TrainerContext, None), folder)
    (line,) = map(json.loads, (folder.path / "metrics.jsonl").read_text().splitlines())
    how = "the last time, at its beginning the trainer had made no progress for 600 s, and was killed"
    assert line["reason"] == f"{MOST_ATTEMPTS} attempts came to an end at the same place; {how}"


def context_where(tmp_path: Path, error: BaseException, ranks: Ranks = ALONE) -> TrainerContext:
    """Returns a context in which a run raises this error as soon as it begins."""

    def fail(run_id: str) -> None:
        raise error

    nobody = cast(Any, None)
    return TrainerContext(nobody, nobody, nobody, tmp_path, nobody, fail, ranks)


DISK_FULL = OSError(errno.ENOSPC, "No space left on device")
STORE_AWAY = OperationalError("UPDATE trainer", {}, Exception("the database system is shutting down"))


@pytest.mark.parametrize(
    "error",
    [DISK_FULL, STORE_AWAY, AWAY, UnreadableError("v1 cannot be read now")],
    ids=["the disk is full", "the store is away", "serving is away", "a version cannot be read"],
)
def test_a_run_whose_attempts_do_not_kill_the_trainer_is_not_given_up(tmp_path: Path, error: Exception) -> None:
    """However often it is attempted, the run waits, and reports what it waits for."""
    folder, context = RunFolder.create(tmp_path, "run", CONFIG, Origin(1, 1, 0, 0)), context_where(tmp_path, error)
    assert [run_once(context, folder) for _ in range(2 * MOST_ATTEMPTS)] == [False] * (2 * MOST_ATTEMPTS)
    assert folder.waits_for == ("serving is away: connection refused" if error is AWAY else str(error))
    assert folder.begin_attempt() == 1


def test_a_run_that_serving_refuses_ends_and_says_why(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "run", CONFIG, Origin(1, 1, 0, 0))
    assert run_once(context_where(tmp_path, REFUSAL), folder)
    (line,) = map(json.loads, (folder.path / "metrics.jsonl").read_text().splitlines())
    assert (line["phase"], line["reason"]) == ("stopped", "serving refused: cannot read the artifact")


def test_a_run_with_too_little_to_learn_from_ends_at_once_and_says_so(tmp_path: Path) -> None:
    folder, nobody = RunFolder.create(tmp_path, "run", CONFIG, Origin(1, 1, 0, 0)), cast(Any, None)
    client = cast(Any, SimpleNamespace(get=lambda version: version, newest=lambda count: []))
    with closing(Store(f"sqlite:///{tmp_path}/store.db")) as store:
        context = TrainerContext(store, nobody, client, tmp_path, nobody, lambda run_id: None, ALONE)
        assert run_once(context, folder)
    read, line = map(json.loads, (folder.path / "metrics.jsonl").read_text().splitlines())
    assert (read["phase"], read["rankings/read"], line["phase"]) == ("data", 0, "stopped")
    assert line["reason"].startswith("too little to learn from: 0 rankings with a comparison, 0 prompts to train on")


def test_an_action_is_repeated_for_transient_errors_and_for_no_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("training.attempts.RETRY_SECONDS", 0.0)
    errors: list[Exception] = [DISK_FULL, STORE_AWAY, AWAY]

    def act() -> str:
        if errors:
            raise errors.pop()
        return "done"

    assert retry_until_done(act) == "done"
    errors.append(REFUSAL)
    with pytest.raises(Answer, match="cannot read"):
        retry_until_done(act)


def test_a_run_of_several_ranks_is_not_given_up_for_a_store_that_is_away(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its trainer ends, so that all ranks restart together."""
    monkeypatch.setattr("training.models.parallel.led", lambda ranks, action: action())
    folder = RunFolder.create(tmp_path, "run", CONFIG, Origin(1, 1, 0, 0))
    context = context_where(tmp_path, STORE_AWAY, Ranks(0, 2))
    for _ in range(2 * MOST_ATTEMPTS):
        with pytest.raises(OperationalError):
            run_once(context, folder)
    assert folder.begin_attempt() == 1


def test_a_run_is_not_given_up_for_a_trainer_that_was_asked_to_end(tmp_path: Path) -> None:
    folder, context = (
        RunFolder.create(tmp_path, "run", CONFIG, Origin(1, 1, 0, 0)),
        context_where(tmp_path, SystemExit(0)),
    )
    for _ in range(2 * MOST_ATTEMPTS):
        with pytest.raises(SystemExit):
            run_once(context, folder)
    assert folder.begin_attempt() == 1


def test_a_disk_that_is_full_of_its_own_last_line_makes_a_run_wait_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = RunFolder.create(tmp_path, "run", CONFIG, Origin(1, 1, 0, 0))
    (folder.path / "metrics.jsonl").write_text('{"phase": "ppo", "st')

    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    # rewind, which takes back the part of a line, and wait write by these.
    monkeypatch.setattr("training.runs.record.replace_file", full)
    monkeypatch.setattr("training.runs.folder.replace_file", full)
    assert not run_once(cast(TrainerContext, None), folder)
