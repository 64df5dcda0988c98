"""A file or a folder is there whole or not at all, and what was there before stays until then."""

from pathlib import Path

import pytest

from feedback.durable import rename_folder, replace_file, replace_file_by, write_json


def test_a_file_is_replaced_and_nothing_is_left_beside_it(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    for value in ({"a": 1}, {"a": "é"}):
        write_json(path, value)
    assert path.read_text(encoding="utf-8") == '{\n  "a": "\\u00e9"\n}\n'
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "state"
    replace_file(path, "before")

    def fail(draft: Path) -> None:
        draft.write_text("half of it")
        raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        replace_file_by(path, fail)
    assert path.read_text() == "before"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_takes_its_name_only_where_nothing_has_it(tmp_path: Path) -> None:
    draft, target = tmp_path / "draft", tmp_path / "v1"
    for folder in (draft, target):
        folder.mkdir()
        (folder / "file").write_text(folder.name)
    with pytest.raises(OSError, match="not empty"):
        rename_folder(draft, target)
    assert (target / "file").read_text() == "v1"
    rename_folder(draft, tmp_path / "v2")
    assert (tmp_path / "v2" / "file").read_text() == "draft"
    assert not draft.exists()
