"""The client for code with threads, or with neither threads nor an event loop."""

from collections.abc import Iterator, Sequence
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


class Client:
    """Calls one alignd server. Threads may share it; leave it by `with`, or `close` it.

    Args:
        address: host:port of the server.
        credentials: turns TLS on, such as grpc.ssl_channel_credentials(). None sends everything in the clear.
        api_key: sent with each call as a bearer token; in the clear only to this machine itself.
        timeout: seconds that a call may take, all its tries together.
        max_attempts: how often a call is tried, 1 to 5, while the server is unavailable or at its limit.
        validate: checks each request by the contract's rules before it is sent; needs alignd-client[validate].

    Raises:
        ValueError: the API key would go to another machine in the clear, or a number is out of range.
        ImportError: `validate` is asked for without protovalidate.
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
            grpc.insecure_channel(address, options)
            if credentials is None
            else grpc.secure_channel(address, credentials, options)
        )
        self._inference: Any = InferenceServiceStub(self._channel)
        self._feedback: Any = FeedbackServiceStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Ends the connection, and every call on it."""
        self._channel.close()

    def sample(
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
        """Draws completions of a prompt, and returns them with the token to rank them by.

        Args:
            prompt: what the user says; or the conversation, as messages with role and content; or a Prompt. If its last
                message is the assistant's, completions continue that.
            user_id: the user on whose behalf you ask, by name or pseudonym.
            num_completions: how many, 1 to 16; a ranking needs at least 2.
            sampling: temperature, max_tokens and the like, where the server's own are not wanted.
            policy: "v7" for version 7; empty for the one that is live.
            return_token_ids: whether the sample has the tokens of prompt and completions too.
            timeout: seconds, in place of the client's.

        Raises:
            AligndError: the server refused, or did not answer.
            ValueError: a message has no role or content.
        """
        request = requests.sample_request(prompt, user_id, num_completions, sampling, policy, return_token_ids)
        response: SampleResponse = self._call(self._inference.Sample, request, timeout)
        return response

    def stream(
        self,
        prompt: PromptLike,
        *,
        user_id: str,
        num_completions: int = 4,
        sampling: SamplingParams | None = None,
        policy: str = "",
        return_token_ids: bool = False,
        timeout: float | None = None,
    ) -> Iterator[CompletionDelta | SampleResponse]:
        """Draws completions, yields their text as it is written, and last the sample as `sample` returns it.

        The call begins with the first item, and ends early if the iterator is closed. For the arguments see `sample`.

        Raises:
            AligndError: the server refused, or the stream broke off; then the completions cannot be ranked.
            ValueError: a message has no role or content.
        """
        request = requests.stream_request(prompt, user_id, num_completions, sampling, policy, return_token_ids)
        self._connection.check(request)
        call = self._inference.StreamSample(request, **self._connection.per_call(timeout))
        finished = False
        try:
            for event in call:
                finished = event.WhichOneof("event") == "finished"
                yield from requests.read_event(event)
        except grpc.RpcError as error:
            raise read_error(error) from error
        finally:
            call.cancel()
        if not finished:
            raise requests.unfinished()

    def rank(
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
        """Submits how a user ranks the completions of a sample; when it returns, the ranking is durable.

        Args:
            feedback_token: the sample's.
            best_first: the ids of all its completions, best first; ids in an inner list are a tie.
            user_id: the user that the sample was drawn for.
            shown: the ids in the order in which the user saw them.
            comment: what the user adds in words.
            request_id: a UUID that you keep, so that the ranking counts once even if you call again. Without it one is
                made, and kept over the tries of this call.
            timeout: seconds, in place of the client's.

        Raises:
            AligndError: the server refused, or did not answer.
        """
        request = requests.ranking_request(feedback_token, best_first, user_id, shown, comment, request_id)
        response: SubmitRankingResponse = self._call(self._feedback.SubmitRanking, request, timeout)
        return response

    def demonstrate(
        self, feedback_token: str, text: str, *, user_id: str, request_id: str = "", timeout: float | None = None
    ) -> SubmitDemonstrationResponse:
        """Submits the completion that a user would have wanted; when it returns, it is durable.

        Args:
            feedback_token: that of the sample whose prompt is demonstrated.
            text: the wanted completion.
            user_id: the user that the sample was drawn for.
            request_id: as for `rank`.
            timeout: seconds, in place of the client's.

        Raises:
            AligndError: the server refused, or did not answer.
        """
        request = requests.demonstration_request(feedback_token, text, user_id, request_id)
        response: SubmitDemonstrationResponse = self._call(self._feedback.SubmitDemonstration, request, timeout)
        return response

    def _call(self, method: Any, request: Any, timeout: float | None) -> Any:
        self._connection.check(request)
        try:
            return method(request, **self._connection.per_call(timeout))
        except grpc.RpcError as error:
            raise read_error(error) from error
