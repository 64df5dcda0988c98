"""InferenceService: admits a request, draws its completions, makes the sample durable, and answers."""

import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import grpc

from alignd.v1 import events_pb2, inference_service_pb2, inference_service_pb2_grpc
from feedback.bus.topics import SAMPLES
from feedback.outbox.door import Outbox
from feedback.token import Keyring
from serving import sampler
from serving.config import ServingConfig
from serving.errors import Refusal, unavailable
from serving.policy_log import PolicyLog
from serving.recording import record
from serving.sampler import Draft, Quota, Request
from serving.slot import Slot
from serving.vllm_engine import Engine, EngineError

# The five tries of alignd.client, this far apart, outlast an engine's start.
_START_RETRY_SECONDS = 5.0


@dataclass
class Serving:
    """What the replica serves with. `accepting` is true from the proof of its engine until it drains."""

    slot: Slot
    policies: PolicyLog
    quota: Quota
    engine: Engine | None = None
    accepting: bool = False


class InferenceService(inference_service_pb2_grpc.InferenceServiceServicer):
    """The handlers of both RPCs, which differ only in what they send before the end."""

    def __init__(
        self, serving: Serving, outbox: Outbox, keyring: Keyring, config: ServingConfig, token_ttl_seconds: float
    ) -> None:
        self.serving = serving
        self.outbox = outbox
        self.keyring = keyring
        self.config = config
        self.token_ttl_seconds = token_ttl_seconds

    async def Sample(
        self, request: inference_service_pb2.SampleRequest, context: Any
    ) -> inference_service_pb2.SampleResponse:
        """Draws completions and returns them all."""
        async for event in self._draw(request, interval_seconds=None):
            if event.WhichOneof("event") == "finished":
                return event.finished
        raise AssertionError("a draw ends with `finished`")

    async def StreamSample(
        self, request: inference_service_pb2.StreamSampleRequest, context: Any
    ) -> AsyncIterator[inference_service_pb2.StreamSampleResponse]:
        """Draws completions and streams their text."""
        async for event in self._draw(request, interval_seconds=self.config.stream_interval_seconds):
            yield event

    async def _draw(
        self, request: Request, interval_seconds: float | None
    ) -> AsyncIterator[inference_service_pb2.StreamSampleResponse]:
        engine = self.serving.engine
        if engine is None or not self.serving.accepting:
            raise unavailable(
                "NOT_SERVING",
                "the server is starting or stopping; wait for its health to be SERVING",
                _START_RETRY_SECONDS,
            )
        planned = sampler.plan(request, engine, self.config.default_max_tokens)
        sample_id = uuid.uuid4().hex
        self.serving.quota.take(request.num_completions)
        try:
            async with self.serving.slot.hold() as hold:
                self._check_policy(request.policy, hold.policy.version)
                yield inference_service_pb2.StreamSampleResponse(
                    started=inference_service_pb2.SampleStarted(sample_id=sample_id)
                )
                drafts = [Draft() for _ in range(request.num_completions)]
                async for deltas in sampler.write(engine, planned, sample_id, hold, drafts, interval_seconds):
                    yield inference_service_pb2.StreamSampleResponse(deltas=deltas)
                completions = sampler.as_completions(sample_id, hold, drafts)
        except EngineError as error:
            raise unavailable("ENGINE_FAILED", "the engine failed; it is being restarted", 10.0) from error
        finally:
            self.serving.quota.give_back(request.num_completions)
        token, expires = sampler.sign(self.keyring, sample_id, request.user_id, completions, self.token_ttl_seconds)
        await self._record(request, sample_id, completions)
        yield inference_service_pb2.StreamSampleResponse(
            finished=inference_service_pb2.SampleResponse(
                sample_id=sample_id,
                completions=completions,
                feedback_token=token,
                feedback_expire_time=expires,
                num_prompt_tokens=len(planned.token_ids),
            )
        )

    def _check_policy(self, selector: str, served_version: int) -> None:
        """Checks that a request asks for the version that is served.

        Raises:
            Refusal: NOT_FOUND if the version does not exist, FAILED_PRECONDITION if it is not loaded.
        """
        if selector in ("", "live", f"v{served_version}"):
            return
        metadata = {"policy": selector, "served": f"v{served_version}"}
        if int(selector[1:]) not in self.serving.policies.state.policies:
            raise Refusal(grpc.StatusCode.NOT_FOUND, "NO_SUCH_POLICY", f"there is no {selector}", metadata=metadata)
        raise Refusal(
            grpc.StatusCode.FAILED_PRECONDITION,
            "POLICY_NOT_SERVED",
            f"{selector} is not loaded; this server serves v{served_version}",
            metadata=metadata,
        )

    async def _record(self, request: Request, sample_id: str, completions: list[Any]) -> None:
        """Writes the sample to the outbox, so that its ranking can be learned from whichever process dies next."""
        event = events_pb2.SampleEvent(
            event_id=sample_id,
            user_id=request.user_id,
            prompt=request.prompt,
            sampling=request.sampling,
            completions=completions,
        )
        await record(self.outbox, SAMPLES, sample_id, event)
