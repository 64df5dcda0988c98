"""A run's folder keeps its promises whenever the run was killed."""

import errno
import json
from pathlib import Path

import pytest

from training.config import RENAMED, TrainingConfig
from training.runs.folder import ORIGIN, SFT, Origin, RunFolder

CONFIG = TrainingConfig()


@pytest.mark.parametrize(("origin", "kind"), [(Origin(1, 1, 0, 0), ORIGIN), (None, SFT)], ids=["PPO", "SFT"])
def test_it_is_unfinished_from_its_beginning_to_its_end(tmp_path: Path, origin: Origin | None, kind: str) -> None:
    folder, other = RunFolder.create(tmp_path, "run", CONFIG, origin), SFT if kind == ORIGIN else ORIGIN
    assert RunFolder.unfinished(tmp_path, kind) == folder
    assert RunFolder.unfinished(tmp_path, other) is None
    assert not folder.ended
    for _ in range(2):
        folder.end()
        assert folder.ended
    assert RunFolder.unfinished(tmp_path, kind) is None
    assert not folder.state.exists()


def test_what_a_kill_left_of_an_ended_run_is_removed_and_no_more(tmp_path: Path) -> None:
    origin = Origin(1, 1, 0, 0)
    ended, running = (RunFolder.create(tmp_path, name, CONFIG, origin) for name in ("ended", "running"))
    (ended.state / ORIGIN).unlink()
    (ended.state / "beginning.json").write_text("what users wrote")
    RunFolder.sweep(tmp_path)
    assert not ended.state.exists()
    assert (ended.path / "recipe.json").exists()
    assert running.origin() == origin


def test_one_that_could_not_be_made_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, value: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("training.runs.folder.write_json", full)
    with pytest.raises(OSError, match="No space"):
        RunFolder.create(tmp_path, "run", CONFIG, Origin(1, 1, 0, 0))
    assert list(tmp_path.iterdir()) == []


def test_it_says_what_it_waits_for_until_the_next_attempt_and_needs_no_room_for_it(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "run", CONFIG, Origin(1, 1, 0, 0))
    assert folder.waits_for == ""
    before = (folder.state / "waits").stat()
    folder.wait("the store is away")
    assert folder.waits_for == "the store is away"
    folder.begin_attempt()
    assert folder.waits_for == ""
    folder.wait("ä" * 999)
    assert folder.waits_for == "ä" * 256
    after = (folder.state / "waits").stat()
    assert (after.st_ino, after.st_size, after.st_blocks) == (before.st_ino, before.st_size, before.st_blocks)


def test_a_run_that_an_earlier_release_began_keeps_its_recipe(tmp_path: Path) -> None:
    folder = RunFolder.create(tmp_path, "run", CONFIG, Origin(1, 1, 0, 0))
    recipe = folder.path / "recipe.json"
    old = {new.removeprefix("ppo."): old.removeprefix("ppo.") for old, new in RENAMED.items()}
    values = json.loads(recipe.read_text())
    values["ppo"] = {old.get(name, name): value for name, value in values["ppo"].items()} | {"num_steps": 7}
    recipe.write_text(json.dumps(values))
    assert folder.config() == CONFIG.model_copy(update={"ppo": CONFIG.ppo.model_copy(update={"num_rounds": 7})})
