"""Writes and reads a run's checkpoints: tensors and a few facts, whole or not at all; only the newest is kept.

Tensors are safetensors and facts are JSON: nothing is unpickled.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from feedback.durable import rename_folder, replace_file
from training.models.tensor_file import load_weights, save_model_tensors

PREFIX = "round-"
_DRAFT = "draft"
_FACTS = "facts.json"


@dataclass(frozen=True)
class Checkpoint:
    """What a run resumes from."""

    round: int
    tensors: dict[str, Tensor]
    facts: dict[str, Any]


def save_checkpoint(folder: Path, round_index: int, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Writes a checkpoint, and removes earlier ones.

    Raises:
        OSError: such as for a full disk.
    """
    draft = folder / _DRAFT
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    save_model_tensors(draft, tensors)
    replace_file(draft / _FACTS, json.dumps(facts))
    target = folder / f"{PREFIX}{round_index}"
    shutil.rmtree(target, ignore_errors=True)
    rename_folder(draft, target)
    for old in _rounds(folder):
        if old < round_index:
            shutil.rmtree(folder / f"{PREFIX}{old}")


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """Loads the newest checkpoint; None if there is none."""
    rounds = _rounds(folder)
    if not rounds:
        return None
    found = folder / f"{PREFIX}{max(rounds)}"
    return Checkpoint(max(rounds), load_weights(found), json.loads((found / _FACTS).read_text()))


def _rounds(folder: Path) -> list[int]:
    return [int(path.name.removeprefix(PREFIX)) for path in folder.glob(f"{PREFIX}*")]
