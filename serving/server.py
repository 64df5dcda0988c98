"""One serving replica, put together: its services, its engine, and the order in which they start and stop.

To start, the port opens with health NOT_SERVING, the policy log is read, the engine loads and proves the live version,
and health turns SERVING. To stop, health turns NOT_SERVING, new calls are refused, calls in flight finish, and the
engine ends. Feedback is taken throughout, since it needs no engine.
"""

import asyncio
import logging
import multiprocessing
import signal
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from pathlib import Path

import grpc
from grpc_health.v1 import health as grpc_health
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from alignd.v1 import (
    feedback_service_pb2,
    feedback_service_pb2_grpc,
    inference_service_pb2,
    inference_service_pb2_grpc,
    policy_service_pb2,
    policy_service_pb2_grpc,
)
from feedback.bus.topics import TOPICS
from feedback.bus.url import open_bus
from feedback.config import FeedbackConfig
from feedback.outbox.door import Outbox
from feedback.token import load_keyring
from policies.location import artifact_folder
from policies.state import PolicyRecord
from serving.bootstrap import reject, startable_policy
from serving.boundary import Boundary
from serving.config import ServingConfig
from serving.feedback_service import FeedbackService
from serving.inference_service import InferenceService, Serving
from serving.policy_log import PolicyLog
from serving.policy_service import PolicyService
from serving.sampler import Quota
from serving.slot import Slot
from serving.swapper import ProofError, Swapper
from serving.vllm_engine import Engine, EngineError, start_engine

logger = logging.getLogger(__name__)

_ENGINE_SERVICES = ("", "alignd.v1.InferenceService")
_POLICY_SERVICE, _FEEDBACK_SERVICE = "alignd.v1.PolicyService", "alignd.v1.FeedbackService"
_HEALTH_CHECK_SECONDS = 2.0
_KILL_AGAIN_SECONDS = 0.2


@dataclass(frozen=True)
class Places:
    """Where a replica finds what it shares with other replicas, and where it keeps its own outbox."""

    bus_url: str
    outbox: Path
    keyring: Path
    policies: Path


async def serve(
    config: ServingConfig,
    feedback: FeedbackConfig,
    places: Places,
    on_listening: Callable[[int], None] = lambda port: None,
) -> None:
    """Serves until SIGTERM or SIGINT.

    Raises:
        EngineError: the engine is dead; the process must be started again.
    """
    bus = await asyncio.to_thread(open_bus, places.bus_url)
    await asyncio.to_thread(bus.create_topics, TOPICS)
    outbox = await asyncio.to_thread(Outbox, places.outbox, feedback.outbox_max_mib << 20)
    policies = PolicyLog(bus)
    serving = Serving(Slot(), policies, Quota(config.max_inflight_completions))
    keyring = load_keyring(places.keyring)
    server = grpc.aio.server(
        interceptors=[Boundary()],
        options=[("grpc.max_receive_message_length", config.max_message_mib << 20), ("grpc.so_reuseport", 0)],
    )
    inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(
        InferenceService(serving, outbox, keyring, config, feedback.token_ttl_seconds), server
    )
    feedback_service_pb2_grpc.add_FeedbackServiceServicer_to_server(FeedbackService(outbox, keyring), server)
    policy_service_pb2_grpc.add_PolicyServiceServicer_to_server(PolicyService(policies), server)
    health = await _add_standard_services(server)
    port = server.add_insecure_port(f"{config.host}:{config.port}")
    await server.start()
    logger.info("listening on %s:%d", config.host, port)
    on_listening(port)
    try:
        await _until_stopped(_run_engine(config, places, serving, health))
    finally:
        serving.accepting = False
        serving.slot.shut()
        await health.enter_graceful_shutdown()
        policies.end_watches()
        await server.stop(config.shutdown_grace_seconds)
        if serving.engine:
            serving.engine.shutdown()
        await policies.stop()
        await asyncio.to_thread(outbox.close)
        await asyncio.to_thread(bus.close)


