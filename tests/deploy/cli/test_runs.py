"""`alignd runs` on folders as the trainer writes them, and on a store: what it says, and what is stored by it."""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result
from sqlalchemy import Engine
from typer.testing import CliRunner

from deploy.cli import main as cli
from feedback.store.engine import open_engine
from training.config import PpoConfig, TrainingConfig
from training.runs.folder import Origin, RunFolder
from training.runs.lease import TrainerLease, read_control, request_abort, set_paused

CONFIG = TrainingConfig(ppo=PpoConfig(num_rounds=3))
OLD, NEW = "20260101T000000-aaaaaa", "20260102T000000-bbbbbb"
UNREACHABLE = "postgresql://alignd:secret@127.0.0.1:1/store"


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, with no settings but that the lines are long."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGND_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("COLUMNS", "200")
    return tmp_path


@pytest.fixture
def store(folder: Path) -> Iterator[Engine]:
    opened = open_engine(f"sqlite:///{folder}/data/store.db")
    yield opened
    opened.dispose()


@pytest.fixture
def trainer(store: Engine) -> TrainerLease:
    """A trainer at work, as far as the store knows."""
    lease = TrainerLease(store, "host/1", 3600.0)
    assert lease.acquire()
    return lease


def new_run(folder: Path, name: str, *records: tuple[str, int, int, dict[str, Any]]) -> RunFolder:
    run = RunFolder.create(folder / "data" / "runs", name, CONFIG, Origin(1, 1, 10, 20))
    for record in records:
        run.log(*record)
    return run


def ppo_round(step: int, score: float, **more: Any) -> tuple[str, int, int, dict[str, Any]]:
    return ("ppo", step, 3, {"objective/score": score, "objective/kl": 0.5 * step, **more})


def finished_run(folder: Path, name: str = OLD) -> RunFolder:
    ends = [("register", 0, 1, {"version": 2, "promoted": 1.0}), ("done", 0, 1, {"version": 2})]
    run = new_run(folder, name, *(ppo_round(step, 0.25 * step) for step in range(3)), *ends)
    run.end()
    return run


def stopped_run(folder: Path, name: str = OLD) -> RunFolder:
    run = new_run(
        folder, name, ppo_round(0, 1.0), ppo_round(1, 2.0), ("stopped", 0, 1, {"reason": "too [little] data"})
    )
    run.end()
    return run


def runs(*arguments: str) -> Result:
    return CliRunner().invoke(cli.app, ["runs", *arguments])


def listed() -> list[dict[str, Any]]:
    result = runs("list", "--json")
    assert result.exit_code == 0, result.output
    found: list[dict[str, Any]] = json.loads(result.stdout)
    return found


def said(*arguments: str) -> str:
    """What a command prints that succeeds."""
    result = runs(*arguments)
    assert (result.exit_code, result.stderr) == (0, "")
    return result.stdout


def refused(*arguments: str) -> str:
    """What a command prints that fails."""
    result = runs(*arguments)
    assert (result.exit_code, result.stdout) == (1, "")
    return result.stderr


def test_without_a_run_the_list_says_when_one_begins(folder: Path) -> None:
    assert "No run yet" in said("list")
    assert listed() == []
    assert list(folder.iterdir()) == []


def test_runs_are_listed_newest_first(folder: Path, trainer: TrainerLease) -> None:
    new_run(folder, NEW, ("reward_model", 7, 37, {}))
    finished_run(folder, OLD)
    (folder / "data" / "runs" / "rankings_seen").write_text("10")
    first, second = (line.split("│") for line in said("list").splitlines() if "│" in line)
    assert [cell.strip() for cell in first[1:-1]] == [NEW, "running", "reward_model", "8 of 37 rankings", "-", "-", ""]
    assert [cell.strip() for cell in second[1:-1]] == [OLD, "done", "register", "1 of 1", "0.50", "1.00", "made v2"]


def test_the_list_as_json(folder: Path) -> None:
    run = stopped_run(folder)
    updated = json.loads((run.path / "metrics.jsonl").read_text().splitlines()[-1])["time"]
    assert listed() == [
        {
            "run": OLD,
            "state": "stopped",
            "reason": "too [little] data",
            "phase": "ppo",
            "num_done": 2,
            "count": 3,
            "score": 2.0,
            "kl": 0.5,
            "updated": updated,
        }
    ]
    assert "too [little] data" in said("list")


