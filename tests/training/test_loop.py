"""The trainer as a process beside a real policy service and store: rankings in, a live policy version out."""

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import cast

import grpc
import pytest
from grpc_health.v1 import health, health_pb2_grpc

from alignd.v1 import events_pb2, policy_service_pb2, policy_service_pb2_grpc, types_pb2
from feedback.bus.contract import Delivered, Position
from feedback.bus.topics import DEMONSTRATIONS, RANKINGS, SAMPLES, TOPICS
from feedback.bus.url import open_bus
from feedback.store.ledger import Ledger, Offset
from policies.artifact import verify_artifact
from serving.bootstrap import import_first
from serving.config import ServingConfig
from serving.policy_log import PolicyLog
from serving.policy_service import PolicyService
from training.config import PpoConfig, RewardModelConfig, SftConfig, TrainingConfig
from training.data.dataset import is_held_out
from training.loop import Cursor, is_due, last_began
from training.runs.folder import SFT_SUFFIX, RunFolder

CONFIG = TrainingConfig(
    min_new_rankings=12,
    poll_seconds=0.1,
    lease_seconds=3.0,  # after a trainer was killed, the next one waits this long
    min_win_rate=0.0,
    num_evaluation_prompts=8,
    num_probes=2,
    max_num_seqs=16,
    kv_cache_mib=64,
    reward_model=RewardModelConfig(num_layers=2, held_out_share=0.4, max_rankings=14),
    ppo=PpoConfig(num_rounds=2, prompts_per_round=4, rollouts_per_prompt=2, max_tokens=8, num_frozen_layers=1),
)
TRAINER = (
    "import sys; from pathlib import Path; from training.config import TrainingConfig; "
    "from training.loop import run_trainer; "
    "run_trainer(TrainingConfig.model_validate_json(sys.argv[1]), store_url=sys.argv[2], "
    "policies_dir=Path(sys.argv[3]), runs_dir=Path(sys.argv[4]), serving_address=sys.argv[5])"
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
    await import_first(ServingConfig(initial_model=model), folder / "policies", log)
    server = grpc.aio.server()
    policy_service_pb2_grpc.add_PolicyServiceServicer_to_server(PolicyService(log), server)
    health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), server)
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    yield Serving(f"127.0.0.1:{port}", folder / "policies")
    await server.stop(0)
    await log.stop()
    bus.close()


@pytest.fixture
async def serving(tmp_path: Path, tiny_folder: Path) -> AsyncIterator[Serving]:
    async with policy_service(tmp_path, tiny_folder) as found:
        yield found


def write_rankings(store_url: str, count: int) -> None:
    """Writes rankings of four completions each, by four users who prefer the longer, and samples that nobody ranked.

    One of these samples has a held-out prompt, and one is for a held-out user.
    """
    batch, prompts = [], []
    for index in range(count):
        user, sample_id = f"user-{index % 4}", f"s{index}"
        texts = [" ".join(["in the garden"] * (n + 1)) for n in range(4)]
        completions = [
            types_pb2.Completion(
                completion_id=f"{sample_id}-{n}", index=n, text=text, finish_reason=types_pb2.FINISH_REASON_STOP,
                policy=types_pb2.PolicyRef(version=1, weight_digest="0" * 64),
            )
            for n, text in enumerate(texts)
        ]  # fmt: skip
        message = types_pb2.Message(role=types_pb2.ROLE_USER, content=f"What is number {index}?")
        prompt = types_pb2.Prompt(chat=types_pb2.Chat(messages=[message]))
        prompts.append(prompt)
        sample = events_pb2.SampleEvent(event_id=sample_id, user_id=user, prompt=prompt, completions=completions)
        groups = [types_pb2.RankingGroup(completion_ids=[f"{sample_id}-{n}"]) for n in (3, 2, 1, 0)]
        ranking = events_pb2.RankingEvent(event_id=f"r{index}", user_id=user, sample_id=sample_id, groups=groups)
        for topic, event in ((SAMPLES, sample), (RANKINGS, ranking)):
            event.event_time.FromSeconds(1_700_000_000 + index)
            batch.append(
                Delivered(Position(topic, 0, index), sample_id.encode(), event.SerializeToString(), event.event_id)
            )
    learned, held_out = (
        next(index for index in range(4) if is_held_out(f"user-{index}", 0.4) == side) for side in (False, True)
    )
    for index, (first, user) in enumerate([(learned, learned), (held_out, learned), (learned, held_out)]):
        unranked = events_pb2.SampleEvent(
            event_id=f"unranked {index}", user_id=f"user-{user}", prompt=prompts[first], completions=completions[:2]
        )
        unranked.event_time.FromSeconds(1_700_000_040)
        place = Position(SAMPLES, 0, count + index)
        batch.append(Delivered(place, b"unranked", unranked.SerializeToString(), unranked.event_id))
    ledger = Ledger(store_url)
    after = {(SAMPLES, 0): Offset("log", count + 3), (RANKINGS, 0): Offset("log", count)}
    ledger.write(batch, ledger.offsets(), after)
    ledger.close()


