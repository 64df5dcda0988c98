"""A run resumes from its newest checkpoint, also from one that an earlier release wrote."""

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from training.runs.checkpoint import newest_checkpoint, save_checkpoint


def test_the_newest_checkpoint_alone_is_kept_and_read_back(tmp_path: Path) -> None:
    for index in (1, 2):
        save_checkpoint(tmp_path, index, {"a/b": torch.full((2,), float(index)), "c": torch.ones(())}, {"x": [index]})
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert (found.round, found.facts, found.tensors.keys()) == (2, {"x": [2]}, {"a/b", "c"})
    assert torch.equal(found.tensors["a/b"], torch.full((2,), 2.0))
    assert [path.name for path in tmp_path.iterdir()] == ["round-2"]


def test_a_checkpoint_of_an_earlier_release_is_read(tmp_path: Path) -> None:
    """Its tensors were in one file of another name."""
    (tmp_path / "round-3").mkdir()
    save_file({"a": torch.ones(2)}, tmp_path / "round-3" / "tensors.safetensors")
    (tmp_path / "round-3" / "facts.json").write_text(json.dumps({}))
    found = newest_checkpoint(tmp_path)
    assert found is not None
    assert (found.round, torch.equal(found.tensors["a"], torch.ones(2))) == (3, True)
