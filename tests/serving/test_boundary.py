"""Every byte string becomes a valid request or a refusal that names the fields at fault; nothing else comes out."""

import uuid
from collections.abc import Iterator
from typing import Any

import grpc
import pytest
from google.protobuf.descriptor import FieldDescriptor
from google.protobuf.message import Message
from hypothesis import given
from hypothesis import strategies as st

from alignd.v1 import feedback_service_pb2 as feedback
from alignd.v1 import inference_service_pb2 as inference
from alignd.v1 import policy_manifest_pb2, types_pb2
from alignd.v1 import policy_service_pb2 as policies
from serving.boundary import parse, request_class
from serving.errors import Refusal
from tests.serving.calls import chat, groups, sample_request
from tests.serving.wire_fields import lengthy, varint

SERVICES = (
    inference.DESCRIPTOR.services_by_name["InferenceService"],
    feedback.DESCRIPTOR.services_by_name["FeedbackService"],
    policies.DESCRIPTOR.services_by_name["PolicyService"],
)
METHODS = [f"/{service.full_name}/{method.name}" for service in SERVICES for method in service.methods]
REQUESTS = [request_class(method) for method in METHODS]
NAN = float("nan")
INF = float("inf")
DIGEST = "0" * 64


def fields_at_fault(raw: bytes, kind: type[Message]) -> list[str]:
    """Returns the fields that a refusal names; [] if there is none. Any error that is no Refusal fails the test."""
    try:
        message = parse(raw, kind)
    except Refusal as refusal:
        assert refusal.code is grpc.StatusCode.INVALID_ARGUMENT
        assert refusal.violations
        assert all(each.field and each.description for each in refusal.violations)
        return [each.field for each in refusal.violations]
    assert isinstance(message, kind)
    return []


@st.composite
def wire_fields(draw: st.DrawFn) -> bytes:
    """Returns bytes that look like a message to the parser, nested, with any values."""
    numbers = st.integers(1, 12)
    leaf = st.one_of(
        st.builds(lambda number, value: varint(number << 3) + varint(value), numbers, st.integers(0, 2**64 - 1)),
        st.builds(lambda number, value: varint(number << 3 | 5) + value, numbers, st.binary(min_size=4, max_size=4)),
        st.builds(lengthy, numbers, st.binary(max_size=20)),
    )
    several = st.lists(leaf, max_size=4).map(b"".join)
    nested = st.recursive(several, lambda inner: st.lists(st.builds(lengthy, numbers, inner), max_size=4).map(b"".join))
    return draw(nested)


@given(raw=st.one_of(st.binary(max_size=200), wire_fields()), kind=st.sampled_from(REQUESTS))
def test_any_bytes_are_a_request_or_a_refusal(raw: bytes, kind: type[Message]) -> None:
    fields_at_fault(raw, kind)


