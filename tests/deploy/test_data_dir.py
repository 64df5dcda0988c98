"""A folder that cannot be written to, or that another `alignd up` runs on, is refused in one sentence."""

import errno
import os
from pathlib import Path
from typing import NoReturn

import pytest

from deploy.config import ConfigError
from deploy.data_dir import check_usable, only_up, processes
from feedback.durable import write_json


def test_a_folder_is_made_and_nothing_is_left_in_it(tmp_path: Path) -> None:
    check_usable(tmp_path / "mine" / "var")
    check_usable(tmp_path / "mine" / "var")
    assert list((tmp_path / "mine" / "var").iterdir()) == []


def test_a_link_to_nothing_a_file_and_a_folder_of_the_kernel_are_refused(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").touch()
    for folder in (tmp_path / "link", tmp_path / "file", tmp_path / "file" / "var", Path("/proc/x"), Path("/proc")):
        with pytest.raises(ConfigError, match=rf"^data_dir: nothing can be written in {folder} \(.*\): name a folder"):
            check_usable(folder)


@pytest.mark.parametrize(("number", "is_refused"), [(errno.EROFS, True), (errno.ENOSPC, False)])
def test_a_read_only_file_system_is_refused_and_a_full_one_is_not(
    number: int, is_refused: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(dir: Path) -> NoReturn:
        raise OSError(number, os.strerror(number), dir)

    monkeypatch.setattr("tempfile.TemporaryFile", fail)
    if not is_refused:
        check_usable(tmp_path)
        return
    with pytest.raises(ConfigError, match="Read-only file system"):
        check_usable(tmp_path)


def test_a_second_up_on_the_same_folder_is_refused_by_the_first_ones_number_until_that_ends(tmp_path: Path) -> None:
    refused = rf"another `alignd up` runs on {tmp_path}"
    with only_up(tmp_path):
        with pytest.raises(ConfigError, match=f"{refused}: end"), only_up(tmp_path):
            pass
        write_json(tmp_path / "up.json", {"supervisor": 123})
        with pytest.raises(ConfigError, match=f"{refused}, as process 123: end"), only_up(tmp_path):
            pass
    with only_up(tmp_path):
        pass


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"supervisor": "x"}', '{"serve": 99999999999999}', '{"serve": 0}', "\xff"]
)
def test_a_file_that_names_no_processes_is_said_to(text: str, tmp_path: Path) -> None:
    assert processes(tmp_path) == {}
    (tmp_path / "up.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=f"^nobody knows: {tmp_path}/up.json "):
        processes(tmp_path)
