"""The trainer as two processes beside a real policy service: both make one run, and if one dies, both restart."""

import asyncio
import signal
import subprocess
import sys
import time
from pathlib import Path

import grpc
import psutil
import pytest

from alignd.v1 import policy_service_pb2, policy_service_pb2_grpc
from policies.artifact import verify_artifact
from tests.training.stored_feedback import write_rankings
from tests.training.trainer_process import CONFIG, TRAINER, Serving, finished_run, lines, policy_service
from training.loop import Cursor

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "--no-python")
IN_TWO = CONFIG.model_copy(update={"num_processes": 2})


def start_trainer(serving: Serving, folder: Path) -> "subprocess.Popen[bytes]":
    store_url, runs = f"sqlite:///{folder}/store.db", str(folder / "runs")
    arguments = [IN_TWO.model_dump_json(), store_url, str(serving.policies_dir), runs, serving.address]
    return subprocess.Popen([sys.executable, *TORCHRUN, sys.executable, "-c", TRAINER, *arguments])


async def first_round(runs_dir: Path, trainer: "subprocess.Popen[bytes]") -> None:
    """Waits until a round of PPO has been written down."""
    deadline = time.monotonic() + 120
    while not any(line["phase"] == "ppo" for path in runs_dir.glob("*/metrics.jsonl") for line in lines(path)):
        assert time.monotonic() < deadline, "there was no round"
        assert trainer.poll() is None, "the trainer died"
        await asyncio.sleep(0.01)


@pytest.mark.timeout(300)  # vLLM starts four times
async def test_two_processes_make_one_version_although_one_of_them_was_killed(
    tmp_path: Path, tiny_folder: Path
) -> None:
    write_rankings(f"sqlite:///{tmp_path}/store.db", 16)
    async with policy_service(tmp_path, tiny_folder) as serving:
        killed = start_trainer(serving, tmp_path)
        await first_round(tmp_path / "runs", killed)
        ranks = psutil.Process(killed.pid).children()
        assert len(ranks) == 2
        ranks[1].kill()
        assert await asyncio.to_thread(killed.wait, 60) != 0
        assert not any(each.is_running() for each in ranks)

        trainer = start_trainer(serving, tmp_path)
        try:
            folder = await finished_run(tmp_path / "runs", trainer)
            async with grpc.aio.insecure_channel(serving.address) as channel:
                stub = policy_service_pb2_grpc.PolicyServiceStub(channel)
                live = (await stub.GetPolicy(policy_service_pb2.GetPolicyRequest(policy="live"))).policy
            ranks = psutil.Process(trainer.pid).children()
        finally:
            trainer.send_signal(signal.SIGTERM)
            await asyncio.to_thread(trainer.wait, 60)
    assert not any(each.is_running() for each in ranks)
    assert len(list((tmp_path / "runs").glob("*/recipe.json"))) == 1
    logged = lines(folder / "metrics.jsonl")
    assert [line["index"] for line in logged if line["phase"] == "ppo"] == [0, 1]
    assert logged[-1] == logged[-1] | {"phase": "done", "version": 2}
    assert len(lines(folder / "samples.jsonl")) > 0
    assert (live.version, live.manifest.parent_version) == (2, 1)
    assert verify_artifact(serving.policies_dir / "v2", serving.policies_dir / "v1") == live.manifest
    assert Cursor(tmp_path / "runs" / "rankings_seen").read() == 16
