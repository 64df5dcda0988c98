"""The folder that a run leaves behind: its recipe, one line a step, and samples before and after."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from training.config import TrainingConfig


@dataclass(frozen=True)
class SamplePair:
    """A held-out prompt, what the reference policy wrote, and what the new policy writes."""

    prompt: str
    before: str
    after: str


@dataclass(frozen=True)
class RunFolder:
    """A run's files. Whoever follows `metrics.jsonl` sees each line whole, as soon as the step has ended."""

    path: Path

    @classmethod
    def create(cls, runs_dir: Path, run_id: str, config: TrainingConfig) -> RunFolder:
        """Makes the folder, with the resolved recipe in it."""
        folder = cls(runs_dir / run_id)
        folder.path.mkdir(parents=True)
        (folder.path / "recipe.json").write_text(config.model_dump_json(indent=2) + "\n")
        return folder

    def log(self, phase: str, step: int, num_steps: int, metrics: Mapping[str, float | str]) -> None:
        """Appends one line to metrics.jsonl. `step` counts from 0."""
        line = {"time": time.time(), "phase": phase, "step": step, "num_steps": num_steps, **metrics}
        with (self.path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(line) + "\n")

    def write_samples(self, pairs: Sequence[SamplePair]) -> None:
        """Writes samples.jsonl."""
        (self.path / "samples.jsonl").write_text("".join(json.dumps(asdict(pair)) + "\n" for pair in pairs))
