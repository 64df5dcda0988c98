"""Fits a recipe to the memory that there is, where that changes how a run computes but not what it computes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from training.config import TrainingConfig
from training.planning.memory import plan_memory
from training.planning.model_size import ModelSize
from training.planning.workload import assume

_SAVING = ("micro_batch_tokens", "gradient_checkpointing")


@dataclass(frozen=True)
class Fitted:
    """A recipe that was fitted, and the memory that its run needs, in bytes."""

    config: TrainingConfig
    settings: Mapping[str, int | bool]
    """Settings of `ppo` that were changed to save memory, with their new values."""
    changes: tuple[str, ...]
    """The same, in words."""
    peak: float


def fit(config: TrainingConfig, model: ModelSize, number_bytes: int, room: float) -> Fitted:
    """Returns the recipe, with as few changes as make its run fit in `room` bytes, or with all there are.

    Micro-batches become shorter, down to one row; then activations are computed again instead of kept. Gradients are
    the same either way, but for the rounding of their sums.
    """
    tried = [config]
    tried.extend(_smaller(config, assume(config, model, number_bytes=number_bytes).longest_row))
    peaks = [plan_memory(assume(each, model, number_bytes=number_bytes), config.num_processes).peak for each in tried]
    fits = next((index for index, peak in enumerate(peaks) if peak <= room), None)
    # Where nothing fits, checkpointing may still cost more than it saves: then the least counts.
    chosen = peaks.index(min(peaks)) if fits is None else fits
    before, after = config.ppo, tried[chosen].ppo
    settings = {name: getattr(after, name) for name in _SAVING if getattr(after, name) != getattr(before, name)}
    changes = (f"ppo.{name} is {new} instead of {getattr(before, name)}" for name, new in settings.items())
    return Fitted(tried[chosen], settings, tuple(changes), peaks[chosen])


def _smaller(config: TrainingConfig, longest_row: int) -> Iterator[TrainingConfig]:
    """Yields recipes that need less and less memory."""
    tokens = config.ppo.micro_batch_tokens
    while tokens > longest_row:
        tokens = max(tokens // 2, longest_row)
        yield _with(config, micro_batch_tokens=tokens)
    if not config.ppo.gradient_checkpointing:
        yield _with(config, micro_batch_tokens=min(tokens, longest_row), gradient_checkpointing=True)


def _with(config: TrainingConfig, **values: object) -> TrainingConfig:
    return config.model_copy(update={"ppo": config.ppo.model_copy(update=values)})
