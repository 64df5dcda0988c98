"""The trainer as a process beside a real policy service and store, started, watched and killed."""

import asyncio
import json
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health, health_pb2_grpc

from alignd.v1 import policy_service_pb2_grpc
from feedback.bus.topics import TOPICS
from feedback.bus.url import open_bus
from serving.bootstrap import imported_policy, register_first
from serving.policy_log import PolicyLog
from serving.policy_service import PolicyService
from tests.first_version import write_first
from training.config import PpoConfig, RewardModelConfig, SftConfig, TrainingConfig

CONFIG = TrainingConfig(
    min_new_rankings=8,
    poll_seconds=0.1,
    min_win_rate=0.0,
    num_evaluation_prompts=8,
    completions_per_evaluation_prompt=3,
    num_probes=2,
    max_num_seqs=16,
    kv_cache_mib=64,
    reward_model=RewardModelConfig(num_layers=2, held_out_share=0.4, max_rankings=14),
    ppo=PpoConfig(
        num_rounds=2, prompts_per_round=4, rollouts_per_prompt=2, max_tokens=8, num_frozen_layers=1, num_minibatches=2
    ),
)

TRAINER = (
    "import sys; from pathlib import Path; from training.config import TrainingConfig; "
    "from policies.server_connection import ServerConnection; "
    "from training.loop import run_trainer; "
    "run_trainer(TrainingConfig.model_validate_json(sys.argv[1]), store_url=sys.argv[2], "
    "policies_dir=Path(sys.argv[3]), runs_dir=Path(sys.argv[4]), server=ServerConnection(sys.argv[5]))"
)

SFT = (
    "import sys; from pathlib import Path; from training.config import TrainingConfig; "
    "from policies.server_connection import ServerConnection; "
    "from training.loop import run_sft_once; "
    "print('made', run_sft_once(TrainingConfig.model_validate_json(sys.argv[1]), store_url=sys.argv[2], "
    "policies_dir=Path(sys.argv[3]), runs_dir=Path(sys.argv[4]), server=ServerConnection(sys.argv[5])))"
)


@dataclass(frozen=True)
class Serving:
    address: str
    policies_dir: Path


@asynccontextmanager
async def policy_service(folder: Path, model: Path) -> AsyncIterator[Serving]:
    """Serves the policy service, with the model live as version 1."""
    bus = open_bus(f"sqlite:///{folder}/bus.db")
    bus.create_topics(TOPICS)
    log = PolicyLog(bus)
    await log.start()
    write_first(folder / "policies", model)
    await register_first(imported_policy(folder / "policies"), log)
    server = grpc.aio.server()
    policy_service_pb2_grpc.add_PolicyServiceServicer_to_server(PolicyService(log, folder / "policies"), server)
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield Serving(f"127.0.0.1:{port}", folder / "policies")
    finally:
        await server.stop(0)
        await log.stop()
        bus.close()


def start_trainer(serving: Serving, folder: Path) -> "subprocess.Popen[bytes]":
    """Starts a trainer on the store and runs of this folder."""
    store_url, runs = f"sqlite:///{folder}/store.db", str(folder / "runs")
    arguments = [CONFIG.model_dump_json(), store_url, str(serving.policies_dir), runs, serving.address]
    return subprocess.Popen([sys.executable, "-c", TRAINER, *arguments])


def sft_command(serving: Serving, folder: Path) -> list[str]:
    """Returns the command that runs SFT once on the store and runs of this folder."""
    config = CONFIG.model_copy(
        update={"sft": SftConfig(num_epochs=2, batch_size=4, min_demonstrations=4, validation_share=0.4)}
    )
    store_url, runs = f"sqlite:///{folder}/store.db", str(folder / "runs")
    arguments = [config.model_dump_json(), store_url, str(serving.policies_dir), runs, serving.address]
    return [sys.executable, "-c", SFT, *arguments]


async def make_sft(serving: Serving, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs SFT to its end."""
    command = sft_command(serving, folder)
    return await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, check=False)


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def has_reached(phase: str, runs_dir: Path) -> bool:
    """Whether a run has written a line of this phase."""
    return any(line["phase"] == phase for path in runs_dir.glob("*/metrics.jsonl") for line in lines(path))


async def finished_run(runs_dir: Path, process: "subprocess.Popen[bytes]") -> Path:
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        for metrics in runs_dir.glob("*/metrics.jsonl"):
            if not (metrics.parent / "state").exists():  # the last thing that a run removes
                return metrics.parent
        assert process.poll() is None, "the trainer died"
        await asyncio.sleep(0.2)
    raise AssertionError("the run did not end in time")


async def killed_when(is_time: Callable[[], bool], process: "subprocess.Popen[bytes]") -> None:
    """Kills the trainer as soon as it is time."""
    deadline = time.monotonic() + 90
    try:
        while not is_time():
            assert time.monotonic() < deadline, "the run did not come as far"
            await asyncio.sleep(0.01)
    finally:
        process.kill()
        process.wait()
