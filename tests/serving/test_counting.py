"""What is too much is refused by its count, before anything is built of it, wherever it stands in a request."""

import time
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message

from alignd.v1 import feedback_service_pb2, inference_service_pb2, policy_manifest_pb2, policy_service_pb2
from feedback.token import Keyring
from serving import wire
from serving.access.limits import Limits
from serving.boundary import parse
from serving.config import LimitsConfig
from serving.errors import Refusal
from serving.feedback_service import FeedbackService
from tests.serving.test_boundary import REQUESTS, in_order
from tests.serving.wire_fields import lengthy

FLOOD = 500_000


def repeated_fields(descriptor: Any) -> Iterator[tuple[FieldDescriptor, ...]]:
    """Returns the path to each repeated field of a message."""
    for field in descriptor.fields:
        if field.is_repeated:
            yield (field,)
        if field.message_type:
            for rest in repeated_fields(field.message_type):
                yield (field, *rest)


REPEATED = [
    pytest.param(kind, way, id=f"{kind.DESCRIPTOR.name}:{'.'.join(field.name for field in way)}")
    for kind in REQUESTS
    for way in repeated_fields(kind.DESCRIPTOR)
]


def refusal(raw: bytes, kind: type[Message]) -> tuple[str, str]:
    """Returns the field and the description of the one violation that a request is refused for."""
    with pytest.raises(Refusal) as raised:
        parse(raw, kind)
    (violation,) = raised.value.violations
    return violation.field, violation.description


def never_parsed(kind: type[Message]) -> Any:
    """Returns a stand-in for a message class that fails where it is used to parse."""

    def fail(raw: bytes) -> Message:
        raise AssertionError(f"{len(raw)} bytes were parsed")

    return SimpleNamespace(DESCRIPTOR=kind.DESCRIPTOR, FromString=fail)


@pytest.mark.parametrize(("kind", "way"), REPEATED)
def test_a_flood_is_refused_unparsed_wherever_it_stands(kind: type[Message], way: tuple[FieldDescriptor, ...]) -> None:
    *outside, last = way
    raw = lengthy(last.number, bytes(8)) * 70_000 if last.cpp_type in (1, 6) else lengthy(last.number, b"") * FLOOD
    for field in reversed(outside):
        raw = lengthy(field.number, raw)
    began = time.process_time()
    field, said = refusal(raw, never_parsed(kind))
    assert time.process_time() - began < 1
    assert field.replace("[0]", "") == ".".join(each.name for each in way)
    assert str(wire.most(last)) in said


@pytest.mark.parametrize(("kind", "way"), REPEATED)
def test_the_contract_limits_all_that_is_repeated(kind: type[Message], way: tuple[FieldDescriptor, ...]) -> None:
    assert wire.most(way[-1]) > 0


FLOODS = {
    "one message in parts": b"\x12\0" * FLOOD,
    "one message in parts, inside another": lengthy(2, b"\x0a\0" * FLOOD),
    "fields that nobody knows": b"\xa0\x06\x01" * 300_000,
    "a number again and again": b"\x18\x02" * FLOOD,
}


@pytest.mark.parametrize("raw", FLOODS.values(), ids=FLOODS)
def test_a_flood_of_what_is_not_repeated_is_refused_unparsed(raw: bytes) -> None:
    field, said = refusal(raw, never_parsed(inference_service_pb2.SampleRequest))
    assert (field, "fields" in said) == ("request", True)


def test_a_message_in_parts_is_counted_as_one() -> None:
    turn = lengthy(1, b"\x08\x02" + lengthy(2, b"Why?"))
    known = lengthy(1, b"ada") + b"\x18\x02"
    half = lengthy(2, lengthy(1, turn * 32))
    assert len(parse(known + half + half, inference_service_pb2.SampleRequest).prompt.chat.messages) == 64  # type: ignore[attr-defined]
    assert refusal(known + half + half + half, inference_service_pb2.SampleRequest)[0] == "prompt.chat.messages"


@pytest.mark.parametrize(
    ("tokens", "too_many"),
    [
        (lengthy(1, b"\xff\x01" * 512), False),
        (lengthy(1, b"\xff\x01" * 513), True),
        (lengthy(1, b"\x01" * 300) * 2, True),
        (b"\x08\x05" * 512, False),
        (b"\x08\x05" * 513, True),
        (lengthy(2, bytes(4 * 511)), False),
        (lengthy(2, bytes(4 * 512)), True),
    ],
)
def test_numbers_are_counted_packed_or_not(tokens: bytes, too_many: bool) -> None:
    descriptor = policy_service_pb2.RegisterPolicyRequest.DESCRIPTOR
    raw = lengthy(1, lengthy(9, b"") + lengthy(9, tokens))
    if not too_many:
        assert wire.count(raw, descriptor) > 2
        return
    with pytest.raises(wire.TooManyError, match=r"^manifest\.probes\[1\]\."):
        wire.count(raw, descriptor)


def test_the_fullest_manifest_is_not_too_much() -> None:
    request = in_order(policy_service_pb2.RegisterPolicyRequest)
    manifest: policy_manifest_pb2.PolicyManifest = request.manifest
    for number in range(9_999):
        manifest.files.add(path=f"{number}", sha256="0" * 64)
    for _ in range(64):
        manifest.probes.add(token_ids=[2**31 - 1] * 512, logprobs=[-0.5] * 511)
    for _ in range(1_000):
        manifest.evaluations.add(name="n", value=1, low=0, high=2, count=3)
        manifest.training.rankings.add(topic="rankings", partition=1, first_offset=2, last_offset=3)
    assert parse(request.SerializeToString(), policy_service_pb2.RegisterPolicyRequest) == request


def test_of_very_many_faults_one_is_named() -> None:
    """Listing those of 10,000 files took a quarter of a second and 60 MB, for a request of 20 kB."""
    raw = lengthy(1, lengthy(5, b"") * 10_000)
    assert refusal(raw, policy_service_pb2.RegisterPolicyRequest)[0].startswith("manifest")


def test_the_token_is_checked_before_the_rest() -> None:
    service: Any = FeedbackService(None, Keyring("k1", {"k1": b"s" * 32}), Limits(LimitsConfig()))  # type: ignore[arg-type]
    for token, says in (("x.y", "malformed"), ("", "1 to 8192 bytes"), ("t" * 8193, "1 to 8192 bytes")):
        request = feedback_service_pb2.SubmitRankingRequest(feedback_token=token, user_id="u" * 1000)
        with pytest.raises(Refusal) as raised:
            parse(request.SerializeToString(), type(request), service.check_token)
        assert [each.field for each in raised.value.violations] == ["feedback_token"]
        assert says in raised.value.message
