"""The training service: waits for enough new rankings, runs, and waits again, for ever; one at a time by a lease.

A run that was killed is gone on with before any other is begun. What operators ask is heard between two steps.

Of several ranks (training.parallel) the first one does all this, and the others follow it through its runs.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import grpc

from training.config import TrainingConfig
from training.errors import RunAbortedError, TrainingError
from training.publish import START_SECONDS, PolicyClient
from training.run_folder import Origin, RunFolder, replace_file

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from feedback.store import Store
    from feedback.trainer_lease import TrainerLease
    from training.parallel import Ranks
    from training.workplace import Workplace

logger = logging.getLogger(__name__)

CURSOR_FILE = "rankings_seen"
SFT_SUFFIX = "-sft"
RETRY_SECONDS = 30.0
MOST_ATTEMPTS = 5
PASSING = (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED)


def run_trainer(
    config: TrainingConfig, *, store_url: str, policies_dir: Path, runs_dir: Path, serving_address: str
) -> None:
    """Runs until SIGTERM. A run that fails leaves the live policy as it is, and why in its metrics.jsonl.

    Raises TrainingError if torchrun has not started `num_processes`.
    """
    from feedback.engine import open_engine
    from feedback.store import Store
    from feedback.trainer_lease import TrainerLease, clear_abort
    from training.parallel import join
    from training.workplace import open_workplace

    ranks = join(config.num_processes)
    if not ranks.leads:
        _follow(config, ranks, Store(store_url), policies_dir, serving_address)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    runs_dir.mkdir(parents=True, exist_ok=True)
    engine = open_engine(store_url)
    lease = TrainerLease(engine, f"{socket.gethostname()}/{os.getpid()}", config.lease_seconds)
    with PolicyClient(serving_address) as client:
        _acquire(lease, config)
        with lease.held():
            desk = Desk(config, engine, lease)
            roomy, store = _roomy(config, RunFolder.unfinished(runs_dir)), Store(store_url)
            place = open_workplace(roomy, store, client, policies_dir, desk.between_rounds, ranks)
            cursor = Cursor(runs_dir / CURSOR_FILE)
            while True:
                folder = RunFolder.unfinished(runs_dir) or _begin_run(config, desk, place, runs_dir, cursor.read())
                if run_once(place, folder):
                    cursor.write(folder.origin().last_ranking_seq)
                    _write_reports(folder)
                    # In this order: killed between the two, it leaves a request that concerns nobody any more.
                    folder.end()
                    clear_abort(engine, folder.path.name)
                else:
                    time.sleep(RETRY_SECONDS)


def _follow(config: TrainingConfig, ranks: Ranks, store: Store, policies_dir: Path, serving_address: str) -> NoReturn:
    """What all ranks but the first do: take part in each run that it begins."""
    from training.parallel import led
    from training.run import run
    from training.workplace import open_workplace

    with PolicyClient(serving_address) as client:
        place = open_workplace(config, store, client, policies_dir, lambda run_id: None, ranks)
        while True:
            folder = RunFolder(led(ranks, Path))
            try:
                run(place, folder)
            except TrainingError as error:
                logger.info("run %s stopped: %s", folder.path.name, error)


def run_sft_once(
    config: TrainingConfig, *, store_url: str, policies_dir: Path, runs_dir: Path, serving_address: str
) -> int:
    """Fine-tunes on the store's demonstrations, or goes on with that, and returns the version that was registered.

    Raises TrainingError if that cannot be done, or another trainer works on the store; the message says what to do.
    What else it raises, such as for a full disk, leaves the run as it is, to be gone on with.
    """
    from feedback.engine import open_engine
    from feedback.store import Store
    from feedback.trainer_lease import TrainerLease, read_control
    from training.parallel import ALONE
    from training.sft_run import BEGINNING, run_sft
    from training.workplace import open_workplace

    engine = open_engine(store_url)
    lease = TrainerLease(engine, f"{socket.gethostname()}/{os.getpid()}", config.lease_seconds)
    if not lease.acquire():
        raise TrainingError(f"{read_control(engine).holder} trains on this store; stop it first")
    with PolicyClient(serving_address) as client, lease.held():
        desk, begun = Desk(config, engine, lease), RunFolder.unfinished(runs_dir, BEGINNING)
        roomy, store = _roomy(config, begun), Store(store_url)
        place = open_workplace(roomy, store, client, policies_dir, desk.between_rounds, ALONE)
        if begun:
            run_id = begun.path.name
            logger.info("going on with %s and its recipe; `alignd runs abort %s` ends it instead", run_id, run_id)
        folder = begun or RunFolder.create(runs_dir, _new_run_id() + SFT_SUFFIX, config, origin=None)
        try:
            version = run_sft(place, folder).version
        except TrainingError as error:
            _end_sft(folder, "stopped", {"reason": str(error)})
            raise
        _end_sft(folder, "done", {"version": version})
    return version


def _end_sft(folder: RunFolder, phase: str, metrics: dict[str, str | int]) -> None:
    folder.log(phase, 0, 1, metrics)
    _write_reports(folder)
    folder.end()


def _acquire(lease: TrainerLease, config: TrainingConfig) -> None:
    """Waits until no other trainer works on the store."""
    waited = False
    while not lease.acquire():
        if not waited:
            logger.info("another trainer works on this store; waiting for its place")
        waited = True
        time.sleep(config.poll_seconds)


@dataclass(frozen=True)
class Cursor:
    """The number of the last ranking that a run has seen, on disk."""

    path: Path

    def read(self) -> int:
        """0 before the first run."""
        return int(self.path.read_text()) if self.path.exists() else 0

    def write(self, seq: int) -> None:
        """Replaces it at once or not at all."""
        replace_file(self.path, str(seq))


@dataclass(frozen=True)
class Desk:
    """Where operators' wishes arrive, and where it is told that the place was lost."""

    config: TrainingConfig
    engine: Engine
    lease: TrainerLease

    def between_rounds(self, run_id: str) -> None:
        """Waits while the trainer is paused. Raises RunAbortedError, or SystemExit if another trainer took over."""
        from feedback.trainer_lease import read_control

        told = False
        while True:
            if not self.lease.renew():
                logger.error("another trainer has taken over; ending")
                sys.exit(1)
            control = read_control(self.engine)
            if run_id and control.abort_run == run_id:
                raise RunAbortedError("an operator asked for it to end")
            if not control.paused:
                return
            if not told:
                logger.info("paused; `alignd runs resume` goes on")
            told = True
            time.sleep(self.config.poll_seconds)


