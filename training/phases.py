"""Performs the phases of a run, one after the other: by all ranks together, or by the first for all of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from training.context import TrainerContext
from training.models.parallel import led

logger = logging.getLogger(__name__)

T = TypeVar("T")


@dataclass(frozen=True)
class Phase(Generic[T]):
    """A part of a run, and the result that it ends with."""

    name: str
    make: Callable[[], T]
    """Does the work, and returns the result."""
    load: Callable[[], T | None] | None = None
    """Reads back from `state/` what `make` left there, now or in an earlier attempt; None if nothing is there yet.

    Not set for a phase that leaves nothing: its result must be small enough to be sent to the other ranks.
    """
    collective: bool = False
    """All ranks make it together, each for itself. Otherwise the first makes it while the others wait."""


def perform(context: TrainerContext, run_id: str, phase: Phase[T]) -> T:
    """Returns the result of a phase, made now unless an earlier attempt has made it.

    Every rank calls this for the same phases in the same order. Operators are heard before each phase.

    Raises:
        RunAbortedError: an operator has asked for the run to end.
        TrainingError: the first rank could not make the phase, which says there why.
    """
    context.between_rounds(run_id)
    logger.info("run %s: %s", run_id, phase.name)
    if phase.collective:
        return phase.make()
    load = phase.load
    if load is None:
        return led(context.ranks, phase.make)

    def make_unless_made() -> None:
        if load() is None:
            phase.make()

    led(context.ranks, make_unless_made)
    result = load()
    assert result is not None, f"the phase {phase.name} has left nothing"
    return result
