"""Reads a run's folder for its report, and computes how a metric changed over the rounds of PPO."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf.json_format import ParseDict, ParseError
from numpy.typing import NDArray

from alignd.v1.policy_manifest_pb2 import PolicyManifest
from policies.artifact import MANIFEST
from training.runs.folder import LABEL_NEXT, NUM_SHOWN, RECIPE_FILE, SAMPLES_FILE, SamplePair, Unranked
from training.runs.record import METRICS_FILE, Record, of_phase, read_lines


@dataclass(frozen=True)
class RunHistory:
    """The contents of a run's folder."""

    name: str
    records: Sequence[Record]
    samples: Sequence[SamplePair]
    label_next: Sequence[Unranked]
    recipe: Mapping[str, Any]
    manifest: PolicyManifest | None
    notes: Sequence[str]
    """One sentence for each part of the folder that could not be read."""

    @property
    def rounds(self) -> list[Record]:
        """The records of PPO's rounds."""
        return of_phase(self.records, "ppo")

    @property
    def shown(self) -> list[SamplePair]:
        """The first pair of each of the first few prompts."""
        return [pair for pair in self.samples if pair.index == 0][:NUM_SHOWN]


def read_run(folder: Path) -> RunHistory:
    """Reads a run's folder. Parts that are missing, or cannot be read, are left empty."""
    metrics = read_lines(folder / METRICS_FILE)
    samples = read_lines(folder / SAMPLES_FILE, {"prompt", "before", "after"})
    unranked = read_lines(folder / LABEL_NEXT, {"sample_id", "uncertainty", "prompt", "completions"})
    notes = [
        f"{lines.num_unreadable} of the lines of {name} could not be read."
        for name, lines in ((METRICS_FILE, metrics), (SAMPLES_FILE, samples), (LABEL_NEXT, unranked))
        if lines.num_unreadable
    ]
    recipe = _read_json(folder / RECIPE_FILE, notes)
    manifest = None
    if found := _read_json(folder / MANIFEST, notes):
        try:
            manifest = ParseDict(found, PolicyManifest(), ignore_unknown_fields=True)
        except ParseError as error:
            notes.append(f"{MANIFEST} is no policy manifest: {error}")
    pairs = [_pair(sample) for sample in samples.found]
    least_sure = [
        Unranked(str(u["sample_id"]), float(u["uncertainty"]), str(u["prompt"]), tuple(map(str, u["completions"])))
        for u in unranked.found
        if isinstance(u["uncertainty"], int | float) and isinstance(u["completions"], list)
    ]
    return RunHistory(folder.resolve().name, metrics.found, pairs, least_sure, recipe, manifest, notes)


def _pair(sample: Record) -> SamplePair:
    """Reads a line of samples.jsonl. Earlier releases and SFT wrote one pair of each prompt, without scores."""
    index = sample.get("index")
    scores = (sample.get(f"{which}_score") for which in ("before", "after"))
    return SamplePair(
        str(sample["prompt"]),
        str(sample["before"]),
        str(sample["after"]),
        index if isinstance(index, int) else 0,
        *(float(score) if isinstance(score, int | float) else None for score in scores),
    )


def _read_json(path: Path, notes: list[str]) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        notes.append(f"{path.name} could not be read: {error}")
        return {}
    return found if isinstance(found, dict) else {}


def series(records: Sequence[Record], key: str) -> NDArray[np.float64]:
    """Returns one metric, [records]: NaN where it is absent or not finite."""
    found = [record.get(key) for record in records]
    values = np.array([value if isinstance(value, int | float) else math.nan for value in found], dtype=np.float64)
    return np.where(np.isfinite(values), values, math.nan)


def duration(seconds: float) -> str:
    """Returns a time in seconds or minutes, as suits its length."""
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.1f} minutes"


def last_finite(values_R: NDArray[np.float64]) -> float:
    """Returns the last finite value; NaN if there is none. R counts rounds."""
    finite = values_R[np.isfinite(values_R)]
    return float(finite[-1]) if len(finite) else math.nan


def greatest(values_R: NDArray[np.float64]) -> float:
    """Returns the greatest finite value; NaN if there is none."""
    finite = values_R[np.isfinite(values_R)]
    return float(finite.max()) if len(finite) else math.nan


@dataclass(frozen=True)
class Change:
    """How a series changed: its means over the first and the last fifth of the rounds, NaN where nothing is finite."""

    before: float
    after: float
    clear: bool
    """False where the series' noise, estimated from neighbouring rounds (von Neumann 1941), may explain the change."""

    @classmethod
    def of(cls, values_R: NDArray[np.float64]) -> Change:
        """Computes the change of a series, without its values that are not finite."""
        finite = values_R[np.isfinite(values_R)]
        if not len(finite):
            return cls(math.nan, math.nan, False)
        size = max(1, len(finite) // 5)
        before, after = float(finite[:size].mean()), float(finite[-size:].mean())
        return cls(before, after, len(finite) > 2 * size and abs(after - before) > 2 * _error(finite, size))

    @property
    def words(self) -> str:
        """The change as the predicate of a sentence."""
        if math.isnan(self.before):
            return "was never finite"
        if not self.clear:
            return "did not clearly change"
        return f"{'rose' if self.after > self.before else 'fell'} by {abs(self.after - self.before):.2g}"


def fall_from_best(values_R: NDArray[np.float64]) -> float:
    """Returns how far the mean over the last fifth of the rounds is below the best such mean; 0 if it may be noise.

    The best of many means is high by chance alone. So the fall must be three standard errors, not two.
    """
    finite = values_R[np.isfinite(values_R)]
    if len(finite) < 3:
        return 0.0
    size = max(1, len(finite) // 5)
    means = np.convolve(finite, np.full(size, 1 / size), mode="valid")
    fall = float(means.max() - means[-1])
    return fall if fall > 3 * _error(finite, size) else 0.0


def _error(values_R: NDArray[np.float64], size: int) -> float:
    """Returns the standard error of the difference of two means over `size` rounds, from neighbours' differences."""
    noise = math.sqrt(float((np.diff(values_R) ** 2).mean()) / 2) if len(values_R) > 1 else math.inf
    return noise * math.sqrt(2 / size)
