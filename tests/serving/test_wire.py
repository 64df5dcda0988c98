"""What hostile clients send, byte by byte, and what standard tools expect: the server stays up throughout."""

import os
import socket
import struct
import uuid
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.rpc import error_details_pb2
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from alignd.v1 import feedback_service_pb2, inference_service_pb2, policy_service_pb2
from serving.config import ServingConfig
from tests.serving.calls import TIMEOUT_SECONDS, Stubs, detail, draw, fields_of, refused, sample_request
from tests.serving.processes import Server
from tests.serving.stock_client import StockClient, stock_clients

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
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
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
    assert strings or method.name == "Watch"


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


def http2_frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def http2_call(address: str, path: str, data: bytes) -> bytes:
    """Makes a call by hand, leaves the stream open, and returns the payload of the trailers that end it."""
    headers = {
        ":method": "POST",
        ":scheme": "http",
        ":path": path,
        ":authority": address,
        "te": "trailers",
        "content-type": "application/grpc",
    }
    literal = b"".join(b"\0" + bytes([len(n)]) + n.encode() + bytes([len(v)]) + v.encode() for n, v in headers.items())
    host, port = address.split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connection:
        connection.sendall(PREFACE + http2_frame(4, 0, 0, b""))
        connection.sendall(http2_frame(1, 4, 1, literal) + http2_frame(0, 0, 1, data))
        received = connection.makefile("rb")
        while True:
            head = received.read(9)
            payload = received.read(int.from_bytes(head[:3], "big"))
            kind, flags = head[3], head[4]
            if kind == 1 and flags & 1:
                return payload


@pytest.mark.parametrize("claimed", [LIMIT + 1, 1 << 30, 2**32 - 1])
def test_a_message_that_claims_to_be_large_is_refused_before_it_comes(server: Server, claimed: int) -> None:
    data = b"\0" + struct.pack(">I", claimed) + b"\x0a\x03ada"
    trailers = http2_call(server.address, "/alignd.v1.InferenceService/Sample", data)
    assert b"grpc-status\x018" in trailers, trailers


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


def test_reflection_tells_the_services_and_their_rules(stubs: Stubs) -> None:
    reflection: Any = reflection_pb2_grpc.ServerReflectionStub(stubs.channel)
    asked = [
        reflection_pb2.ServerReflectionRequest(list_services=""),
        reflection_pb2.ServerReflectionRequest(file_containing_symbol="alignd.v1.InferenceService"),
    ]
    services, file = reflection.ServerReflectionInfo(iter(asked), timeout=TIMEOUT_SECONDS)
    names = {each.name for each in services.list_services_response.service}
    assert names >= {"grpc.health.v1.Health", *(service.full_name for service in SERVICES)}
    assert any(b"buf.validate" in each for each in file.file_descriptor_response.file_descriptor_proto)


@pytest.fixture(params=stock_clients(), ids=lambda each: each.name)
def client(request: pytest.FixtureRequest) -> StockClient:
    return request.param  # type: ignore[no-any-return]


def test_a_stock_client_samples_and_ranks(server: Server, client: StockClient) -> None:
    assert "alignd.v1.FeedbackService/SubmitRanking" in client.methods(server.address)
    prompt = {"chat": {"messages": [{"role": "ROLE_USER", "content": "Why?"}]}}
    asked = {"user_id": "curl", "prompt": prompt, "num_completions": 2, "sampling": {"max_tokens": 4}}
    sample = client.call(server.address, "alignd.v1.InferenceService/Sample", asked).message
    ranking = {
        "request_id": str(uuid.uuid4()),
        "feedback_token": sample["feedbackToken"],
        "user_id": "curl",
        "groups": [{"completion_ids": [each["completionId"]]} for each in sample["completions"]],
    }
    assert client.call(server.address, "alignd.v1.FeedbackService/SubmitRanking", ranking).message["rankingId"]


def test_a_stock_client_promotes(server: Server, client: StockClient) -> None:
    promotion = {"version": 1, "actor": "curl", "reason": "again"}
    promoted = client.call(server.address, "alignd.v1.PolicyService/Promote", promotion).message
    assert promoted["policy"]["stage"] == "STAGE_LIVE"


def test_a_stock_client_reads_the_fields_of_an_error(server: Server, client: StockClient) -> None:
    refused = client.call(server.address, "alignd.v1.InferenceService/Sample", {"num_completions": 17})
    assert refused.code == "invalid_argument"
    assert set(refused.fields) == {"user_id", "prompt", "num_completions"}
    missing = client.call(server.address, "alignd.v1.PolicyService/Promote", {"version": 99, "actor": "curl"})
    assert missing.code == "not_found"
