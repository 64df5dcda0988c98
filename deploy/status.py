"""`alignd status`: what runs, what is live and how far the loop is, on one screen."""

import json
import os
from contextlib import closing
from typing import Any

from grpc_health.v1 import health_pb2
from rich.console import Console

from alignd.v1 import policy_service_pb2 as pb
from deploy.client import CallError, connect
from deploy.config import AligndConfig

console = Console(highlight=False)
TIMEOUT_S = 5.0


def print_status(config: AligndConfig) -> bool:
    """Prints the state of the loop, and returns whether the server serves."""
    print_processes(config)
    try:
        with connect(config.server_address) as operator:
            health = operator.health.Check(health_pb2.HealthCheckRequest(), timeout=TIMEOUT_S).status
            policies = operator.policies.ListPolicies(pb.ListPoliciesRequest(), timeout=TIMEOUT_S)
    except CallError as error:
        console.print(f"server    {error}", markup=False, soft_wrap=True)
        return False
    serving: bool = health == health_pb2.HealthCheckResponse.SERVING
    console.print(f"server    {config.server_address} {health_pb2.HealthCheckResponse.ServingStatus.Name(health)}")
    print_policies(policies)
    print_rankings(config)
    print_last_run(config)
    return serving


def print_processes(config: AligndConfig) -> None:
    path = config.data_dir / "up.json"
    if not path.is_file():
        return
    running = [f"{verb} {pid}" for verb, pid in json.loads(path.read_text()).items() if alive(pid)]
    console.print(f"processes {', '.join(running) or 'none; the last `alignd up` was killed'}")


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True


def print_policies(response: Any) -> None:
    live = f"v{response.live_version}" if response.live_version else "none"
    console.print(f"policies  {len(response.policies)}, live: {live}")
    for replica in response.replicas:
        served = f"serves v{replica.policy.version} {replica.error_message}".rstrip()
        console.print(f"replica   {replica.replica_id} {served}", markup=False, soft_wrap=True)


def print_rankings(config: AligndConfig) -> None:
    from sqlalchemy import make_url
    from sqlalchemy.exc import SQLAlchemyError

    from feedback.store import Store

    try:
        with closing(Store(config.store_url)) as store:
            said = f"{store.num_rankings()} in the store"
    except (SQLAlchemyError, OSError) as error:
        reason = str(error).partition("\n")[0]
        said = f"the store {make_url(config.store_url)!r} cannot be used: {reason}"
    console.print(f"rankings  {said}", markup=False, soft_wrap=True)


def print_last_run(config: AligndConfig) -> None:
    from training.report.record import read_lines

    runs = sorted(config.runs_dir.glob("*/metrics.jsonl"), key=lambda path: path.stat().st_mtime)
    if not runs:
        console.print(f"training  no run yet; the next begins at {config.training.min_new_rankings} new rankings")
        return
    records = read_lines(runs[-1]).found
    at = f"{records[-1]['phase']} {records[-1]['step']} of {records[-1]['num_steps']}" if records else "it has begun"
    console.print(f"training  {runs[-1].parent.name}: {at}")