@given(data=st.data())
def test_a_damaged_request_is_a_request_or_a_refusal(data: st.DataObject) -> None:
    raw = bytearray(sample_request(sampling=types_pb2.SamplingParams(stop=["a"], temperature=1)).SerializeToString())
    for _ in range(data.draw(st.integers(1, 5))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    fields_at_fault(bytes(raw), inference.SampleRequest)


def test_deep_nesting_is_refused() -> None:
    raw = b""
    for _ in range(5000):
        raw = lengthy(2, raw)
    assert fields_at_fault(raw, inference.SampleRequest)


def string_fields(descriptor: Any) -> Iterator[tuple[FieldDescriptor, ...]]:
    """Returns the path to each string field of a message."""
    for field in descriptor.fields:
        if field.type == FieldDescriptor.TYPE_STRING:
            yield (field,)
        elif field.type == FieldDescriptor.TYPE_MESSAGE and field.message_type is not None:
            for rest in string_fields(field.message_type):
                yield (field, *rest)


STRINGS = [
    pytest.param(kind, way, id=f"{kind.DESCRIPTOR.name}:{'.'.join(field.name for field in way)}")
    for kind in REQUESTS
    for way in string_fields(kind.DESCRIPTOR)
]


@pytest.mark.parametrize(("kind", "way"), STRINGS)
def test_invalid_utf8_is_named_wherever_it_stands(kind: type[Message], way: tuple[FieldDescriptor, ...]) -> None:
    raw = b"caf\xe9"
    for field in reversed(way):
        raw = lengthy(field.number, raw)
    assert fields_at_fault(raw, kind) == [".".join(field.name for field in way)]


def in_order(kind: type[Any]) -> Any:
    """Returns a valid request of this kind."""
    given_ranking = {"request_id": str(uuid.uuid4()), "feedback_token": "t", "user_id": "ada"}
    manifest = policy_manifest_pb2.PolicyManifest(version=2, reference_version=1, weight_digest=DIGEST)
    manifest.files.add(path="model.safetensors", sha256=DIGEST)
    manifest.create_time.GetCurrentTime()
    sample = {"user_id": "ada", "prompt": chat(), "num_completions": 4}
    fields: dict[type[Any], dict[str, Any]] = {
        inference.SampleRequest: sample,
        inference.StreamSampleRequest: sample,
        feedback.SubmitRankingRequest: {**given_ranking, "groups": groups(["a"], ["b"])},
        feedback.SubmitDemonstrationRequest: {**given_ranking, "text": "Thus."},
        policies.RegisterPolicyRequest: {"manifest": manifest, "artifact_uri": "/v2", "actor": "ada"},
        policies.GetPolicyRequest: {"policy": "live"},
        policies.PromoteRequest: {"version": 2, "actor": "ada"},
        policies.RejectRequest: {"version": 2, "actor": "ada", "reason": "worse"},
        policies.ReinstateRequest: {"version": 2, "actor": "ada", "reason": "rejected by mistake"},
        policies.RollbackRequest: {"actor": "ada"},
    }
    return kind(**fields.get(kind, {}))


@pytest.mark.parametrize("kind", REQUESTS)
def test_a_request_in_order_passes_unchanged(kind: type[Any]) -> None:
    request = in_order(kind)
    assert parse(request.SerializeToString(), kind) == request


def sampling(**fields: Any) -> dict[str, Any]:
    return {"sampling": types_pb2.SamplingParams(**fields)}


def conversation(*messages: types_pb2.Message) -> dict[str, Any]:
    return {"prompt": types_pb2.Prompt(chat=types_pb2.Chat(messages=messages))}


ASKED = types_pb2.Message(role=types_pb2.ROLE_USER, content="Why?")
SAMPLING_FAULTS = [
    ({"user_id": ""}, "user_id"),
    ({"user_id": "u" * 129}, "user_id"),
    ({"user_id": "ü" * 65}, "user_id"),
    ({"prompt": None}, "prompt"),
    ({"prompt": types_pb2.Prompt()}, "prompt.content"),
    ({"prompt": types_pb2.Prompt(text="")}, "prompt.text"),
    ({"prompt": types_pb2.Prompt(text="t" * 65537)}, "prompt.text"),
    (conversation(), "prompt.chat.messages"),
    (conversation(*[ASKED] * 65), "prompt.chat.messages"),
    (conversation(ASKED, types_pb2.Message(content="Why?")), "prompt.chat.messages[1].role"),
    (conversation(types_pb2.Message(role=9, content="Why?")), "prompt.chat.messages[0].role"),  # type: ignore[arg-type]
    (conversation(types_pb2.Message(role=types_pb2.ROLE_USER, content="t" * 65537)), "prompt.chat.messages[0].content"),
    ({"num_completions": 0}, "num_completions"),
    ({"num_completions": 17}, "num_completions"),
    ({"num_completions": -1}, "num_completions"),
    *((sampling(temperature=value), "sampling.temperature") for value in (-1, -1e-9, 2.001, 3, NAN, INF, -INF)),
    *((sampling(top_p=value), "sampling.top_p") for value in (0, -0.5, 1.01, 2, NAN, INF)),
    *((sampling(max_tokens=value), "sampling.max_tokens") for value in (0, -1, -(2**31))),
    (sampling(stop=["a", "b", "c", "d", "e"]), "sampling.stop"),
    (sampling(stop=["a", ""]), "sampling.stop[1]"),
    (sampling(stop=["s" * 65]), "sampling.stop[0]"),
    (sampling(seed=-1), "sampling.seed"),
    *(({"policy": value}, "policy") for value in ("v0", "v01", "7", "latest", "v1234567890", "live ", "v1\n")),
]
FEEDBACK_FAULTS = [
    *(({"request_id": value}, "request_id") for value in ("", "1", "z" * 36, str(uuid.uuid4()) + "0")),
    ({"feedback_token": ""}, "feedback_token"),
    ({"feedback_token": "t" * 8193}, "feedback_token"),
    ({"user_id": ""}, "user_id"),
    ({"user_id": "u" * 129}, "user_id"),
]
RANKING_FAULTS = [
    ({"groups": []}, "groups"),
    ({"groups": groups(*[["a"]] * 17)}, "groups"),
    ({"groups": groups(["a"], [])}, "groups[1].completion_ids"),
    ({"groups": groups(["a"] * 17)}, "groups[0].completion_ids"),
    ({"groups": groups(["a"], ["b", ""])}, "groups[1].completion_ids[1]"),
    ({"groups": groups(["a" * 65])}, "groups[0].completion_ids[0]"),
    ({"shown_completion_ids": ["a"] * 17}, "shown_completion_ids"),
    ({"shown_completion_ids": ["a", ""]}, "shown_completion_ids[1]"),
    ({"comment": "c" * 4097}, "comment"),
]
DEMONSTRATION_FAULTS = [({"text": ""}, "text"), ({"text": "t" * 65537}, "text")]
ACTOR_FAULTS = [
    ({"actor": ""}, "actor"),
    ({"actor": "a" * 129}, "actor"),
    ({"reason": "r" * 1025}, "reason"),
]
FAULTS = [
    *((inference.SampleRequest, *fault) for fault in SAMPLING_FAULTS),
    *((inference.StreamSampleRequest, *fault) for fault in SAMPLING_FAULTS),
    *((feedback.SubmitRankingRequest, *fault) for fault in FEEDBACK_FAULTS + RANKING_FAULTS),
    *((feedback.SubmitDemonstrationRequest, *fault) for fault in FEEDBACK_FAULTS + DEMONSTRATION_FAULTS),
    *((policies.RegisterPolicyRequest, *fault) for fault in ACTOR_FAULTS),
    (policies.RegisterPolicyRequest, {"manifest": None}, "manifest"),
    (policies.RegisterPolicyRequest, {"artifact_uri": ""}, "artifact_uri"),
    (policies.RegisterPolicyRequest, {"artifact_uri": "/" + "a" * 2048}, "artifact_uri"),
    *((policies.PromoteRequest, *fault) for fault in ACTOR_FAULTS),
    (policies.PromoteRequest, {"version": 0}, "version"),
    (policies.PromoteRequest, {"expected_live_version": -1}, "expected_live_version"),
    *((policies.RollbackRequest, *fault) for fault in ACTOR_FAULTS),
    (policies.RollbackRequest, {"version": -1}, "version"),
    (policies.ListPoliciesRequest, {"page_size": -1}, "page_size"),
    (policies.ListPoliciesRequest, {"page_size": 1001}, "page_size"),
    *((policies.ListPoliciesRequest, {"page_token": value}, "page_token") for value in ("0", "-1", "x", "1234567890")),
    *((policies.GetPolicyRequest, {"policy": value}, "policy") for value in ("", "v0", "7", "live2")),
    (policies.WatchRequest, {"after_revision": -1}, "after_revision"),
]


@pytest.mark.parametrize(("kind", "changed", "field"), FAULTS)
def test_each_limit_is_kept_and_its_field_named(kind: type[Any], changed: dict[str, Any], field: str) -> None:
    request = in_order(kind)
    for name, value in changed.items():
        request.ClearField(name)
        if value is not None:
            request.MergeFrom(kind(**{name: value}))
    if "prompt" in changed and changed["prompt"] is not None:
        request.prompt.SetInParent()
    assert fields_at_fault(request.SerializeToString(), kind) == [field]


def test_the_limits_themselves_are_allowed() -> None:
    content = "t" * 65536
    extremes = types_pb2.SamplingParams(temperature=2, top_p=1, stop=["s" * 64] * 4, seed=2**63 - 1, max_tokens=1)
    least = types_pb2.SamplingParams(temperature=0, top_p=1e-9, seed=0)
    for chosen, count in ((extremes, 16), (least, 1)):
        request = sample_request(user_id="u" * 128, prompt=chat(content), num_completions=count, sampling=chosen)
        request.policy = "v999999999"
        assert parse(request.SerializeToString(), inference.SampleRequest) == request


def test_every_fault_is_named_at_once() -> None:
    request = inference.SampleRequest(num_completions=17, sampling=types_pb2.SamplingParams(top_p=2))
    found = fields_at_fault(request.SerializeToString(), inference.SampleRequest)
    assert sorted(found) == ["num_completions", "prompt", "sampling.top_p", "user_id"]
