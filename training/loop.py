"""The training service: waits for enough new rankings, trains, and waits again. A lease ensures that only one trains.

A run that was killed is resumed before another begins. Between two rounds, and between two phases of a run, the trainer
checks whether an operator has paused it or ended the run.

Where there are several ranks (training.models.parallel), the first one does all this, and the others follow it through
its runs.
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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

import grpc

from feedback import heartbeat
from feedback.durable import replace_file
from policies.artifact import ArtifactError, UnreadableError
from policies.server_connection import ServerConnection
from training.attempts import RETRY_SECONDS, describe, end, is_transient, retry_until_done, run_once
from training.config import TrainingConfig
from training.errors import TrainingError
from training.runs.control import OperatorControl
from training.runs.folder import RECIPE_FILE, SFT, SFT_SUFFIX, Origin, RunFolder
from training.runs.policy_client import START_SECONDS, PolicyClient

if TYPE_CHECKING:
    from sqlalchemy import Engine

    from feedback.store.reader import Store
    from feedback.store.stored import RankedGroup
    from training.context import TrainerContext
    from training.data.new_rankings import NewRankings
    from training.models.parallel import Ranks
    from training.runs.lease import TrainerLease

logger = logging.getLogger(__name__)

CURSOR_FILE = "rankings_seen"


def run_trainer(
    config: TrainingConfig, *, store_url: str, policies_dir: Path, runs_dir: Path, server: ServerConnection
) -> None:
    """Trains until SIGTERM or SIGINT.

    A run that fails leaves the live policy as it is, and writes the reason to its metrics.jsonl.

    Raises:
        TrainingError: torchrun has not started as many processes as `num_processes` says.
    """
    from feedback.store.engine import open_engine
    from feedback.store.reader import Store
    from training.context import open_context
    from training.models.parallel import join
    from training.runs.lease import TrainerLease

    ranks = join(config.num_processes)
    if not ranks.leads:
        _follow(config, ranks, Store(store_url), policies_dir, server)
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda *_: sys.exit(0))
    runs_dir.mkdir(parents=True, exist_ok=True)
    engine = open_engine(store_url)
    lease = TrainerLease(engine, _holder(), config.lease_seconds)
    with PolicyClient(server) as client:
        retry_until_done(lambda: _acquire(lease, engine, config))
        with lease.held():
            RunFolder.sweep(runs_dir)
            control = OperatorControl(config, engine, lease)
            roomy, store = _roomy(config, RunFolder.unfinished(runs_dir)), Store(store_url)
            context = open_context(roomy, store, client, policies_dir, control.between_rounds, ranks)
            cursor = Cursor(runs_dir / CURSOR_FILE)
            while True:
                folder = retry_until_done(
                    lambda: RunFolder.unfinished(runs_dir) or begin_run(control, context, runs_dir, cursor)
                )
                if run_once(context, folder):
                    retry_until_done(partial(cursor.write, folder.origin().last_ranking_seq))
                    retry_until_done(partial(end, engine, folder))
                else:
                    heartbeat.wait(RETRY_SECONDS)


def _follow(
    config: TrainingConfig, ranks: Ranks, store: Store, policies_dir: Path, server: ServerConnection
) -> NoReturn:
    """Takes part in each run that the first rank begins; every other rank does this."""
    from training.context import open_context
    from training.models.parallel import led
    from training.run import run

    with PolicyClient(server) as client:
        context = open_context(config, store, client, policies_dir, lambda run_id: None, ranks)
        while True:
            folder = RunFolder(led(ranks, Path))
            try:
                run(context, folder)
            except TrainingError as error:
                logger.info("run %s stopped: %s", folder.path.name, error)


def run_sft_once(
    config: TrainingConfig, *, store_url: str, policies_dir: Path, runs_dir: Path, server: ServerConnection
) -> int:
    """Fine-tunes on the store's demonstrations, or resumes that, and returns the version that was registered.

    An error of any other kind, such as OSError for a full disk, leaves the run as it is, to be resumed.

    Raises:
        TrainingError: it cannot be done, or another trainer works on the store; the message says what to do.
    """
    from feedback.store.engine import open_engine
    from feedback.store.reader import Store
    from training.context import open_context
    from training.models.parallel import ALONE
    from training.runs.lease import TrainerLease, read_control
    from training.sft_run import run_sft

    engine = open_engine(store_url)
    lease = TrainerLease(engine, _holder() + SFT_SUFFIX, config.lease_seconds)
    if not lease.acquire():
        raise TrainingError(
            f"{read_control(engine).holder} trains on this store; stop it first (`alignd up --without train` runs the "
            f"rest alone). If its machine is gone, its place is free {config.lease_seconds:g} s after it was last alive"
        )
    with PolicyClient(server) as client, lease.held():
        RunFolder.sweep(runs_dir)
        control, begun = OperatorControl(config, engine, lease), RunFolder.unfinished(runs_dir, SFT)
        roomy, store = _roomy(config, begun), Store(store_url)
        context = open_context(roomy, store, client, policies_dir, control.between_rounds, ALONE)
        if begun:
            run_id = begun.path.name
            logger.info("resuming %s with its own recipe; `alignd runs abort %s` ends it instead", run_id, run_id)
        folder = begun or RunFolder.create(runs_dir, _new_run_id() + SFT_SUFFIX, config, origin=None)
        folder.rewind("stopped", 0)
        try:
            version = run_sft(context, folder).version
        except (TrainingError, ArtifactError, grpc.RpcError) as error:
            if isinstance(error, UnreadableError) or (isinstance(error, grpc.RpcError) and is_transient(error)):
                raise TrainingError(f"{describe(error)}; `alignd sft` resumes {folder.path.name}") from error
            folder.log("stopped", 0, 1, {"reason": describe(error)})
            end(engine, folder)
            raise TrainingError(describe(error)) from error
        folder.log("done", 0, 1, {"version": version})
        end(engine, folder)
    return version


def _holder() -> str:
    return f"{socket.gethostname()}/{os.getpid()}"


def _acquire(lease: TrainerLease, engine: Engine, config: TrainingConfig) -> None:
    """Waits until no other trainer works on the store."""
    from training.runs.lease import read_control

    waited = False
    while not lease.acquire():
        if not waited:
            holder = read_control(engine).holder
            logger.info("another trainer works on this store; waiting for its place: %s", holder)
        waited = True
        heartbeat.wait(config.poll_seconds)


@dataclass(frozen=True)
class Cursor:
    """The number of the last ranking that a run has seen, on disk."""

    path: Path

    def read(self) -> int:
        """Returns the number; 0 before the first run."""
        return int(self.path.read_text()) if self.path.exists() else 0

    def write(self, seq: int) -> None:
        """Replaces the number, whole or not at all."""
        replace_file(self.path, str(seq))


def is_due(
    config: TrainingConfig, *, num_new: int, oldest_new: float | None, last_began: float | None, now: float
) -> bool:
    """Whether a run should begin: there are enough new rankings, or one has waited long enough, or it is time again.

    Args:
        config: has the three triggers.
        num_new: rankings that no run has seen and that one would learn from.
        oldest_new: when the first of them was given, in Unix seconds.
        last_began: when the last run began, in Unix seconds.
        now: the present time, in Unix seconds.
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
    """Returns the configuration with its own lengths or those of the unfinished run's recipe, whichever are greater.

    The engine must have room for both.
    """
    if not folder:
        return config
    present, begun = config.ppo, folder.config().ppo
    lengths = {name: max(getattr(present, name), getattr(begun, name)) for name in ("max_prompt_tokens", "max_tokens")}
    return config.model_copy(update={"ppo": present.model_copy(update=lengths)})


