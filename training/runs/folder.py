"""The folder of a run: its recipe, its metrics, samples before and after, and a report.

Until the run ends, `state/` in it has what the run would resume from. Users' text is in `state/` no longer than that.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from feedback.durable import replace_file, write_json
from training.config import RENAMED, TrainingConfig
from training.runs.record import METRICS_FILE, append, of_phase, place_of, read_lines, rewind

NUM_SHOWN = 20
"""Prompts with samples in a report, at most."""
RECIPE_FILE, SAMPLES_FILE, LABEL_NEXT = "recipe.json", "samples.jsonl", "label_next.jsonl"
REPORT_FILE = "REPORT.html"
_WAITS, _KILLINGS = "waits", "killings"
_WAITS_BYTES = 512
ORIGIN, SFT = "origin.json", "sft.json"
"""An unfinished run has one of these in `state/`: the first if it learns from rankings, the second if it is SFT."""
SFT_SUFFIX = "-sft"
"""Ids of SFT's runs end in this."""


@dataclass(frozen=True)
class SamplePair:
    """A held-out prompt, a completion by the reference policy, and one by the new policy."""

    prompt: str
    before: str
    after: str
    index: int = 0
    """Of the pair among those of its prompt, which follow each other."""
    before_score: float | None = None
    """By the reward model; None if it was not scored."""
    after_score: float | None = None


@dataclass(frozen=True)
class Unranked:
    """A sample that nobody has ranked, and how unsure the reward model is of its order."""

    sample_id: str
    uncertainty: float
    """Mean, over pairs of its completions, of the heads' standard deviation of the difference in score."""
    prompt: str
    completions: tuple[str, ...]


@dataclass(frozen=True)
class Origin:
    """What a run began from. It is enough to read the same data when the run resumes."""

    live_version: int
    reference_version: int
    last_ranking_seq: int
    last_sample_seq: int


