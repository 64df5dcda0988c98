"""The client for asyncio. It differs from `Client` in nothing but `await`."""

from collections.abc import AsyncIterator, Sequence
from types import TracebackType
from typing import Any, Self

import grpc

from alignd.client import requests
from alignd.client.connection import MOST_ATTEMPTS, Connection
from alignd.client.errors import read_error
from alignd.client.requests import PromptLike, Ranking
from alignd.v1.feedback_service_pb2 import SubmitDemonstrationResponse, SubmitRankingResponse
from alignd.v1.feedback_service_pb2_grpc import FeedbackServiceStub
from alignd.v1.inference_service_pb2 import CompletionDelta, SampleResponse
from alignd.v1.inference_service_pb2_grpc import InferenceServiceStub
from alignd.v1.types_pb2 import SamplingParams


class AsyncClient:
    """Calls one alignd server from the event loop in which it was made; leave it by `async with`, or `close` it.

    Arguments and errors are those of `Client`.
    """

    def __init__(
        self,
        address: str = "localhost:50051",
        *,
        credentials: grpc.ChannelCredentials | None = None,
        api_key: str = "",
        timeout: float = 60.0,
        max_attempts: int = MOST_ATTEMPTS,
        validate: bool = False,
    ) -> None:
        self._connection = Connection(address, credentials, api_key, timeout, max_attempts, validate)
        options = self._connection.options()
        self._channel = (
            grpc.aio.insecure_channel(address, options)
            if credentials is None
            else grpc.aio.secure_channel(address, credentials, options)
        )
        self._inference: Any = InferenceServiceStub(self._channel)
        self._feedback: Any = FeedbackServiceStub(self._channel)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Ends the connection, and every call on it."""
        await self._channel.close()

    async def sample(
        self,
        prompt: PromptLike,
        *,
        user_id: str,
        num_completions: int = 4,
        sampling: SamplingParams | None = None,
        policy: str = "",
        return_token_ids: bool = False,
        timeout: float | None = None,
    ) -> SampleResponse:
        """Draws completions of a prompt, and returns them with the token to rank them by. See `Client.sample`."""
        request = requests.sample_request(prompt, user_id, num_completions, sampling, policy, return_token_ids)
        response: SampleResponse = await self._call(self._inference.Sample, request, timeout)
        return response

    async def stream(
        self,
        prompt: PromptLike,
        *,
        user_id: str,
        num_completions: int = 4,
        sampling: SamplingParams | None = None,
        policy: str = "",
        return_token_ids: bool = False,
        timeout: float | None = None,
    ) -> AsyncIterator[CompletionDelta | SampleResponse]:
        """Draws completions, yields their text as it is written, and last the sample. See `Client.stream`.

        To end the call early, iterate inside contextlib.aclosing: a loop that is left does not close its iterator.
        """
        request = requests.stream_request(prompt, user_id, num_completions, sampling, policy, return_token_ids)
        self._connection.check(request)
        call = self._inference.StreamSample(request, **self._connection.per_call(timeout))
        finished = False
        try:
            async for event in call:
                finished = event.WhichOneof("event") == "finished"
                for each in requests.read_event(event):
                    yield each
        except grpc.RpcError as error:
            raise read_error(error) from error
        finally:
            call.cancel()
        if not finished:
            raise requests.unfinished()

    async def rank(
        self,
        feedback_token: str,
        best_first: Ranking,
        *,
        user_id: str,
        shown: Sequence[str] = (),
        comment: str = "",
        request_id: str = "",
        timeout: float | None = None,
    ) -> SubmitRankingResponse:
        """Submits how a user ranks the completions of a sample. See `Client.rank`."""
        request = requests.ranking_request(feedback_token, best_first, user_id, shown, comment, request_id)
        response: SubmitRankingResponse = await self._call(self._feedback.SubmitRanking, request, timeout)
        return response

    async def demonstrate(
        self, feedback_token: str, text: str, *, user_id: str, request_id: str = "", timeout: float | None = None
    ) -> SubmitDemonstrationResponse:
        """Submits the completion that a user would have wanted. See `Client.demonstrate`."""
        request = requests.demonstration_request(feedback_token, text, user_id, request_id)
        response: SubmitDemonstrationResponse = await self._call(self._feedback.SubmitDemonstration, request, timeout)
        return response

    async def _call(self, method: Any, request: Any, timeout: float | None) -> Any:
        self._connection.check(request)
        try:
            return await method(request, **self._connection.per_call(timeout))
        except grpc.RpcError as error:
            raise read_error(error) from error
