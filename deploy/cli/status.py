"""`alignd status`: which processes run, which policy is live and how far training is, on one screen."""

from __future__ import annotations

import json
import os
from contextlib import closing
from typing import TYPE_CHECKING, Any

from grpc_health.v1 import health_pb2
from rich.console import Console

from alignd.v1 import policy_service_pb2 as pb
from deploy.cli.run_view import progress, run_folders, view_run, with_control
from deploy.client import CallError, connect
from deploy.config import AligndConfig
from feedback.bus.topics import DEAD_LETTERS

if TYPE_CHECKING:
    from training.runs.lease import Control

console = Console(highlight=False)
TIMEOUT_SECONDS = 5.0


def print_status(config: AligndConfig) -> bool:
    """Prints the state of the loop, and returns whether the server serves."""
    _print_processes(config)
    serving = _print_server(config)
    if config.data_dir.exists():
        print_training(config, print_rankings(config))
    return serving


def _print_server(config: AligndConfig) -> bool:
    try:
        with connect(config.server_address) as operator:
            health = operator.health.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_SECONDS).status
            policies = operator.policies.ListPolicies(pb.ListPoliciesRequest(), timeout=TIMEOUT_SECONDS)
    except CallError as error:
        console.print(f"server    {error}", markup=False, soft_wrap=True)
        return False
    serving: bool = health == health_pb2.HealthCheckResponse.SERVING
    console.print(f"server    {config.server_address} {health_pb2.HealthCheckResponse.ServingStatus.Name(health)}")
    _print_policies(policies)
    return serving


def _print_processes(config: AligndConfig) -> None:
    path = config.data_dir / "up.json"
    if not path.is_file():
        return
    running = [f"{verb} {pid}" for verb, pid in json.loads(path.read_text()).items() if _alive(pid)]
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
        served = f"serves v{replica.policy.version} {replica.error_message}".rstrip()
        console.print(f"replica   {replica.replica_id} {served}", markup=False, soft_wrap=True)


def print_rankings(config: AligndConfig) -> Control | None:
    """Prints how many rankings there are. Returns what operators ask of the trainer, or None without a store."""
    from sqlalchemy import make_url
    from sqlalchemy.exc import SQLAlchemyError

    from feedback.store.engine import open_engine
    from feedback.store.reader import Store
    from training.loop import CURSOR_FILE, Cursor
    from training.runs.lease import read_control

    try:
        with closing(Store(config.store_url)) as store:
            new = store.num_rankings(Cursor(config.runs_dir / CURSOR_FILE).read())
            said = f"{store.num_rankings()} in the store, {new} new; {config.training.min_new_rankings} begin a run"
            dead = store.num_dead_letters()
        engine = open_engine(config.store_url)
        control = read_control(engine)
        engine.dispose()
    except (SQLAlchemyError, OSError) as error:
        reason = str(error).partition("\n")[0]
        said = f"the store {make_url(config.store_url)!r} cannot be used: {reason}"
        dead, control = 0, None
    console.print(f"rankings  {said}", markup=False, soft_wrap=True)
    if dead:
        console.print(f"          {dead} records could not be used; topic {DEAD_LETTERS} says why")
    return control


def print_training(config: AligndConfig, control: Control | None) -> None:
    """Prints how far the newest run is, or how it ended."""
    folders = run_folders(config.runs_dir)
    if not folders:
        console.print("training  no run yet")
        return
    view = view_run(folders[0])
    if control:
        (view,) = with_control([view], control)
    at = f", {view.phase} {progress(view)}" if view.state == "running" and view.phase else ""
    why = f": {view.reason}" if view.reason else ""
    console.print(f"training  {view.run}: {view.state}{at}{why}", markup=False, soft_wrap=True)
