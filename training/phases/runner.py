"""Performs a phase of a run: by all ranks together, or by the first rank for all of them."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from feedback import heartbeat
from policies.host_memory import give_back
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
    """Returns what `make` has written to `state/`, now or in an earlier attempt; None if it has written nothing yet.

    Not set for a phase that writes nothing there: its result must then be small enough to be sent to the other ranks.
    """
    collective: bool = False
    """Whether all ranks make it together, each for itself. Otherwise the first makes it while the others wait."""


def perform(context: TrainerContext, run_id: str, phase: Phase[T]) -> T:
    """Returns the result of a phase, made now unless an earlier attempt has made it.

    Every rank calls this for the same phases in the same order. Before each phase it waits while the trainer is paused.

    Raises:
        RunAbortedError: an operator has asked for the run to end.
        TrainingError: the first rank could not make the phase; the first rank raises the cause itself.
    """
    heartbeat.beat()
    context.between_rounds(run_id)
    logger.info("run %s: %s", run_id, phase.name)
    # What the phase before needed alone may be most of what there is.
    give_back()
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
    assert result is not None, f"the phase {phase.name} has written nothing to state/"
    return result
