"""One experiment of the learning benchmark: its laboratory, its size, and where its stages leave their results."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.learning.lab import Lab
from bench.learning.stages import once
from training.config import PpoConfig, SftConfig

TAX_WINDOW = 512


@dataclass(frozen=True)
class Size:
    """The size of an experiment."""

    num_rankings: int
    ks: range
    """Completions in one ranking."""
    num_demonstrations: int
    best_of: int
    """Completions of the base of which a labeler demonstrates the best."""
    num_held_out: int
    num_samples: int
    """Completions of each held-out prompt by each policy."""
    num_scored: int
    """Completions of each held-out prompt by the reference, of which the reward model chooses the best of n."""
    tax_tokens: int
    tax_items: int
    ppo: PpoConfig = dataclasses.field(default_factory=PpoConfig)
    sft: SftConfig = dataclasses.field(default_factory=SftConfig)


QUICK = Size(
    48, range(4, 7), 16, 8, 32, 4, 8, 4 * TAX_WINDOW, 24,
    ppo=PpoConfig(num_rounds=4, num_decay_rounds=1, prompts_per_round=8), sft=SftConfig(num_epochs=2),
)  # fmt: skip
FULL = Size(256, range(4, 10), 64, 32, 128, 8, 16, 32 * TAX_WINDOW, 1000)


@dataclass(frozen=True)
class Experiment:
    """One seed of one utility."""

    lab: Lab
    size: Size
    folder: Path
    shared: Path
    """Has the results of stages that do not depend on the utility."""

    def once(self, name: str, stage: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Returns the result of `stage`, from now or from an earlier attempt."""
        return once(self.folder, name, stage)
