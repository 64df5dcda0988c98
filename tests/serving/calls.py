"""What an application sends and reads, as the tests of the API need it."""

import uuid
from collections.abc import Sequence
from typing import Any

import grpc
import pytest
from google.protobuf.message import Message
from google.rpc import error_details_pb2
from grpc_status import rpc_status

from alignd.v1 import (
    feedback_service_pb2,
    feedback_service_pb2_grpc,
    inference_service_pb2,
    inference_service_pb2_grpc,
    policy_service_pb2_grpc,
    types_pb2,
)

TIMEOUT_SECONDS = 60.0
# Of the shared server's model.
END_TOKEN_IDS = [2, 0]


class Stubs:
    """The three services on one channel."""

    def __init__(self, channel: grpc.Channel) -> None:
        self.channel = channel
        self.inference: Any = inference_service_pb2_grpc.InferenceServiceStub(channel)
        self.feedback: Any = feedback_service_pb2_grpc.FeedbackServiceStub(channel)
        self.policies: Any = policy_service_pb2_grpc.PolicyServiceStub(channel)


def chat(content: str = "Why is the sky blue?") -> types_pb2.Prompt:
    """Returns a conversation of one turn."""
    message = types_pb2.Message(role=types_pb2.ROLE_USER, content=content)
    return types_pb2.Prompt(chat=types_pb2.Chat(messages=[message]))


def conversation(*turns: tuple[str, str]) -> types_pb2.Prompt:
    """Returns a conversation of turns such as ("user", "Why?")."""
    roles = {"system": types_pb2.ROLE_SYSTEM, "user": types_pb2.ROLE_USER, "assistant": types_pb2.ROLE_ASSISTANT}
    messages = [types_pb2.Message(role=roles[role], content=content) for role, content in turns]
    return types_pb2.Prompt(chat=types_pb2.Chat(messages=messages))


def sample_request(**fields: Any) -> inference_service_pb2.SampleRequest:
    """Returns a valid request, with these fields replaced."""
    sampling = types_pb2.SamplingParams(max_tokens=8)
    return inference_service_pb2.SampleRequest(
        **{"user_id": "ada", "prompt": chat(), "num_completions": 4, "sampling": sampling, **fields}
    )


def sampling(**fields: Any) -> types_pb2.SamplingParams:
    """Returns sampling parameters with at most 16 tokens, unless given otherwise."""
    return types_pb2.SamplingParams(**{"max_tokens": 16, **fields})


def long_request(**fields: Any) -> inference_service_pb2.StreamSampleRequest:
    """Returns a request for a stream that takes a while."""
    request = sample_request(sampling=sampling(max_tokens=400), **fields)
    return inference_service_pb2.StreamSampleRequest.FromString(request.SerializeToString())


def draw(stubs: Stubs, **fields: Any) -> inference_service_pb2.SampleResponse:
    """Returns what Sample returns."""
    return stubs.inference.Sample(sample_request(**fields), timeout=TIMEOUT_SECONDS)  # type: ignore[no-any-return]


def texts(sample: inference_service_pb2.SampleResponse) -> list[str]:
    """Returns the completions' texts, by index."""
    return [completion.text for completion in sample.completions]


def ranking_request(
    sample: inference_service_pb2.SampleResponse, **fields: Any
) -> feedback_service_pb2.SubmitRankingRequest:
    """Returns a valid ranking of the sample, best first by index, with these fields replaced."""
    ids = [each.completion_id for each in sample.completions]
    given = {
        "request_id": str(uuid.uuid4()),
        "feedback_token": sample.feedback_token,
        "user_id": "ada",
        "groups": groups(*([each] for each in ids)),
        **fields,
    }
    return feedback_service_pb2.SubmitRankingRequest(**given)


def groups(*ids: Sequence[str]) -> list[types_pb2.RankingGroup]:
    """Returns groups of completion ids, best first."""
    return [types_pb2.RankingGroup(completion_ids=each) for each in ids]


def refused(method: Any, request: Message | bytes, code: grpc.StatusCode, field: str = "") -> Any:
    """Calls, and returns the error, which must have this code and, if a field is given, name it and no other."""
    with pytest.raises(grpc.RpcError) as raised:
        answer = method(request, timeout=TIMEOUT_SECONDS)
        list(answer if hasattr(answer, "__next__") else ())
    error: Any = raised.value
    assert error.code() is code, f"{error.code()}: {error.details()}"
    if field:
        assert fields_of(error) == [field], error.details()
    return error


def fields_of(error: Any) -> list[str]:
    """Returns the fields that the error's BadRequest names."""
    return [each.field for each in detail(error, error_details_pb2.BadRequest).field_violations]


def detail(error: Any, kind: type[Message]) -> Any:
    """Returns the error's detail of a kind, such as ErrorInfo; an empty one if it has none."""
    found = kind()
    status = rpc_status.from_call(error)
    for packed in status.details if status else ():
        packed.Unpack(found)
    return found