@dataclass(frozen=True)
class RunFolder:
    """A run's files."""

    path: Path

    @property
    def state(self) -> Path:
        """The folder with what a killed run resumes from. It is removed when the run ends."""
        return self.path / "state"

    @classmethod
    def create(cls, runs_dir: Path, run_id: str, config: TrainingConfig, origin: Origin | None) -> RunFolder:
        """Makes the folder and writes the resolved recipe. SFT has no origin: it chooses itself what it works with.

        Raises:
            OSError: such as for a full disk; there is no folder then.
        """
        folder = cls(runs_dir / run_id)
        try:
            folder.state.mkdir(parents=True)
            replace_file(folder.path / RECIPE_FILE, config.model_dump_json(indent=2) + "\n")
            folder.wait("")
            write_json(folder.state / (ORIGIN if origin else SFT), asdict(origin) if origin else {})
        except OSError:
            shutil.rmtree(folder.path, ignore_errors=True)
            raise
        return folder

    @classmethod
    def unfinished(cls, runs_dir: Path, kind: str = ORIGIN) -> RunFolder | None:
        """Returns the newest run of this kind, ORIGIN or SFT, that has not ended; None if all have."""
        found = sorted(path.parent.parent for path in runs_dir.glob(f"*/state/{kind}"))
        return cls(found[-1]) if found else None

    @property
    def ended(self) -> bool:
        """Whether the run has ended, so that nothing will resume it."""
        return not any((self.state / kind).exists() for kind in (ORIGIN, SFT))

    @classmethod
    def sweep(cls, runs_dir: Path) -> None:
        """Removes the rest of `state/` of runs that have ended, but were killed before all of it was removed."""
        for folder in (cls(path.parent) for path in runs_dir.glob("*/state")):
            if folder.ended:
                shutil.rmtree(folder.state, ignore_errors=True)

    def config(self) -> TrainingConfig:
        """Reads the recipe that the run began with, also if an earlier release wrote it."""
        recipe = json.loads((self.path / RECIPE_FILE).read_text())
        for old, new in RENAMED.items():
            section, old_name = old.split(".")
            if old_name in recipe.get(section, {}):
                recipe[section][new.split(".")[1]] = recipe[section].pop(old_name)
        return TrainingConfig.model_validate_json(json.dumps(recipe))

    def origin(self) -> Origin:
        """Reads what the run began from."""
        return Origin(**json.loads((self.state / ORIGIN).read_text()))

    @property
    def _attempts(self) -> Path:
        return self.state / "attempts.json"

    def begin_attempt(self) -> int:
        """Counts this attempt, and returns how many attempts in a row, with this one, have begun from the same state.

        Only attempts that killed the trainer count.
        """
        self.wait("")
        path = self._attempts
        reached = sorted(str(each.relative_to(self.state)) for each in self.state.glob("*/*/"))
        before: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
        count = int(before["count"]) + 1 if before.get("reached") == reached else 1
        if count == 1:
            (self.state / _KILLINGS).unlink(missing_ok=True)
        write_json(path, {"reached": reached, "count": count})
        return count

    @classmethod
    def attempts(cls, runs_dir: Path) -> str:
        """Returns what `begin_attempt` has counted of the runs that have not ended: another text after each attempt."""
        return "".join(sorted(path.read_text() for path in runs_dir.glob("*/state/attempts.json")))

    @classmethod
    def note_end(cls, runs_dir: Path, killing: str, silence: str, started_at: float) -> None:
        """Notes at the unfinished run how its trainer was ended, for the next attempt and for those who look.

        Args:
            runs_dir: the folder of all runs.
            killing: which signal ended it, in words that follow "the trainer"; "" if none did.
            silence: that it made no progress and was killed for that, in such words; "" if it was not.
            started_at: when the trainer was started, in Unix seconds. What ends it before it has begun its attempt
                says nothing of the run.
        """
        folder = cls.unfinished(runs_dir)
        if folder is None or not (killing or silence):
            return
        records = read_lines(folder.path / METRICS_FILE).found
        at = place_of(records) if records else "at its beginning"
        has_begun = folder._attempts.exists() and folder._attempts.stat().st_mtime >= started_at
        if not has_begun:
            at = "before it came to the run,"
        elif killing:
            with suppress(OSError), (folder.state / _KILLINGS).open("a", encoding="utf-8") as file:
                file.write(f"{at} the trainer {killing}\n")
        folder.wait(f"{at} the trainer {killing or silence}")

    @property
    def killings(self) -> list[str]:
        """How signals have ended the trainer at the place that the run has reached, in words."""
        path = self.state / _KILLINGS
        return path.read_text().splitlines() if path.exists() else []

    def survived_attempt(self) -> None:
        """Forgets the counted attempts: this one did not kill the trainer, so it is no reason to give the run up."""
        self._attempts.unlink(missing_ok=True)

    def wait(self, reason: str) -> None:
        """Writes what the run waits for, until the next attempt; an empty reason if it does not wait.

        It is written over what stands there, which needs no room: the disk may be what is full.
        """
        path = self.state / _WAITS
        line = reason.encode()[:_WAITS_BYTES].ljust(_WAITS_BYTES)
        with suppress(OSError), path.open("r+b" if path.exists() else "wb") as file:
            file.write(line)

    @property
    def waits_for(self) -> str:
        """What the run waits for; empty if it does not wait."""
        path = self.state / _WAITS
        return path.read_text(errors="ignore").strip() if path.exists() else ""

    def log(self, phase: str, index: int, count: int, metrics: Mapping[str, Any]) -> None:
        """Appends one line to metrics.jsonl. `index` counts the phase's rounds, epochs or rankings from 0."""
        append(self.path / METRICS_FILE, phase, index, count, metrics)

    def has_logged(self, phase: str) -> bool:
        """Whether metrics.jsonl has a line of this phase, also of an earlier attempt."""
        return bool(of_phase(read_lines(self.path / METRICS_FILE).found, phase))

    def rewind(self, phase: str, index: int) -> None:
        """Removes from metrics.jsonl the lines of `phase` from this index on, and all lines after: they will be
        written again.
        """
        rewind(self.path / METRICS_FILE, phase, index)

    def write_samples(self, pairs: Sequence[SamplePair]) -> None:
        """Writes samples.jsonl."""
        replace_file(self.path / SAMPLES_FILE, "".join(json.dumps(asdict(pair)) + "\n" for pair in pairs))

    def write_label_next(self, samples: Sequence[Unranked]) -> None:
        """Writes label_next.jsonl."""
        replace_file(self.path / LABEL_NEXT, "".join(json.dumps(asdict(sample)) + "\n" for sample in samples))

    def end(self) -> None:
        """Removes `state/`, beginning with the file by which the run counts as unfinished."""
        for kind in (ORIGIN, SFT):
            (self.state / kind).unlink(missing_ok=True)
        shutil.rmtree(self.state, ignore_errors=True)
