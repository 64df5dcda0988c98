"""`alignd status`: which processes run, which policy is live and how far training is, on one screen."""

from __future__ import annotations

import os
import time
from contextlib import closing
from typing import TYPE_CHECKING, Any

from grpc_health.v1 import health_pb2
from rich.console import Console

from alignd.v1 import policy_service_pb2 as pb
from deploy.cli.plain import plain
from deploy.cli.run_view import progress, read_records, run_folders, view_run, with_control
from deploy.client import CallError, connect
from deploy.config import AligndConfig
from deploy.data_dir import processes
from deploy.silence import in_words
from feedback.bus.topics import DEAD_LETTERS
from training.data.census import sentences
from training.runs.record import last_of

if TYPE_CHECKING:
    from training.runs.lease import Control

console = Console(highlight=False)
TIMEOUT_SECONDS = 5.0


def print_status(config: AligndConfig) -> bool:
    """Prints the state of the loop, and returns whether the server serves."""
    print_processes(config)
    serving = _print_server(config)
    if config.data_dir.exists():
        print_training(config, print_rankings(config))
    return serving


def _print_server(config: AligndConfig) -> bool:
    try:
        with connect(config.server) as operator:
            health = operator.health.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_SECONDS).status
            policies = operator.policies.ListPolicies(pb.ListPoliciesRequest(), timeout=TIMEOUT_SECONDS)
    except CallError as error:
        console.print(f"server    {error}", markup=False, soft_wrap=True)
        return False
    serving: bool = health == health_pb2.HealthCheckResponse.SERVING
    console.print(f"server    {config.server_address} {health_pb2.HealthCheckResponse.ServingStatus.Name(health)}")
    _print_policies(policies)
    return serving


def print_processes(config: AligndConfig) -> None:
    """Prints which processes of `alignd up` run, and which of them make no progress."""
    try:
        known = processes(config.data_dir)
    except ValueError as error:
        console.print(plain(f"processes {error}"), markup=False, soft_wrap=True)
        return
    if not known:
        return
    now = time.time()
    found = {verb: pid for verb, pid in known.items() if _alive(pid)}
    silences = {verb: in_words(config.data_dir, verb, now) for verb in found}
    running = [f"{verb} {pid}" + (f" ({silences[verb]})" if silences[verb] else "") for verb, pid in found.items()]
    console.print(f"processes {', '.join(running) or 'none; the last `alignd up` was killed'}")


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def _print_policies(response: Any) -> None:
    live = f"v{response.live_version}" if response.live_version else "none"
    console.print(f"policies  {len(response.policies)}, live: {live}")
    for replica in response.replicas:
        serves = f"serves v{replica.policy.version}" if replica.HasField("policy") else "serves nothing"
        state = " DEGRADED" if replica.state == pb.REPLICA_STATE_DEGRADED else ""
        served = f"{serves}{state} {plain(replica.error_message)}".rstrip()
        console.print(f"replica   {plain(replica.replica_id)} {served}", markup=False, soft_wrap=True)


def print_rankings(config: AligndConfig) -> Control | None:
    """Prints how many rankings there are. Returns what operators ask of the trainer, or None without a store."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import SQLAlchemyError

    from feedback.store.engine import open_engine
    from feedback.store.reader import Store
    from training.data.waiting import read_counted
    from training.loop import CURSOR_FILE, Cursor
    from training.runs.lease import read_control

    try:
        with closing(Store(config.store_url)) as store:
            seen, enough = Cursor(config.runs_dir / CURSOR_FILE).read(), config.training.min_new_rankings
            counted = read_counted(config.runs_dir, seen)
            waits = counted.sentence(enough) if counted else f"not counted by the trainer yet; {enough} begin a run"
            said = f"{store.num_rankings()} in the store, {store.num_rankings(seen)} new: {waits}"
            dead, losses = store.num_dead_letters(), store.num_losses()
        engine = open_engine(config.store_url)
        control = read_control(engine)
        engine.dispose()
    except (SQLAlchemyError, OSError) as error:
        said = f"the store {make_url(config.store_url)!r} cannot be used: {error}"
        dead, losses, control = 0, 0, None
    console.print(f"rankings  {plain(said)}", markup=False, soft_wrap=True)
    if dead:
        console.print(f"          {dead} records could not be used; topic {DEAD_LETTERS} says why")
    if losses:
        said = "time" if losses == 1 else "times"
        console.print(f"          the bus lost records that were stored, {losses} {said}; the log of ingest has when")
    return control


def print_training(config: AligndConfig, control: Control | None) -> None:
    """Prints how far the newest run is, what it waits for, or how it ended."""
    folders = run_folders(config.runs_dir)
    if not folders:
        console.print("training  no run yet")
        return
    view = view_run(folders[0])
    if control:
        (view,) = with_control([view], control)
    at = f", {view.phase} {progress(view)}" if view.phase and not view.has_ended else ""
    why = f": {view.reason}" if view.reason else ""
    console.print(plain(f"training  {view.run}: {view.state}{at}{why}"), markup=False, soft_wrap=True)
    for sentence in sentences(last_of(read_records(folders[0]), "data")):
        console.print(plain(f"          {sentence}"), markup=False, soft_wrap=True)
