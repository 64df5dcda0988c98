"""How the demo follows a training run from outside."""

import json
from pathlib import Path

import pytest

from alignd.v1 import policy_service_pb2 as pb
from alignd.v1.types_pb2 import PolicyRef
from deploy.demo.follow import RunError, phase_seconds, read_run, swapped


def write(path: Path, *records: dict) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def record(phase: str, time: float, **metrics: float | str) -> dict:
    return {"phase": phase, "time": time, "index": 0, "count": 2, **metrics}


def test_no_run_yet(tmp_path: Path) -> None:
    view = read_run(tmp_path)
    assert view.last["phase"] == "waiting"
    assert view.of("ppo") == []


def test_a_line_that_is_still_being_written_is_left_for_the_next_look(tmp_path: Path) -> None:
    path = tmp_path / "run" / "metrics.jsonl"
    write(path, record("ppo", 1.0))
    with path.open("a") as file:
        file.write('{"phase": "ppo", "ti')
    assert len(read_run(tmp_path).records) == 1


def test_a_stopped_run_says_why(tmp_path: Path) -> None:
    write(tmp_path / "run" / "metrics.jsonl", record("ppo", 1.0), record("stopped", 2.0, reason="KL grew to 99 nats"))
    with pytest.raises(RunError, match="KL grew to 99 nats"):
        read_run(tmp_path)


def test_time_is_accounted_to_the_phase_that_it_ended_in(tmp_path: Path) -> None:
    records = [record("reward_model", 12.0), record("reward_model", 15.0), record("ppo", 20.0), record("done", 30.0)]
    write(tmp_path / "run" / "metrics.jsonl", *records)
    assert phase_seconds(read_run(tmp_path), started=10.0) == [("fitting the reward model", 5.0), ("PPO", 5.0)]


def test_the_swap_is_seen_once_a_replica_reports_the_version() -> None:
    serving_v1 = pb.ReplicaStatus(replica_id="a", policy=PolicyRef(version=1))
    serving_v2 = pb.ReplicaStatus(replica_id="b", policy=PolicyRef(version=2))
    assert swapped(pb.ListPoliciesResponse(replicas=[serving_v1]), 2) is None
    assert swapped(pb.ListPoliciesResponse(replicas=[serving_v1, serving_v2]), 2) == serving_v2


def test_a_replica_that_could_not_swap_ends_the_wait() -> None:
    failed = pb.ReplicaStatus(replica_id="a", policy=PolicyRef(version=1), error_message="v2: probes differ")
    with pytest.raises(RunError, match="probes differ"):
        swapped(pb.ListPoliciesResponse(replicas=[failed]), 2)