def test_a_run_that_has_only_begun(folder: Path, trainer: TrainerLease) -> None:
    new_run(folder, NEW)
    (view,) = listed()
    assert (view["state"], view["phase"], view["score"], view["updated"]) == ("running", "", None, None)
    assert NEW in said("list")
    assert "running" in said("show", NEW)


def test_a_run_that_cannot_be_resumed_has_stopped(folder: Path) -> None:
    new_run(folder, OLD, ppo_round(0, 1.0)).end()
    (view,) = listed()
    assert (view["state"], "killed" in view["reason"]) == ("stopped", True)


def test_what_is_not_finite_is_json_all_the_same(folder: Path) -> None:
    stop = {"stopped/reason": "not finite: objective/score"}
    run = new_run(folder, OLD, ppo_round(0, math.nan, **stop), ("done", 0, 1, {"version": 3}))
    run.end()
    (view,) = listed()
    assert view["score"] is None
    assert view["reason"] == "made v3; PPO stopped itself: not finite: objective/score"
    assert json.loads(said("show", OLD, "--json"))["metrics"]["ppo"]["objective/score"] is None


def test_the_line_that_is_being_written_is_left_out(folder: Path, trainer: TrainerLease) -> None:
    run = new_run(folder, NEW, ppo_round(0, 1.0))
    with (run.path / "metrics.jsonl").open("a") as file:
        file.write('{"time": 1, "pha')
    assert listed()[0]["num_done"] == 1


def test_show_says_where_things_are_and_what_was_measured(folder: Path) -> None:
    run = finished_run(folder)
    text = said("show", OLD)
    assert text.startswith(f"{OLD} done\n")
    assert f"recipe   {run.path}/recipe.json\n" in text
    assert "reason   made v2\n" in text
    assert "  objective/score 0.5\n  objective/kl 1\n" in text
    assert "report" not in text
    (run.path / "REPORT.html").write_text("<p>")
    assert f"report   {run.path}/REPORT.html\n" in said("show", OLD)


def test_show_as_json(folder: Path) -> None:
    run = stopped_run(folder)
    run.log("stopped", 0, 1, {"reason": "again", "by_labeler": [{"labeler": "u"}]})
    shown = json.loads(said("show", OLD, "--json"))
    assert shown["metrics"] == {"ppo": {"objective/score": 2.0, "objective/kl": 0.5}}
    assert (shown["recipe"], shown["report"]) == (f"{run.path}/recipe.json", None)
    assert shown | listed()[0] == shown


def test_pausing_and_resuming(folder: Path, trainer: TrainerLease, store: Engine) -> None:
    new_run(folder, NEW, ppo_round(0, 1.0))
    assert "pauses after its current round, epoch or phase" in said("pause")
    assert read_control(store).paused
    assert "is paused already" in said("pause")
    assert listed()[0]["reason"] == "paused; `alignd runs resume` resumes it"
    assert "resumes where it paused" in said("resume")
    assert not read_control(store).paused
    assert "was not paused" in said("resume")
    assert listed()[0]["reason"] == ""


def test_pausing_when_no_trainer_runs(trainer: TrainerLease, store: Engine) -> None:
    trainer.release()
    assert "No trainer runs now. The next one pauses" in said("pause")
    assert read_control(store).paused
    assert "start one with `alignd up`" in said("resume")
    assert not read_control(store).paused


def test_a_run_waits_for_a_trainer(folder: Path, store: Engine) -> None:
    new_run(folder, NEW, ppo_round(0, 1.0))
    assert listed()[0]["reason"] == "no trainer runs now"
    # One that was killed, and whose lease has expired.
    assert TrainerLease(store, "host/1", 1e-6).acquire()
    set_paused(store, True)
    assert listed()[0]["reason"] == "paused; `alignd runs resume` resumes it; no trainer runs now"
    assert "reason   paused;" in said("show", NEW)


