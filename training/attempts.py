"""Attempts at a run: which errors end the run, which make it wait, and when it is given up."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import grpc
from sqlalchemy.exc import OperationalError

from feedback import heartbeat
from policies.artifact import ArtifactError, UnreadableError
from training.errors import TrainingError
from training.runs.folder import RunFolder
from training.runs.lease import clear_abort

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from training.context import TrainerContext

logger = logging.getLogger(__name__)

RETRY_SECONDS = 30.0
MOST_ATTEMPTS = 5
_MOST_KILLINGS = 2
_PASSING = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
T = TypeVar("T")
AWAY = (OSError, OperationalError, grpc.RpcError)
"""Errors for a full disk, for a store or a server that does not answer, and for a server that refuses."""


def is_transient(error: Exception) -> bool:
    """Whether this error, one of AWAY, may pass by itself. All may, except a refusal, which the server would repeat."""
    return not isinstance(error, grpc.RpcError) or error.code() in _PASSING


def describe(error: Exception) -> str:
    """Returns what an error says, in words for operators."""
    if isinstance(error, grpc.RpcError):
        return f"serving {'is away' if is_transient(error) else 'refused'}: {error.details()}"
    return str(error)


def retry_until_done(action: Callable[[], T]) -> T:
    """Returns the action's result, and repeats the action while a disk is full, or serving or the store is away."""
    while True:
        try:
            return action()
        except AWAY as error:
            if not is_transient(error):
                raise
            logger.error("waiting: %s", describe(error))
        heartbeat.wait(RETRY_SECONDS)


def run_once(context: TrainerContext, folder: RunFolder) -> bool:
    """Makes an attempt at a run. Returns whether the run has ended.

    It has not where a disk is full, or serving or the store is away: the run is then to be resumed later. A run that
    kills the trainer again and again is given up, so that others can begin.
    """
    try:
        _attempt(context, folder)
        ended = True
    except AWAY as error:
        # Each of several ranks reads the store. Where one could not, ranks no longer do the same, and all must restart.
        if isinstance(error, OperationalError) and context.ranks.size > 1:
            folder.survived_attempt()
            raise
        logger.error("run %s waits: %s", folder.path.name, describe(error))
        folder.wait(describe(error))
        ended = False
    except SystemExit as error:
        # Somebody asked the trainer to end; the run did not make it end. With several ranks torchrun may have asked,
        # because the run killed another rank.
        if context.ranks.size == 1 and not error.code:
            folder.survived_attempt()
        raise
    folder.survived_attempt()
    return ended


def _attempt(context: TrainerContext, folder: RunFolder) -> None:
    from training.models.parallel import led
    from training.run import run

    run_id = folder.path.name
    folder.rewind("stopped", 0)
    try:
        _count_attempt(folder)
        led(context.ranks, lambda: folder.path)
        version = run(context, folder)
        folder.log("done", 0, 1, {"version": version})
        logger.info("run %s made version %d", run_id, version)
    except UnreadableError as error:
        # A version's files cannot be read now: that ends no run.
        raise OSError(str(error)) from error
    except (TrainingError, ArtifactError, grpc.RpcError) as error:
        if isinstance(error, grpc.RpcError) and is_transient(error):
            raise
        logger.error("run %s stopped: %s", run_id, describe(error))
        folder.log("stopped", 0, 1, {"reason": describe(error)})


def _count_attempt(folder: RunFolder) -> None:
    how = f"the last time, {folder.waits_for}" if folder.waits_for else "the trainer's log says how"
    attempt = folder.begin_attempt()
    if len(folder.killings) >= _MOST_KILLINGS:
        raise TrainingError(
            f"{folder.killings[-1]}, for the second time at the same place; `alignd train --dry-run` shows what memory "
            "a run takes, and which settings lower it"
        )
    if attempt > MOST_ATTEMPTS:
        raise TrainingError(f"{MOST_ATTEMPTS} attempts came to an end at the same place; {how}")


def end(engine: Engine, folder: RunFolder) -> None:
    """Writes the reports of a run whose end is recorded, and removes its state and any request to end it.

    It may be repeated.
    """
    _write_reports(folder)
    # In this order: a trainer that is killed between the two leaves a request to end a run that has ended.
    folder.end()
    clear_abort(engine, folder.path.name)


def _write_reports(folder: RunFolder) -> None:
    """Writes what a person opens. Nothing is lost without it, so that a failure here does not fail the run."""
    from training.report.page import write_report
    from training.report.tensorboard import write_events

    try:
        write_report(folder.path)
        write_events(folder.path)
    except Exception:
        logger.exception("run %s: its report could not be written", folder.path.name)
