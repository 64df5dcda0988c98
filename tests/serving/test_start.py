"""A server's start and its engine's life: without a bus, on a version that cannot be proved, with an engine that dies
or hangs, and stopped or killed before it is up.
"""

import asyncio
import os
import signal
import subprocess
import time
import uuid
from contextlib import closing
from pathlib import Path

import grpc
import pytest
from google.rpc.error_details_pb2 import RetryInfo

from alignd.v1 import events_pb2, policy_manifest_pb2
from alignd.v1.feedback_service_pb2 import SubmitRankingRequest
from alignd.v1.feedback_token_pb2 import FeedbackClaims
from alignd.v1.policy_service_pb2 import STAGE_LIVE, STAGE_REJECTED, GetPolicyRequest
from feedback.bus.topics import TOPICS
from feedback.bus.url import open_bus
from feedback.token import load_keyring, sign
from serving.bootstrap import imported_policy, register_first
from serving.config import ServingConfig
from serving.policy_log import PolicyLog
from serving.vllm_engine import EngineError
from serving.vllm_start import start_engine
from tests.serving.calls import (
    TIMEOUT_SECONDS,
    Stubs,
    detail,
    draw,
    groups,
    long_request,
    refused,
    sample_request,
)
from tests.serving.policy_events import STAGE_CANDIDATE, moved
from tests.serving.processes import (
    address_of,
    channel_of,
    end,
    engine_processes,
    environment,
    is_alive,
    is_serving,
    log_of,
    start,
    wait_serving,
    wait_until,
)
from tests.serving.rollout import get
from tests.serving.versions import write_version

pytestmark = pytest.mark.timeout(400)

FEEDBACK = "alignd.v1.FeedbackService"
HANG_SECONDS = 5


def shift_logprobs(manifest: policy_manifest_pb2.PolicyManifest) -> None:
    for probe in manifest.probes:
        probe.logprobs[:] = [logprob - 1 for logprob in probe.logprobs]


async def promote_unproved(folder: Path) -> None:
    """Makes version 2, whose probes are wrong, live while no server is there to try it."""
    root = folder / "var" / "policies"
    with closing(open_bus(f"sqlite:///{folder}/bus/bus.db")) as bus:
        bus.create_topics(TOPICS)
        policies = PolicyLog(bus)
        await policies.start()
        await register_first(imported_policy(root), policies)
        path, manifest = write_version(root, root / "v1", 2, change_manifest=shift_logprobs)
        registered = events_pb2.PolicyRegistered(manifest=manifest, artifact_uri=str(path))
        await policies.propose(events_pb2.PolicyEvent(registered=registered))
        await policies.propose(moved(2, STAGE_CANDIDATE, STAGE_LIVE))
        await policies.stop()


def token_of(folder: Path, *completion_ids: str) -> str:
    """Returns a feedback token of these completions, as a replica that has stopped since has given it to ada."""
    claims = FeedbackClaims(sample_id="a-sample", user_id="ada")
    claims.issue_time.GetCurrentTime()
    claims.expire_time.FromSeconds(claims.issue_time.seconds + 3600)
    for completion_id in completion_ids:
        claims.completions.add(completion_id=completion_id, policy_version=1)
    return sign(claims, load_keyring(folder / "var" / "feedback_keys"))


def rank(stubs: Stubs, token: str, *completion_ids: str) -> None:
    """Sends a ranking, which must be acknowledged."""
    request = SubmitRankingRequest(
        request_id=str(uuid.uuid4()), feedback_token=token, user_id="ada", groups=groups(*([i] for i in completion_ids))
    )
    assert stubs.feedback.SubmitRanking(request, timeout=20).ranking_id


def resources(pid: int) -> tuple[int, int, int]:
    """Returns how many threads, open files and pieces of shared memory a process has."""
    folder = Path("/proc", str(pid))
    shared = sum("/dev/shm" in line for line in (folder / "maps").read_text().splitlines())
    return len(list((folder / "task").iterdir())), len(list((folder / "fd").iterdir())), shared