async def _add_standard_services(server: grpc.aio.Server) -> grpc_health.aio.HealthServicer:
    """Adds reflection and health. Only feedback is SERVING at first."""
    health = grpc_health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(health, server)
    for name in (*_ENGINE_SERVICES, _POLICY_SERVICE):
        await health.set(name, health_pb2.HealthCheckResponse.NOT_SERVING)
    await health.set(_FEEDBACK_SERVICE, health_pb2.HealthCheckResponse.SERVING)
    names = [
        module.DESCRIPTOR.services_by_name[name].full_name
        for module, name in (
            (inference_service_pb2, "InferenceService"),
            (feedback_service_pb2, "FeedbackService"),
            (policy_service_pb2, "PolicyService"),
            (health_pb2, "Health"),
        )
    ]
    reflection.enable_server_reflection([*names, reflection.SERVICE_NAME], server)
    return health


async def _until_stopped(work: Coroutine[None, None, None]) -> None:
    """Runs `work` until it fails or a signal asks this process to end."""
    stopped = asyncio.Event()
    loop = asyncio.get_running_loop()
    for name in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(name, stopped.set)
    working = asyncio.ensure_future(work)
    stopping = asyncio.ensure_future(stopped.wait())
    done, _ = await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
    if working in done:
        working.result()
    for task in (working, stopping):
        task.cancel()
    await asyncio.gather(working, stopping, return_exceptions=True)


async def _run_engine(
    config: ServingConfig, places: Places, serving: Serving, health: grpc_health.aio.HealthServicer
) -> None:
    """Starts the engine on the live policy, and keeps it on whichever policy is live from then on."""
    await serving.policies.start()
    await health.set(_POLICY_SERVICE, health_pb2.HealthCheckResponse.SERVING)
    record = await startable_policy(config, places.policies, serving.policies)
    folder = artifact_folder(record.artifact_uri)
    logger.info("starting vLLM on v%d", record.manifest.version)
    engine = serving.engine = await _start_in_thread(folder, config)
    swapper = Swapper(
        engine,
        serving.slot,
        serving.policies,
        replica_id=config.replica_id,
        drain_timeout_seconds=config.drain_timeout_seconds,
        tolerance=config.probe_tolerance,
    )
    record = await _begin(swapper, record, config, places)
    serving.accepting = True
    for name in _ENGINE_SERVICES:
        await health.set(name, health_pb2.HealthCheckResponse.SERVING)
    logger.info("serving v%d", record.manifest.version)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(swapper.follow())
        tasks.create_task(_watch_engine(engine))


async def _begin(swapper: Swapper, record: PolicyRecord, config: ServingConfig, places: Places) -> PolicyRecord:
    """Opens the slot with `record`, on which the engine was started; if it cannot be proved, with the version before.

    Otherwise a version that was promoted while no replica could try it would keep every replica from starting.
    """
    while True:
        try:
            await swapper.begin(record)
        except (ProofError, EngineError) as error:
            # Raises if the engine is dead: that says nothing about the version.
            await swapper.engine.check_health()
            await reject(swapper.policies, record, str(error))
            record = await startable_policy(config, places.policies, swapper.policies)
            await swapper.engine.load_weights(artifact_folder(record.artifact_uri))
        else:
            return record


async def _start_in_thread(folder: Path, config: ServingConfig) -> Engine:
    """Starts the engine while the port answers. If the server is stopped meanwhile, the start is aborted."""
    starting = asyncio.ensure_future(asyncio.to_thread(start_engine, folder, config))
    try:
        return await asyncio.shield(starting)
    except asyncio.CancelledError:
        while not starting.done():
            # The start fails as soon as vLLM's process is gone.
            for process in multiprocessing.active_children():
                process.kill()
            await asyncio.wait({starting}, timeout=_KILL_AGAIN_SECONDS)
        if starting.exception() is None:
            starting.result().shutdown()
        raise


async def _watch_engine(engine: Engine) -> None:
    """Checks the engine until it dies, so that the process ends and is started again.

    Raises:
        EngineError: the engine is dead.
    """
    while True:
        await asyncio.sleep(_HEALTH_CHECK_SECONDS)
        await engine.check_health()