def begin_run(control: OperatorControl, context: TrainerContext, runs_dir: Path, cursor: Cursor) -> RunFolder:
    """Waits until a run is due, and makes its folder."""
    from training.context import find_parents
    from training.data.waiting import Counted, tell

    config, store, seen = control.config, context.store, cursor.read()
    waiting, counted = _new_rankings(config, context), None
    while True:
        new = waiting.count(seen, config.min_new_rankings)
        now = Counted(seen, new.count, new.left_out)
        if now != counted:
            tell(runs_dir, now, config.min_new_rankings)
        counted = now
        began = last_began(runs_dir)
        if is_due(config, num_new=new.count, oldest_new=new.oldest, last_began=began, now=time.time()):
            break
        control.between_rounds("")
        heartbeat.wait(config.poll_seconds)
    control.between_rounds("")
    parents = find_parents(context.client, START_SECONDS)
    origin = Origin(parents.live.version, parents.reference.version, store.last_seq(), store.last_sample_seq())
    return RunFolder.create(runs_dir, _new_run_id(), config, origin)


def _new_rankings(config: TrainingConfig, context: TrainerContext) -> NewRankings:
    """Returns what counts the rankings that a run of this configuration would learn from."""
    from training.data.census import LeftOut
    from training.data.dataset import example_of
    from training.data.new_rankings import NewRankings

    def left_out(group: RankedGroup) -> LeftOut | None:
        found = example_of(
            context.tokenizer, group,
            max_prompt_tokens=config.ppo.max_prompt_tokens,
            max_group_tokens=config.reward_model.micro_batch_tokens,
        )  # fmt: skip
        return found if isinstance(found, LeftOut) else None

    return NewRankings(context.store, config.reward_model.held_out_share, left_out)


def _new_run_id() -> str:
    """Returns an id; ids sort by time."""
    return f"{time.strftime('%Y%m%dT%H%M%S', time.gmtime())}-{uuid.uuid4().hex[:6]}"


def last_began(runs_dir: Path) -> float | None:
    """Returns when the last run that learned from rankings began, in Unix seconds; None if there was none."""
    found = (path for path in runs_dir.glob(f"*/{RECIPE_FILE}") if not path.parent.name.endswith(SFT_SUFFIX))
    return max((path.stat().st_mtime for path in found), default=None)
