"""InferenceService: admits a request, draws its completions, makes the sample durable, and answers."""

import asyncio
import logging
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from alignd.v1 import events_pb2, inference_service_pb2, inference_service_pb2_grpc, types_pb2
from feedback.bus.topics import SAMPLES
from feedback.outbox.door import Outbox, OutboxError, RequestKey
from feedback.token import Keyring
from serving import sampler
from serving.access.callers import caller
from serving.access.limits import Limits
from serving.calls import note, note_content
from serving.config import ServingConfig
from serving.errors import Refusal, bad_field, shortened, unavailable
from serving.forms import check_form
from serving.idempotency import Retries, request_key, to_the_end
from serving.logprobs import as_logprobs, check_logprobs, check_prompt_logprobs
from serving.policy_log import PolicyLog
from serving.recording import check_room, record
from serving.sampler import Draft, Plan, Quota, Request
from serving.slot import Slot
from serving.tokenising import Tokenising, check_bytes
from serving.unread import Unread
from serving.vllm_engine import BadFormError, Engine, EngineError

logger = logging.getLogger(__name__)

# The five tries of alignd.client, this far apart, outlast an engine's start.
_START_RETRY_SECONDS = 5.0
# A token has 3 to 4 characters as a rule, and a number. If it has more, the sample is refused when it is recorded.
_BYTES_A_TOKEN = 12


@dataclass
class Serving:
    """What the replica serves with. `accepting` is true from the proof of its engine until it drains."""

    slot: Slot
    policies: PolicyLog
    quota: Quota
    engine: Engine | None = None
    accepting: bool = False