def start_trainer(serving: Serving, folder: Path) -> "subprocess.Popen[bytes]":
    """Starts a trainer on the store and runs of this folder."""
    store_url, runs = f"sqlite:///{folder}/store.db", str(folder / "runs")
    arguments = [CONFIG.model_dump_json(), store_url, str(serving.policies_dir), runs, serving.address]
    return subprocess.Popen([sys.executable, "-c", TRAINER, *arguments])


@pytest.fixture
def trainer(serving: Serving, tmp_path: Path) -> Iterator["subprocess.Popen[bytes]"]:
    write_rankings(f"sqlite:///{tmp_path}/store.db", 16)
    process = start_trainer(serving, tmp_path)
    yield process
    process.kill()
    process.wait()


def lines(path: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


async def finished_run(runs_dir: Path, process: "subprocess.Popen[bytes]") -> Path:
    deadline = time.monotonic() + 100
    while time.monotonic() < deadline:
        for metrics in runs_dir.glob("*/metrics.jsonl"):
            if not (metrics.parent / "state").exists():  # the last thing that a run removes
                return metrics.parent
        assert process.poll() is None, "the trainer died"
        await asyncio.sleep(0.2)
    raise AssertionError("the run did not end in time")


@pytest.mark.timeout(400)  # vLLM starts four times
async def test_rankings_become_a_live_policy_and_demonstrations_a_reference(
    serving: Serving, trainer: "subprocess.Popen[bytes]", tmp_path: Path
) -> None:
    folder = await finished_run(tmp_path / "runs", trainer)
    logged = lines(folder / "metrics.jsonl")
    assert logged[-1] == logged[-1] | {"phase": "done", "version": 2}
    steps = [line for line in logged if line["phase"] == "ppo"]
    assert [line["index"] for line in steps] == [0, 1]
    assert {"objective/kl", "objective/score", "policy/clipfrac", "completion/eos_rate"} <= steps[0].keys()
    assert TrainingConfig.model_validate_json((folder / "recipe.json").read_text()) == CONFIG
    assert set(lines(folder / "samples.jsonl")[0]) == {"prompt", "before", "after"}

    (unsure,) = lines(folder / "label_next.jsonl")
    assert (unsure["sample_id"], len(cast(str, unsure["completions"]))) == ("unranked 0", 2)

    async with grpc.aio.insecure_channel(serving.address) as channel:
        stub = policy_service_pb2_grpc.PolicyServiceStub(channel)
        live = (await stub.GetPolicy(policy_service_pb2.GetPolicyRequest(policy="live"))).policy
    assert (live.version, live.manifest.parent_version, live.manifest.reference_version) == (2, 1, 1)
    manifest = verify_artifact(serving.policies_dir / "v2", serving.policies_dir / "v1")
    assert manifest == live.manifest
    # Of the sixteen, the two oldest are more than `max_rankings`.
    learned = [index for index in range(2, 16) if not is_held_out(f"user-{index % 4}", 0.4)]
    assert 0 < manifest.training.num_rankings == len(learned) < 14
    (ranges,) = manifest.training.rankings
    assert (ranges.topic, ranges.first_offset, ranges.last_offset) == (RANKINGS, learned[0], learned[-1])
    assert len(manifest.probes) == 2
    won, kl = manifest.evaluations
    assert (won.count, kl.count) == (8, 8)
    assert abs(kl.value - float(cast(float, steps[-1]["objective/kl"]))) < 1

    assert "version 2" in (folder / "REPORT.html").read_text()
    assert not (folder / "state").exists()
    assert json.loads((folder / "manifest.json").read_text())["version"] == 2

    trainer.send_signal(signal.SIGTERM)
    assert trainer.wait(20) == 0
    assert Cursor(tmp_path / "runs" / "rankings_seen").read() == 16

    # By the run's reward model SFT can choose an epoch.
    tuned = await tuned_after_kills(serving, tmp_path)
    assert tuned.stage == policy_service_pb2.STAGE_CANDIDATE
    assert (tuned.manifest.parent_version, tuned.manifest.reference_version) == (1, 3)
    assert tuned.manifest.training.algorithm == "sft"
    assert tuned.manifest.weight_digest != live.manifest.weight_digest
    newest = max((tmp_path / "runs").glob("*/metrics.jsonl"))
    assert [line["phase"] for line in lines(newest)] == ["sft_reference", "sft", "sft", "register", "done"]
    left = {path.name for path in newest.parent.iterdir()}
    assert left == {"recipe.json", "metrics.jsonl", "samples.jsonl", "manifest.json", "REPORT.html", "tensorboard"}
    page = (newest.parent / "REPORT.html").read_text()
    assert "Version 3 is the reference policy fine-tuned on demonstrations, epoch" in page
    assert "Where version 3 comes from" in page

    # The run that was killed made version 3; one that is not killed makes the same weights.
    done = await make_sft(serving, tmp_path)
    assert "made 4" in done.stdout, done.stderr
    assert verify_artifact(serving.policies_dir / "v4").weight_digest == tuned.manifest.weight_digest
    assert len(list((tmp_path / "runs").glob(f"*{SFT_SUFFIX}"))) == 2


async def tuned_after_kills(serving: Serving, folder: Path) -> policy_service_pb2.Policy:
    """Returns version 3, made by SFT that was killed before its first epoch, and again after it."""
    write_demonstrations(f"sqlite:///{folder}/store.db", 16)
    for phase in ("sft_reference", "sft"):
        await killed_when(partial(has_reached, phase, folder / "runs"), subprocess.Popen(sft_command(serving, folder)))
        await asyncio.sleep(CONFIG.lease_seconds)
    done = await make_sft(serving, folder)
    assert "made 3" in done.stdout, done.stderr
    async with grpc.aio.insecure_channel(serving.address) as channel:
        stub = policy_service_pb2_grpc.PolicyServiceStub(channel)
        found: policy_service_pb2.Policy = (
            await stub.GetPolicy(policy_service_pb2.GetPolicyRequest(policy="v3"))
        ).policy
    return found


SFT = (
    "import sys; from pathlib import Path; from training.config import TrainingConfig; "
    "from training.loop import run_sft_once; "
    "print('made', run_sft_once(TrainingConfig.model_validate_json(sys.argv[1]), store_url=sys.argv[2], "
    "policies_dir=Path(sys.argv[3]), runs_dir=Path(sys.argv[4]), serving_address=sys.argv[5]))"
)


def write_demonstrations(store_url: str, count: int) -> None:
    """Writes demonstrations of the store's samples, and of one whose prompt is too long for the engine."""
    held_out = next(index for index in range(4) if is_held_out(f"user-{index}", 0.4))
    long = events_pb2.SampleEvent(
        event_id=f"s{count}", user_id=f"user-{held_out}", prompt=types_pb2.Prompt(text="why " * 400)
    )
    long.event_time.FromSeconds(1_700_000_050)
    batch = [Delivered(Position(SAMPLES, 0, count + 3), b"long", long.SerializeToString(), long.event_id)]
    for index in (*range(count), count):
        user = index % 4 if index < count else held_out
        event = events_pb2.DemonstrationEvent(
            event_id=f"d{index}", user_id=f"user-{user}", sample_id=f"s{index}", text="in the garden, with soil"
        )
        event.event_time.FromSeconds(1_700_000_100 + index)
        position = Position(DEMONSTRATIONS, 0, index)
        batch.append(Delivered(position, event.sample_id.encode(), event.SerializeToString(), event.event_id))
    ledger = Ledger(store_url)
    after = {(SAMPLES, 0): Offset("log", count + 4), (DEMONSTRATIONS, 0): Offset("log", count + 1)}
    ledger.write(batch, ledger.offsets(), after)
    ledger.close()


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


def has_reached(phase: str, runs_dir: Path) -> bool:
    """Whether a run has written a line of this phase."""
    return any(line["phase"] == phase for path in runs_dir.glob("*/metrics.jsonl") for line in lines(path))


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


HOUR = 3600.0


@pytest.mark.parametrize(
    ("triggers", "num_new", "oldest_new", "last_began", "due"),
    [
        ({}, 11, 0.0, None, False),
        ({}, 12, 0.0, None, True),
        ({"max_wait_seconds": HOUR}, 1, 0.5 * HOUR, None, True),
        ({"max_wait_seconds": HOUR}, 1, 1.5 * HOUR, None, False),
        ({"max_wait_seconds": HOUR}, 0, None, None, False),
        ({"run_every_seconds": HOUR}, 1, 1.9 * HOUR, 0.9 * HOUR, True),
        ({"run_every_seconds": HOUR}, 1, 0.1 * HOUR, 1.1 * HOUR, False),
        ({"run_every_seconds": HOUR}, 1, 0.1 * HOUR, None, True),
        ({"run_every_seconds": HOUR}, 0, None, None, False),
    ],
)
def test_a_run_is_due_by_count_by_age_or_by_the_clock(
    triggers: dict[str, float], num_new: int, oldest_new: float | None, last_began: float | None, due: bool
) -> None:
    config = CONFIG.model_copy(update=triggers)
    found = is_due(config, num_new=num_new, oldest_new=oldest_new, last_began=last_began, now=2 * HOUR)
    assert found == due


def test_the_clock_runs_from_the_last_run_on_rankings_whatever_sft_did_since(tmp_path: Path) -> None:
    assert last_began(tmp_path) is None
    for name, began in (("1", 100), ("2", 200), (f"3{SFT_SUFFIX}", 300)):
        folder = RunFolder.create(tmp_path, name, CONFIG, origin=None)
        os.utime(folder.path / "recipe.json", (began, began))
    assert last_began(tmp_path) == 200
