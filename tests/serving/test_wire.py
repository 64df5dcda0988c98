"""What hostile clients send, byte by byte, and what standard tools expect: the server stays up throughout."""

import os
import socket
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import grpc
import psutil
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2

from alignd.v1 import feedback_service_pb2, inference_service_pb2, policy_service_pb2
from serving.config import ServingConfig
from tests.serving import raw_http2
from tests.serving.calls import TIMEOUT_SECONDS, Stubs, detail, draw, fields_of, refused, sample_request
from tests.serving.processes import Server
from tests.serving.raw_http2 import ACK, GOAWAY, PING, PREFACE, frame, message
from tests.serving.stock_client import StockClient, stock_clients
from tests.serving.wire_fields import lengthy

pytestmark = pytest.mark.timeout(300)

INVALID = grpc.StatusCode.INVALID_ARGUMENT
LIMIT = ServingConfig().max_message_mib << 20
SERVICES = [
    module.DESCRIPTOR.services_by_name[name]
    for module, name in (
        (inference_service_pb2, "InferenceService"),
        (feedback_service_pb2, "FeedbackService"),
        (policy_service_pb2, "PolicyService"),
    )
]
METHODS = [method for service in SERVICES for method in service.methods]
GARBAGE = [b"\xff", b"\x0a\xff\xff\xff\xff\xff", b"\x0a\x05a", os.urandom(1000) + b"\x07"]


def raw_method(stubs: Stubs, method: Any) -> Any:
    """Returns the method as a callable of bytes."""
    path = f"/{method.containing_service.full_name}/{method.name}"
    kind = stubs.channel.unary_stream if method.server_streaming else stubs.channel.unary_unary
    return kind(path, request_serializer=lambda raw: raw, response_deserializer=lambda raw: raw)


@pytest.fixture(autouse=True)
def still_serving(stubs: Stubs) -> Iterator[None]:
    """Checks that, whatever a test sends, the next request is served."""
    yield
    assert len(draw(stubs).completions) == 4


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_garbage_is_refused_by_every_method(stubs: Stubs, method: Any) -> None:
    for garbage in GARBAGE:
        error = refused(raw_method(stubs, method), garbage, INVALID)
        assert fields_of(error)
        assert detail(error, error_details_pb2.ErrorInfo).reason == "INVALID_FIELD"


@pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)
def test_invalid_utf8_is_refused_by_every_method_and_named(stubs: Stubs, method: Any) -> None:
    strings = [field for field in method.input_type.fields if field.type == field.TYPE_STRING]
    for field in strings:
        raw = bytes([field.number << 3 | 2, 2]) + b"\xc3\x28"
        refused(raw_method(stubs, method), raw, INVALID, field.name)
    assert strings or method.name in ("Watch", "ListModels")


def test_invalid_utf8_deep_inside_is_named(stubs: Stubs) -> None:
    good = sample_request(prompt=None).SerializeToString()
    content = b"\x12\x02\xc3\x28"
    message = b"\x0a" + bytes([len(content)]) + content
    chat = b"\x0a" + bytes([len(message)]) + message
    prompt = b"\x12" + bytes([len(chat)]) + chat
    error = refused(raw_method(stubs, METHODS[0]), good + prompt, INVALID)
    assert fields_of(error) == ["prompt.chat.messages.content"]


def test_an_empty_message_names_what_is_missing(stubs: Stubs) -> None:
    error = refused(raw_method(stubs, METHODS[0]), b"", INVALID)
    assert set(fields_of(error)) == {"user_id", "prompt", "num_completions"}


@pytest.mark.parametrize("size", [LIMIT + 1, 64 << 20])
def test_a_message_over_the_limit_is_refused(stubs: Stubs, size: int) -> None:
    for method in METHODS:
        refused(raw_method(stubs, method), b"\x0a" * size, grpc.StatusCode.RESOURCE_EXHAUSTED)


def test_a_message_just_under_the_limit_is_read(stubs: Stubs) -> None:
    request = sample_request(user_id="u" * (LIMIT - 200))
    refused(stubs.inference.Sample, request, INVALID, "user_id")


def empty_turns() -> tuple[Any, bytes, str]:
    """Returns a chat of 500,000 empty messages, with its method and the field at fault."""
    prompt = lengthy(1, b"\x0a\0" * 500_000)
    return METHODS[0], lengthy(2, prompt), "prompt.chat.messages"


def empty_groups() -> tuple[Any, bytes, str]:
    """Returns a ranking of 500,000 empty groups without a token, with its method and the field at fault."""
    (method,) = (each for each in METHODS if each.name == "SubmitRanking")
    return method, b"\x22\0" * 500_000, "groups"


@pytest.mark.parametrize("claimed", [LIMIT + 1, 1 << 30, 2**32 - 1])
def test_a_message_that_claims_to_be_large_is_refused_before_it_comes(server: Server, claimed: int) -> None:
    with raw_http2.connect(server.address) as connection:
        connection.call("/alignd.v1.InferenceService/Sample", message(b"\x0a\x03ada", claimed), ended=False)
        *_, trailers = connection.frames()
    assert b"grpc-status\x018" in trailers.payload, trailers