class InferenceService(inference_service_pb2_grpc.InferenceServiceServicer):
    """The handlers; the two that draw differ only in what they send before the end."""

    def __init__(
        self,
        serving: Serving,
        outbox: Outbox,
        keyring: Keyring,
        limits: Limits,
        config: ServingConfig,
        token_ttl_seconds: float,
    ) -> None:
        self.serving = serving
        self.outbox = outbox
        self.keyring = keyring
        self.limits = limits
        self.config = config
        self.token_ttl_seconds = token_ttl_seconds
        self._tokenising = Tokenising()
        self._retries = Retries(outbox, token_ttl_seconds)

    async def Sample(
        self, request: inference_service_pb2.SampleRequest, context: Any
    ) -> inference_service_pb2.SampleResponse:
        """Draws completions and returns them all."""
        return await self._draw(request, None)

    async def StreamSample(
        self, request: inference_service_pb2.StreamSampleRequest, context: Any
    ) -> AsyncIterator[inference_service_pb2.StreamSampleResponse]:
        """Draws completions and streams their text, at most every `stream_interval_seconds`.

        They are drawn in a task of their own, which no client can hold up by not reading.
        """
        unread = Unread()
        drawing = asyncio.ensure_future(self._draw(request, unread))
        drawing.add_done_callback(lambda _: unread.end())
        try:
            while not drawing.done():
                await unread.wait()
                for message in unread.take():
                    yield message
                await asyncio.wait({drawing}, timeout=self.config.stream_interval_seconds)
            for message in unread.take():
                yield message
            yield inference_service_pb2.StreamSampleResponse(finished=drawing.result())
        finally:
            drawing.cancel()
            await asyncio.wait({drawing})

    async def ListModels(
        self, request: inference_service_pb2.ListModelsRequest, context: Any
    ) -> inference_service_pb2.ListModelsResponse:
        """Lists what a request may name."""
        served = self.serving.slot.policy if self.serving.accepting else None
        record = self.serving.policies.state.policies.get(served.version) if served else None
        if not served or not record:
            return inference_service_pb2.ListModelsResponse()
        made = record.manifest.create_time
        names = ("live", f"v{served.version}")
        models = [inference_service_pb2.Model(name=name, policy=served, create_time=made) for name in names]
        return inference_service_pb2.ListModelsResponse(models=models)

    async def _draw(self, request: Request, unread: Unread | None) -> inference_service_pb2.SampleResponse:
        """Draws completions, and returns them when they can be ranked. Their text goes to `unread` as it is written."""
        engine = self.serving.engine
        if engine is None or not self.serving.accepting:
            raise unavailable(
                "NOT_SERVING",
                "the server is stopping, or its engine is starting; wait for its health to be SERVING",
                _START_RETRY_SECONDS,
            )
        await self.limits.request(caller(), request.user_id, "sample")
        stored = request.store if request.HasField("store") else True
        if request.sampling.ignore_eos and stored:
            why = "goes with store = false, since nothing can be learned from what follows an end"
            raise bad_field("sampling.ignore_eos", why)
        if request.request_id and not stored:
            raise bad_field("request_id", "goes with a sample that is stored: leave it or store = false out")
        check_prompt_logprobs(request, stored=stored)
        named = request_key(request, caller().application)
        try:
            async with self._retries.first(named) as earlier:
                if not earlier:
                    return await self._draw_new(engine, request, named, unread, stored=stored)
                if unread:
                    unread.start(earlier.event_id)
                return self._answer(request, earlier, earlier.completions, earlier.prompt_token_ids)
        except OutboxError as error:
            raise unavailable("OUTBOX_FAILED", f"it cannot be read: {error}") from error

    async def _draw_new(
        self, engine: Engine, request: Request, named: RequestKey | None, unread: Unread | None, *, stored: bool
    ) -> inference_service_pb2.SampleResponse:
        sample_id = uuid.uuid4().hex
        check_form(request.sampling.structured)
        check_bytes(request.prompt, engine.tokenizer, engine.max_model_len - 1)
        planned = await self._tokenising.run(
            request.prompt.ByteSize(), sampler.plan, request, engine, self.config.default_max_tokens
        )
        check_logprobs(planned.draw, len(planned.token_ids))
        if stored:
            await check_room(self.outbox, _longest_event_bytes(request, planned))
        if engine is not self.serving.engine:
            # It failed while this request waited. It would only take the place of others, for as long as a start takes.
            raise _engine_failed()
        completions, read = await self._write(engine, request, planned, sample_id, unread)
        event = sampler.as_event(
            request, caller().application, sample_id, completions, planned, engine.tokenizer_digest
        )
        answer = self._answer(request, event, completions, planned.token_ids)
        note(sample_id=sample_id, num_completions=len(completions))
        if stored:
            note_content(prompt=str(request.prompt), completions=[each.text for each in completions])
            # Durable first, so that its ranking can be learned from whichever process dies next.
            recording = record(self.outbox, self.keyring, SAMPLES, sample_id, event, named)
            await to_the_end(asyncio.ensure_future(recording))
        else:
            answer.ClearField("feedback_token")
            answer.ClearField("feedback_expire_time")
        answer.prompt_logprobs.extend(read)
        return answer

    def _answer(
        self,
        request: Request,
        event: events_pb2.SampleEvent,
        completions: Sequence[types_pb2.Completion],
        prompt_token_ids: Sequence[int],
    ) -> inference_service_pb2.SampleResponse:
        """Returns a sample as its caller gets it, with a token to rank it by."""
        drawn_at = event.event_time if event.HasField("event_time") else None
        token, expires = sampler.sign(
            self.keyring, event.event_id, event.application, event.user_id, completions, self.token_ttl_seconds,
            drawn_at,
        )  # fmt: skip
        asked = request.return_token_ids
        return inference_service_pb2.SampleResponse(
            sample_id=event.event_id,
            completions=completions if asked else sampler.without_token_ids(completions),
            feedback_token=token,
            feedback_expire_time=expires,
            num_prompt_tokens=len(prompt_token_ids),
            prompt_token_ids=prompt_token_ids if asked else (),
        )

    async def _write(
        self, engine: Engine, request: Request, planned: Plan, sample_id: str, unread: Unread | None
    ) -> tuple[list[types_pb2.Completion], list[types_pb2.TokenLogprob]]:
        """Writes the completions, within the limits of who asks and of the replica.

        With them it returns the log-probabilities of the prompt's tokens, if they were asked for.
        """
        who, count = caller(), request.num_completions
        drafts = [Draft() for _ in range(count)]
        reserved = await self.limits.reserve(
            who, request.user_id, len(planned.token_ids) + count * planned.draw.max_tokens
        )
        reserved.used = 0
        try:
            with (
                self.limits.in_flight(who, request.user_id, count),
                self.serving.quota.taken_for(count, request.priority),
            ):
                async with self.serving.slot.hold() as hold:
                    self._check_policy(request.policy, hold.policy.version)
                    if unread:
                        unread.start(sample_id)
                    reserved.used = reserved.num_tokens
                    await sampler.write(engine, planned, sample_id, hold, drafts, unread.add if unread else None)
                    # The prompt was read for all of them at once.
                    reserved.used = len(planned.token_ids) + sum(len(draft.token_ids) for draft in drafts)
                    completions = sampler.as_completions(sample_id, hold, drafts, engine.token_text)
                    return completions, as_logprobs(drafts[0].prompt_logprobs, engine.token_text)
        except BadFormError as error:
            # Nothing was drawn.
            reserved.used = 0
            raise bad_field("sampling.structured", shortened(str(error))) from error
        except EngineError as error:
            logger.warning("sample %s failed: %s", sample_id, error)
            raise _engine_failed() from error
        finally:
            # What is cancelled has taken the engine's time all the same: only an end gives back what it left.
            self.limits.settle(reserved)

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


def _engine_failed() -> Refusal:
    return unavailable("ENGINE_FAILED", "the engine failed; it is being restarted", 10.0)


def _longest_event_bytes(request: Request, planned: Plan) -> int:
    """Returns about how many bytes the sample's event will have if no completion ends by itself."""
    num_tokens = len(planned.token_ids) + planned.draw.num_completions * planned.draw.max_tokens
    return request.ByteSize() + num_tokens * _BYTES_A_TOKEN
