"""One serving replica, put together: its services, its engine, and the order in which they start and stop.

To start, the port opens with health NOT_SERVING, the policy log is read as soon as the bus is up, the engine loads and
proves the live version, and health turns SERVING. To stop, health turns NOT_SERVING, new calls are refused, calls in
flight finish, and the engine ends. Feedback is taken throughout: it needs neither the engine nor the bus, and the
engine is started again beneath it (serving.engine_life).
"""

import asyncio
import logging
import signal
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import grpc
from grpc_health.v1 import health as grpc_health
from grpc_health.v1 import health_pb2, health_pb2_grpc

from alignd.v1 import (
    feedback_service_pb2,
    feedback_service_pb2_grpc,
    inference_service_pb2,
    inference_service_pb2_grpc,
    policy_service_pb2,
    policy_service_pb2_grpc,
)
from feedback.bus.later import LaterBus
from feedback.config import FeedbackConfig
from feedback.heartbeat import beat
from feedback.outbox.door import Outbox
from feedback.token import load_keyring
from serving.access.door import Door
from serving.access.keys import KeysFile
from serving.access.limits import Limits
from serving.boundary import Boundary
from serving.calls import CallLog
from serving.config import ServingConfig, host_and_port
from serving.engine_guard import EngineGuard
from serving.engine_life import EngineLife
from serving.feedback_service import FeedbackService
from serving.inference_service import InferenceService, Serving
from serving.listening import listen, options
from serving.policy_log import PolicyLog
from serving.policy_service import PolicyService
from serving.reflection import add_reflection
from serving.sampler import Quota
from serving.slot import Slot
from serving.streams import EndsStreams

logger = logging.getLogger(__name__)

_ENGINE_SERVICES = ("", "alignd.v1.InferenceService")
_POLICY_SERVICE, _FEEDBACK_SERVICE = "alignd.v1.PolicyService", "alignd.v1.FeedbackService"
_BEAT_SECONDS = 1.0


@dataclass(frozen=True)
class Places:
    """Where a replica finds what it shares with other replicas, and where it keeps its own outbox."""

    bus_url: str
    outbox: Path
    keyring: Path
    policies: Path
    api_keys: Path


async def serve(
    config: ServingConfig,
    feedback: FeedbackConfig,
    places: Places,
    on_listening: Callable[[int], None] = lambda port: None,
    is_wanted: Callable[[], bool] = lambda: True,
) -> None:
    """Serves until SIGTERM or SIGINT.

    Args:
        config: settings of the server and its engine.
        feedback: settings of the outbox and of tokens.
        places: where everything is.
        on_listening: is told the port.
        is_wanted: whether an imported version 1, which no log has yet, was made from the model that is configured.

    Raises:
        EngineError: the engine cannot be started, or dies again and again.
        KeysError: the file of API keys is none.
        ListenError: the port cannot be opened, or its certificate cannot be used.
        MissingError: something that vLLM needs of the machine is not there.
        NoPolicyError: there is no policy to serve.
        OutboxError: the outbox cannot be used.
    """
    bus = LaterBus(places.bus_url)
    outbox = await asyncio.to_thread(Outbox, places.outbox, feedback.outbox_max_mib << 20)
    policies = PolicyLog(bus)
    serving = Serving(Slot(), policies, Quota(config.max_inflight_completions))
    limits, streams = Limits(config.limits), EndsStreams()
    server = _make_server(config, feedback, places, serving, outbox, limits, streams)
    health = await _add_standard_services(server)
    port = listen(server, config)
    await server.start()
    logger.info("listening on %s", host_and_port(config.host, port))
    on_listening(port)
    guard = EngineGuard()
    try:
        await _until_stopped(_run(config, places, serving, guard, health, is_wanted))
    finally:
        serving.accepting = False
        serving.slot.shut()
        await health.enter_graceful_shutdown()
        policies.end_watches()
        await streams.end()
        await server.stop(config.shutdown_grace_seconds)
        if serving.engine:
            serving.engine.shutdown()
        guard.end()
        await limits.close()
        await policies.stop()
        await asyncio.to_thread(outbox.close)
        await asyncio.to_thread(bus.close)


def _make_server(
    config: ServingConfig,
    feedback: FeedbackConfig,
    places: Places,
    serving: Serving,
    outbox: Outbox,
    limits: Limits,
    streams: EndsStreams,
) -> grpc.aio.Server:
    """Returns the server with our services; each call passes the interceptors in this order."""
    keyring = load_keyring(places.keyring)
    feedback_service = FeedbackService(outbox, keyring, limits)
    server = grpc.aio.server(
        interceptors=[
            CallLog(logs_content=config.log_content),
            Door(KeysFile(places.api_keys), needs_key=config.needs_key),
            Boundary(config.stream_stall_seconds, {_FEEDBACK_SERVICE: feedback_service.check_token}),
            streams,
        ],
        options=options(config.max_message_mib),
    )
    inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(
        InferenceService(serving, outbox, keyring, limits, config, feedback.token_ttl_seconds), server
    )
    feedback_service_pb2_grpc.add_FeedbackServiceServicer_to_server(feedback_service, server)
    policy_service_pb2_grpc.add_PolicyServiceServicer_to_server(
        PolicyService(serving.policies, places.policies), server
    )
    return server


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
    add_reflection(names, server)
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


async def _run(
    config: ServingConfig,
    places: Places,
    serving: Serving,
    guard: EngineGuard,
    health: grpc_health.aio.HealthServicer,
    is_wanted: Callable[[], bool],
) -> None:
    """Does all that a replica does besides answering calls."""

    async def set_health(names: tuple[str, ...], is_serving: bool) -> None:
        status = health_pb2.HealthCheckResponse
        for name in names:
            await health.set(name, status.SERVING if is_serving else status.NOT_SERVING)

    async def beat_and_again() -> None:
        while True:
            beat()
            await asyncio.sleep(_BEAT_SECONDS)

    beating = asyncio.ensure_future(beat_and_again())
    try:
        await serving.policies.start()
        await set_health((_POLICY_SERVICE,), True)
        life = EngineLife(config, places.policies, serving, guard, partial(set_health, _ENGINE_SERVICES), is_wanted)
        await life.run()
    finally:
        beating.cancel()