def hurt_engine(process: subprocess.Popen[bytes], stubs: Stubs, address: str, number: int) -> float:
    """Sends the engine a signal while it writes, and waits until another serves. Returns when calls were refused."""
    (engine,) = engine_processes(process.pid)
    stream = stubs.inference.StreamSample(long_request(num_completions=2))
    next(stream)
    os.kill(engine, number)
    began = time.monotonic()
    with pytest.raises(grpc.RpcError) as raised:
        list(stream)
    lasted = time.monotonic() - began
    assert raised.value.code() is grpc.StatusCode.UNAVAILABLE
    error = refused(stubs.inference.Sample, sample_request(), grpc.StatusCode.UNAVAILABLE)
    assert detail(error, RetryInfo).retry_delay.seconds >= 1
    wait_until(lambda: not is_serving(address), 20, "health NOT_SERVING", process)
    assert is_serving(address, FEEDBACK)
    wait_until(lambda: is_serving(address), 120, "another engine", process)
    wait_until(lambda: not is_alive(engine), 20, "the end of the engine before")
    return lasted


def test_feedback_is_taken_without_a_bus_and_while_an_engine_that_dies_or_hangs_is_started_again(
    tmp_path: Path,
) -> None:
    settings = environment(
        tmp_path, bus=f"sqlite:///{tmp_path}/bus/bus.db", serving__engine_timeout_seconds=HANG_SECONDS
    )
    address = address_of(settings)
    (tmp_path / "var").mkdir(exist_ok=True)
    asyncio.run(promote_unproved(tmp_path))
    token = token_of(tmp_path, "a", "b")
    # The bus is away: its folder is none.
    (tmp_path / "bus").rename(tmp_path / "bus.away")
    (tmp_path / "bus").touch()
    process = start("serve", settings)
    try:
        wait_until(lambda: is_serving(address, FEEDBACK), 60, "feedback taken without a bus", process)
        with channel_of(settings) as channel:
            stubs = Stubs(channel)
            rank(stubs, token, "b", "a")
            refused(stubs.inference.Sample, sample_request(), grpc.StatusCode.UNAVAILABLE)
            refused(stubs.policies.GetPolicy, GetPolicyRequest(policy="live"), grpc.StatusCode.UNAVAILABLE)
            assert not is_serving(address) and not is_serving(address, "alignd.v1.PolicyService")
            (tmp_path / "bus").unlink()
            (tmp_path / "bus.away").rename(tmp_path / "bus")
            wait_until(lambda: is_serving(address, "alignd.v1.PolicyService"), 30, "the policy log read", process)
            wait_serving(process, settings)
            # It cannot prove the live version, and serves the one before.
            assert {each.policy.version for each in draw(stubs).completions} == {1}
            # It is tried once more, as any version that is made live, and then found wrong.
            wait_until(lambda: get(stubs, 2).stage == STAGE_REJECTED, 60, "v2 rejected", process)
            live, bad = (
                stubs.policies.GetPolicy(GetPolicyRequest(policy=name), timeout=TIMEOUT_SECONDS).policy
                for name in ("live", "v2")
            )
            assert (live.version, live.stage, bad.stage) == (1, STAGE_LIVE, STAGE_REJECTED)
            assert "differ from the trainer's" in bad.history[-1].reason
            hurt_engine(process, stubs, address, signal.SIGKILL)
            had = resources(process.pid)
            rank(stubs, token, "a", "b")
            assert hurt_engine(process, stubs, address, signal.SIGSTOP) < HANG_SECONDS + 5
            assert {each.policy.version for each in draw(stubs).completions} == {1}
            has = resources(process.pid)
        assert all(after <= before + 3 for before, after in zip(had, has, strict=True)), (had, has)
        (engine,) = engine_processes(process.pid)
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: not is_alive(engine), 20, "the end of the engine")


def test_an_engine_ends_with_a_server_that_is_killed_as_soon_as_it_has_come(tmp_path: Path) -> None:
    process = start("serve", environment(tmp_path))
    wait_until(lambda: bool(engine_processes(process.pid)), 120, "vLLM's process", process)
    engines = engine_processes(process.pid)
    time.sleep(0.2)
    assert all(is_alive(pid) for pid in engines)
    process.kill()
    process.wait()
    wait_until(lambda: not any(is_alive(pid) for pid in engines), 20, "the end of vLLM's process")


def test_compiling_is_refused_on_a_cpu(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"serving\.compile is for a GPU"):
        start_engine(tmp_path, ServingConfig(compile=True))


def test_a_stop_before_the_engine_is_up_does_not_wait_for_it(tmp_path: Path) -> None:
    settings = environment(tmp_path)
    process = start("serve", settings)
    wait_until(lambda: bool(engine_processes(process.pid)), 120, "vLLM's process", process)
    engines = engine_processes(process.pid)
    time.sleep(1)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    assert end(process) == 0, log_of("serve", settings).read_text()[-4000:]
    assert time.monotonic() - began < 20
    wait_until(lambda: not any(is_alive(pid) for pid in engines), 20, "the end of vLLM's process")