@pytest.mark.parametrize("request_of", [empty_turns, empty_groups])
def test_a_megabyte_of_empty_elements_costs_nothing(
    stubs: Stubs, server: Server, request_of: Callable[[], tuple[Any, bytes, str]]
) -> None:
    method, raw, field = request_of()
    process = psutil.Process(server.pids["serve"])
    before, memory = process.cpu_times().user, process.memory_info().rss
    for _ in range(5):
        refused(raw_method(stubs, method), raw, INVALID, field)
    assert process.cpu_times().user - before < 1
    assert process.memory_info().rss - memory < 32 << 20


def test_clients_may_ping_each_second(server: Server) -> None:
    """A client behind a load balancer pings so as to be kept, and was cut off for that."""
    with raw_http2.connect(server.address) as connection:
        answered = 0
        for number in range(4):
            time.sleep(1.05 if number else 0)
            connection.send(frame(PING, 0, 0, bytes(8)))
            for received in connection.frames():
                assert received.kind != GOAWAY, received.payload
                if received.kind == PING and received.flags & ACK:
                    answered += 1
                    break
        assert answered == 4


def test_what_is_not_http2_is_hung_up_on(server: Server) -> None:
    host, port = server.address.split(":")
    for hello in (
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
        b"\x16\x03\x01" + os.urandom(200),
        PREFACE + b"\xff" * 500,
    ):
        with socket.create_connection((host, int(port)), timeout=20) as connection:
            connection.sendall(hello)
            assert len(connection.makefile("rb").read()) < 1000


def test_a_method_that_is_not_there(stubs: Stubs) -> None:
    for path in ("/alignd.v1.InferenceService/Smple", "/alignd.v1.Nothing/Sample", "/nothing"):
        call: Any = stubs.channel.unary_unary(path)
        with pytest.raises(grpc.RpcError) as raised:
            call(b"", timeout=TIMEOUT_SECONDS)
        assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED


def test_every_service_is_healthy_and_an_unknown_one_is_not_known(stubs: Stubs) -> None:
    health: Any = health_pb2_grpc.HealthStub(stubs.channel)
    for service in ("", *(service.full_name for service in SERVICES)):
        request = health_pb2.HealthCheckRequest(service=service)
        assert health.Check(request, timeout=TIMEOUT_SECONDS).status == health_pb2.HealthCheckResponse.SERVING
    unknown = health_pb2.HealthCheckRequest(service="alignd.v1.Nothing")
    refused(health.Check, unknown, grpc.StatusCode.NOT_FOUND)


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_reflection_tells_the_services_and_their_rules(stubs: Stubs, version: str) -> None:
    name = f"grpc.reflection.{version}.ServerReflection"
    ask: Any = stubs.channel.stream_stream(
        f"/{name}/ServerReflectionInfo",
        reflection_pb2.ServerReflectionRequest.SerializeToString,
        reflection_pb2.ServerReflectionResponse.FromString,
    )
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="alignd.v1.InferenceService"),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol=name),
    ]
    services, file, itself = ask(iter(asked), timeout=TIMEOUT_SECONDS)
    names = {each.name for each in services.list_services_response.service}
    assert names >= {"grpc.health.v1.Health", name, *(service.full_name for service in SERVICES)}
    assert any(b"buf.validate" in each for each in file.file_descriptor_response.file_descriptor_proto)
    assert len(itself.file_descriptor_response.file_descriptor_proto) == 1


@pytest.fixture(params=stock_clients(), ids=lambda each: each.name)
def client(request: pytest.FixtureRequest) -> StockClient:
    return request.param  # type: ignore[no-any-return]


@pytest.fixture
def key(server: Server) -> str:
    """That of the machine's own operator."""
    return (server.data_dir / "operator_key").read_text().strip()


def test_a_stock_client_samples_and_ranks(server: Server, client: StockClient, key: str) -> None:
    assert "alignd.v1.FeedbackService/SubmitRanking" in client.methods(server.address)
    prompt = {"chat": {"messages": [{"role": "ROLE_USER", "content": "Why?"}]}}
    asked = {"user_id": "curl", "prompt": prompt, "num_completions": 2, "sampling": {"max_tokens": 4}}
    sample = client.call(server.address, "alignd.v1.InferenceService/Sample", asked, key).message
    ranking = {
        "request_id": str(uuid.uuid4()),
        "feedback_token": sample["feedbackToken"],
        "user_id": "curl",
        "groups": [{"completion_ids": [each["completionId"]]} for each in sample["completions"]],
    }
    assert client.call(server.address, "alignd.v1.FeedbackService/SubmitRanking", ranking, key).message["rankingId"]


def test_a_stock_client_promotes(server: Server, client: StockClient, key: str) -> None:
    promotion = {"version": 1, "actor": "curl", "reason": "again"}
    promoted = client.call(server.address, "alignd.v1.PolicyService/Promote", promotion, key).message
    assert promoted["policy"]["stage"] == "STAGE_LIVE"


def test_a_stock_client_reads_the_fields_of_an_error(server: Server, client: StockClient, key: str) -> None:
    refused = client.call(server.address, "alignd.v1.InferenceService/Sample", {"num_completions": 17}, key)
    assert refused.code == "invalid_argument"
    assert set(refused.fields) == {"user_id", "prompt", "num_completions"}
    missing = client.call(server.address, "alignd.v1.PolicyService/Promote", {"version": 99, "actor": "curl"}, key)
    assert missing.code == "not_found"