def is_due(
    config: TrainingConfig, *, num_new: int, oldest_new: float | None, last_began: float | None, now: float
) -> bool:
    """Whether a run should begin: enough new rankings, or one that has waited long enough, or the hour has come.

    Args:
        config: with the three triggers.
        num_new: rankings that no run has seen.
        oldest_new: when the first of them was given, Unix seconds.
        last_began: when the last run began.
        now: the time.
    """
    if num_new >= config.min_new_rankings:
        return True
    if num_new == 0 or oldest_new is None:
        return False
    if config.max_wait_seconds is not None and now - oldest_new >= config.max_wait_seconds:
        return True
    every = config.run_every_seconds
    return every is not None and (last_began is None or now - last_began >= every)


def _roomy(config: TrainingConfig, folder: RunFolder | None) -> TrainingConfig:
    """The configuration with room in the engine for the run that is to be gone on with, which has its own recipe."""
    if not folder:
        return config
    present, begun = config.ppo, folder.config().ppo
    lengths = {name: max(getattr(present, name), getattr(begun, name)) for name in ("max_prompt_tokens", "max_tokens")}
    return config.model_copy(update={"ppo": present.model_copy(update=lengths)})


def _begin_run(config: TrainingConfig, desk: Desk, place: Workplace, runs_dir: Path, seen: int) -> RunFolder:
    """Waits until a run is due, and makes its folder."""
    from training.workplace import find_parents

    store = place.store
    while not is_due(
        config,
        num_new=store.num_rankings(seen),
        oldest_new=store.oldest_ranking_time(seen),
        last_began=last_began(runs_dir),
        now=time.time(),
    ):
        desk.between_rounds("")
        time.sleep(config.poll_seconds)
    desk.between_rounds("")
    parents = find_parents(place.client, START_SECONDS)
    origin = Origin(parents.live.version, parents.reference.version, store.last_seq(), store.last_sample_seq())
    return RunFolder.create(runs_dir, _new_run_id(), config, origin)


def _new_run_id() -> str:
    """Sorts by time."""
    return f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:6]}"


def last_began(runs_dir: Path) -> float | None:
    """When the last run that learned from rankings began."""
    found = (path for path in runs_dir.glob("*/recipe.json") if not path.parent.name.endswith(SFT_SUFFIX))
    return max((path.stat().st_mtime for path in found), default=None)


def run_once(place: Workplace, folder: RunFolder) -> bool:
    """Runs, or goes on with a run. False if a disk is full or serving or the store is away: then it goes on later.

    A run that kills the trainer again and again is given up, so that there can be others.
    """
    from sqlalchemy.exc import OperationalError

    try:
        ended = _attempt(place, folder)
    except (OSError, OperationalError) as error:
        # Several ranks each read the store: where one could not, they are out of step, and all begin again.
        if isinstance(error, OperationalError) and place.ranks.size > 1:
            folder.survived_attempt()
            raise
        logger.error("run %s waits: %s", folder.path.name, error)
        ended = False
    except SystemExit as error:
        # The trainer was told to end; the run did not do it. Of several ranks it may be torchrun that tells, since
        # another died of the run.
        if place.ranks.size == 1 and not error.code:
            folder.survived_attempt()
        raise
    folder.survived_attempt()
    return ended


def _attempt(place: Workplace, folder: RunFolder) -> bool:
    from feedback.artifact import ArtifactError
    from training.parallel import led
    from training.run import run

    run_id = folder.path.name
    folder.rewind("stopped", 0)
    try:
        _count_attempt(folder)
        led(place.ranks, lambda: folder.path)
        version = run(place, folder)
        folder.log("done", 0, 1, {"version": version})
        logger.info("run %s made version %d", run_id, version)
    except (TrainingError, ArtifactError) as error:
        logger.error("run %s stopped: %s", run_id, error)
        folder.log("stopped", 0, 1, {"reason": str(error)})
    except grpc.RpcError as error:
        if error.code() in PASSING:
            logger.error("run %s waits: serving: %s", run_id, error)
            return False
        # Asked again, serving would refuse again.
        logger.error("run %s stopped: serving refused: %s", run_id, error.details())
        folder.log("stopped", 0, 1, {"reason": f"serving refused: {error.details()}"})
    return True


def _count_attempt(folder: RunFolder) -> None:
    if folder.begin_attempt() > MOST_ATTEMPTS:
        raise TrainingError(f"{MOST_ATTEMPTS} attempts came to an end at the same place; the trainer's log says how")


def _write_reports(folder: RunFolder) -> None:
    """Writes what a person opens. Nothing is lost without it, so no failure of it is one of the run."""
    from training.report.page import write_report
    from training.report.tensorboard import write_events

    try:
        write_report(folder.path)
        write_events(folder.path)
    except Exception:
        logger.exception("run %s: its report could not be written", folder.path.name)