def test_a_run_is_asked_to_end(folder: Path, trainer: TrainerLease, store: Engine) -> None:
    new_run(folder, NEW, ppo_round(0, 1.0))
    text = said("abort", NEW)
    assert f"{NEW} ends after its current round, epoch or phase." in text
    assert "replaces" not in text
    assert read_control(store).abort_run == NEW
    assert listed()[0]["reason"] == "ends after its current round, epoch or phase, as requested"
    assert "replaces" not in said("abort", NEW)
    assert trainer.renew()


def test_a_run_is_asked_to_end_while_no_trainer_runs(folder: Path, store: Engine) -> None:
    new_run(folder, NEW)
    request_abort(store, "another")
    text = said("abort", NEW)
    assert "ends when a trainer starts" in text
    assert "This replaces the request to end another." in text
    assert read_control(store).abort_run == NEW


def test_sft_is_asked_to_end_like_any_other(folder: Path, store: Engine) -> None:
    name = f"{NEW}-sft"
    assert TrainerLease(store, "host/1-sft", 3600.0).acquire()
    RunFolder.create(folder / "data" / "runs", name, CONFIG, origin=None)
    assert [(view["state"], view["reason"]) for view in listed()] == [("running", "")]
    text = said("abort", name)
    assert f"{name} ends after its current round, epoch or phase. The live policy stays." in text
    assert read_control(store).abort_run == name
    # Whoever has the lease works on SFT: nobody resumes this.
    new_run(folder, OLD)
    assert listed()[-1]["reason"] == "no trainer runs now"


def test_what_a_run_waits_for_is_said(folder: Path, trainer: TrainerLease) -> None:
    new_run(folder, NEW).wait("serving is away: connection refused")
    assert (listed()[0]["state"], listed()[0]["reason"]) == ("waiting", "serving is away: connection refused")


def test_sft_that_was_killed_waits_for_the_command_that_resumes_it(folder: Path, store: Engine) -> None:
    name = f"{NEW}-sft"
    run = RunFolder.create(folder / "data" / "runs", name, CONFIG, origin=None)
    assert [(view["state"], view["reason"]) for view in listed()] == [("running", "`alignd sft` resumes it")]
    # A trainer at work on rankings does not.
    assert TrainerLease(store, "host/1", 3600.0).acquire()
    assert listed()[0]["reason"] == "`alignd sft` resumes it"
    assert f"{name} ends once `alignd sft` resumes it." in said("abort", name)
    run.end()
    assert listed()[0]["state"] == "stopped"


def test_what_has_ended_is_not_aborted(folder: Path, store: Engine) -> None:
    finished_run(folder, OLD)
    stopped_run(folder, NEW)
    text = refused("abort", OLD)
    assert f"{OLD} has ended already (done: made v2)" in text
    assert "alignd policies rollback" in text
    assert "(stopped: too [little] data)" in refused("abort", NEW)
    assert read_control(store).abort_run == ""


@pytest.mark.parametrize("verb", ["show", "abort"])
@pytest.mark.parametrize("name", ["nothing", "..", "*", ""])
def test_a_run_that_is_not_there_is_refused_with_what_to_do(folder: Path, verb: str, name: str) -> None:
    finished_run(folder)
    text = refused(verb, name)
    assert text.startswith(f"there is no run {name} in {folder}/data/runs; `alignd runs list`")


@pytest.mark.parametrize("verb", [("pause",), ("resume",), ("list",), ("show", NEW), ("abort", NEW)])
def test_a_store_out_of_reach_is_named(folder: Path, verb: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGND_STORE", UNREACHABLE)
    new_run(folder, NEW)
    text = refused(*verb)
    assert text.startswith("the store postgresql://alignd:***@127.0.0.1:1/store cannot be used: ")
    assert "alignd config" in text
    assert len(text.splitlines()) == 1


def test_finished_runs_are_listed_without_the_store(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGND_STORE", UNREACHABLE)
    finished_run(folder)
    assert [view["state"] for view in listed()] == ["done"]


@pytest.mark.parametrize("verb", ["list", "show", "pause", "resume", "abort"])
def test_every_verb_has_help(verb: str) -> None:
    assert "Usage:" in said(verb, "--help")
