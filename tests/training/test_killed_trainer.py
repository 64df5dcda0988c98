"""A trainer that is killed in any phase ends with what one makes that lives."""

import signal
from functools import partial
from pathlib import Path

import grpc
import pytest

from alignd.v1 import policy_service_pb2, policy_service_pb2_grpc
from tests.training.stored_feedback import write_rankings
from tests.training.trainer_process import (
    Serving,
    finished_run,
    has_reached,
    killed_when,
    lines,
    policy_service,
    start_trainer,
)


async def digest_and_lines(serving: Serving, folder: Path) -> tuple[str, list[dict[str, object]]]:
    """Returns the digest of the live weights, and the run's lines of metrics.jsonl without times."""
    async with grpc.aio.insecure_channel(serving.address) as channel:
        stub = policy_service_pb2_grpc.PolicyServiceStub(channel)
        live = (await stub.GetPolicy(policy_service_pb2.GetPolicyRequest(policy="live"))).policy
    assert live.version == 2
    written = [
        {key: value for key, value in line.items() if key != "time" and not key.startswith("seconds/")}
        for line in lines(folder / "metrics.jsonl")
    ]
    return live.manifest.weight_digest, written


@pytest.mark.timeout(450)  # vLLM starts seven times
async def test_a_trainer_killed_in_each_phase_makes_what_one_does_that_lives(tmp_path: Path, tiny_folder: Path) -> None:
    found = []
    for name in ("alive", "killed"):
        folder = tmp_path / name
        folder.mkdir()
        write_rankings(f"sqlite:///{folder}/store.db", 16)
        runs, policies = folder / "runs", folder / "policies"
        ends = [
            *(partial(has_reached, phase, runs) for phase in ("reward_model_evaluation", "ppo", "evaluate")),
            (policies / "v2").exists,
            partial(has_reached, "register", runs),
        ]
        async with policy_service(folder, tiny_folder) as service:
            for is_time in ends if name == "killed" else []:
                await killed_when(is_time, start_trainer(service, folder))
            process = start_trainer(service, folder)
            try:
                ended = await finished_run(runs, process)
                found.append(await digest_and_lines(service, ended))
                process.send_signal(signal.SIGINT)
                assert process.wait(20) == 0
            finally:
                process.kill()
                process.wait()
        assert len(list(runs.glob("*/recipe.json"))) == 1
        assert sorted(path.name for path in policies.glob("v*")) == ["v1", "v2"]
    assert found[0] == found[1]
