"""A server on a version that cannot be proved, one that loses its engine, and one that is stopped before it is up."""

import asyncio
import os
import signal
import time
from contextlib import closing
from pathlib import Path

import grpc
import pytest

from alignd.v1 import events_pb2, policy_manifest_pb2
from alignd.v1.policy_service_pb2 import STAGE_LIVE, STAGE_REJECTED, GetPolicyRequest
from feedback.bus.topics import TOPICS
from feedback.bus.url import open_bus
from serving.bootstrap import import_first
from serving.config import ServingConfig
from serving.policy_log import PolicyLog
from serving.vllm_engine import EngineError, start_engine
from tests.serving.calls import TIMEOUT_SECONDS, Stubs, draw, refused, sample_request
from tests.serving.policy_events import STAGE_CANDIDATE, moved
from tests.serving.processes import (
    address_of,
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
from tests.serving.versions import write_version

pytestmark = pytest.mark.timeout(400)


def shift_logprobs(manifest: policy_manifest_pb2.PolicyManifest) -> None:
    for probe in manifest.probes:
        probe.logprobs[:] = [logprob - 1 for logprob in probe.logprobs]


async def promote_unproved(folder: Path, model: Path) -> None:
    """Makes version 2, whose probes are wrong, live while no server is there to try it."""
    root = folder / "var" / "policies"
    with closing(open_bus(f"sqlite:///{folder}/var/bus.db")) as bus:
        bus.create_topics(TOPICS)
        policies = PolicyLog(bus)
        await policies.start()
        await import_first(ServingConfig(initial_model=model), root, policies)
        path, manifest = write_version(root, root / "v1", 2, change_manifest=shift_logprobs)
        registered = events_pb2.PolicyRegistered(manifest=manifest, artifact_uri=str(path))
        await policies.propose(events_pb2.PolicyEvent(registered=registered))
        await policies.propose(moved(2, STAGE_CANDIDATE, STAGE_LIVE))
        await policies.stop()


def test_a_server_that_cannot_prove_the_live_version_serves_the_one_before_until_its_engine_dies(
    tmp_path: Path,
) -> None:
    settings = environment(tmp_path)
    (tmp_path / "var").mkdir()
    asyncio.run(promote_unproved(tmp_path, Path(settings["ALIGND_SERVING__INITIAL_MODEL"])))
    process = start("serve", settings)
    try:
        wait_until(lambda: is_serving(address_of(settings), "alignd.v1.PolicyService"), 60, "the port open", process)
        with grpc.insecure_channel(address_of(settings)) as channel:
            stubs = Stubs(channel)
            refused(stubs.inference.Sample, sample_request(), grpc.StatusCode.UNAVAILABLE)
            assert not is_serving(address_of(settings))
            wait_serving(process, settings)
            assert {each.policy.version for each in draw(stubs).completions} == {1}
            live, bad = (
                stubs.policies.GetPolicy(GetPolicyRequest(policy=name), timeout=TIMEOUT_SECONDS).policy
                for name in ("live", "v2")
            )
        assert (live.version, live.stage, bad.stage) == (1, STAGE_LIVE, STAGE_REJECTED)
        assert "differ from the trainer's" in bad.history[-1].reason
        # A server whose engine is gone ends, so that its supervisor starts it again.
        (engine,) = engine_processes(process.pid)
        os.kill(engine, signal.SIGKILL)
        assert process.wait(30) not in (0, None)
    finally:
        process.kill()
        process.wait()


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
    wait_until(lambda: not any(is_alive(pid) for pid in engines), 5, "the end of vLLM's process")
