"""Attempts at a run: what ends it for good, what makes it wait, and when it is given up."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

import grpc
from sqlalchemy.exc import OperationalError

from policies.artifact import ArtifactError
from training.errors import TrainingError
from training.runs.folder import RunFolder
from training.runs.lease import clear_abort

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from training.context import TrainerContext

logger = logging.getLogger(__name__)

RETRY_SECONDS = 30.0
MOST_ATTEMPTS = 5
PASSING = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)
T = TypeVar("T")
AWAY = (OSError, OperationalError, grpc.RpcError)
"""What a full disk raises, a store or a server that is away, and a server that refuses."""


def is_transient(error: Exception) -> bool:
    """Whether this error, one of AWAY, may be gone later: all but a server's refusal, which would come again."""
    return not isinstance(error, grpc.RpcError) or error.code() in PASSING


def describe(error: Exception) -> str:
    """What an error says, in words for operators."""
    if isinstance(error, grpc.RpcError):
        return f"serving {'is away' if is_transient(error) else 'refused'}: {error.details()}"
    return str(error)


def retry_until_done(action: Callable[[], T]) -> T:
    """Does it until it is done, however long a disk is full, or serving or the store away."""
    while True:
        try:
            return action()
        except AWAY as error:
            if not is_transient(error):
                raise
            logger.error("waiting: %s", describe(error))
        time.sleep(RETRY_SECONDS)


def run_once(context: TrainerContext, folder: RunFolder) -> bool:
    """Runs, or goes on with a run. False if a disk is full or serving or the store is away: then it goes on later.

    A run that kills the trainer again and again is given up, so that there can be others.
    """
    try:
        _attempt(context, folder)
        ended = True
    except AWAY as error:
        # Several ranks each read the store: where one could not, they are out of step, and all begin again.
        if isinstance(error, OperationalError) and context.ranks.size > 1:
            folder.survived_attempt()
            raise
        logger.error("run %s waits: %s", folder.path.name, describe(error))
        folder.wait(describe(error))
        ended = False
    except SystemExit as error:
        # The trainer was told to end; the run did not do it. Of several ranks it may be torchrun that tells, since
        # another died of the run.
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
    except (TrainingError, ArtifactError, grpc.RpcError) as error:
        if isinstance(error, grpc.RpcError) and is_transient(error):
            raise
        logger.error("run %s stopped: %s", run_id, describe(error))
        folder.log("stopped", 0, 1, {"reason": describe(error)})


def _count_attempt(folder: RunFolder) -> None:
    if folder.begin_attempt() > MOST_ATTEMPTS:
        raise TrainingError(f"{MOST_ATTEMPTS} attempts came to an end at the same place; the trainer's log says how")


def end(engine: Engine, folder: RunFolder) -> None:
    """Writes the reports of a run that has said how it ended, and forgets what it was asked. Harmless when repeated."""
    _write_reports(folder)
    # In this order: killed between the two, it leaves a request that concerns nobody any more.
    folder.end()
    clear_abort(engine, folder.path.name)


def _write_reports(folder: RunFolder) -> None:
    """Writes what a person opens. Nothing is lost without it, so no failure of it is one of the run."""
    from training.report.page import write_report
    from training.report.tensorboard import write_events

    try:
        write_report(folder.path)
        write_events(folder.path)
    except Exception:
        logger.exception("run %s: its report could not be written", folder.path.name)
