"""Tensors are written whole or not at all."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from training.models import tensor_file
from training.models.tensor_file import save_tensors


def test_a_write_that_fails_leaves_what_was_there_and_is_the_disks_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.safetensors"
    save_tensors(path, {"a": torch.ones(3)}, {"format": "pt"})

    def full(tensors: Any, draft: Path, metadata: Any) -> None:
        draft.write_bytes(b"half of it")
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(tensor_file, "save_file", full)
    with pytest.raises(OSError, match=re.escape(f"{path}: I/O error: No space left")):
        save_tensors(path, {"a": torch.zeros(3)}, {"format": "pt"})
    assert torch.equal(load_file(path)["a"], torch.ones(3))
    assert list(tmp_path.iterdir()) == [path]
