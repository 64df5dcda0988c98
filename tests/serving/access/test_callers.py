"""Every RPC needs a scope, and every caller without it is refused, with what is missing."""

from datetime import timedelta
from pathlib import Path

import grpc
import pytest
from google.protobuf import descriptor_pool

from alignd.v1 import access_pb2
from serving.access.callers import NOBODY, Caller, check, scopes_of
from serving.access.keys import ApiKey, create_key, read_keys, revoke_key
from serving.errors import Refusal
from tests.serving.test_boundary import METHODS

SAMPLE, RANK = "/alignd.v1.InferenceService/Sample", "/alignd.v1.FeedbackService/SubmitRanking"
PROMOTE, LIST = "/alignd.v1.PolicyService/Promote", "/alignd.v1.PolicyService/ListPolicies"
REFLECTION, HEALTH = "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo", "/grpc.health.v1.Health/Check"


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "api_keys.json"


def call(method: str, keys: list[ApiKey], secret: str | None = None, *, needs_key: bool = True) -> Caller:
    metadata: dict[str, str | bytes] = {} if secret is None else {"authorization": f"Bearer {secret}"}
    return check(method, metadata, lambda: keys, needs_key=needs_key)


def refusal(method: str, keys: list[ApiKey], secret: str | None = None, *, needs_key: bool = True) -> Refusal:
    with pytest.raises(Refusal) as raised:
        call(method, keys, secret, needs_key=needs_key)
    return raised.value


@pytest.mark.parametrize("method", METHODS)
def test_every_rpc_names_scopes_and_nobody_calls_it_without_one(method: str, path: Path) -> None:
    needed = scopes_of(method)
    assert needed
    assert set(needed) <= {"sample", "feedback", "operate", "train"}
    others = sorted({"sample", "feedback", "operate", "train"} - set(needed))
    _, wrong = create_key(path, "wrong", "shop", others, "ada")
    _, right = create_key(path, "right", "shop", [needed[-1]], "ada")
    keys = read_keys(path)
    assert call(method, keys, right) == Caller("right", "shop", (needed[-1],))
    found = refusal(method, keys, wrong)
    assert (found.code, found.reason) == (grpc.StatusCode.PERMISSION_DENIED, "MISSING_SCOPE")
    assert found.metadata == {"needed": ",".join(needed), "key": "wrong"}
    assert " or ".join(needed) in found.message
    for bad in (None, "", "nothing", right[:-1]):
        assert refusal(method, keys, bad).code is grpc.StatusCode.UNAUTHENTICATED


def test_a_method_that_names_no_scope_is_refused(path: Path) -> None:
    from google.protobuf import descriptor_pb2

    file = descriptor_pb2.FileDescriptorProto(name="forgotten.proto", package="alignd.v1", syntax="proto3")
    file.message_type.add(name="Forgotten")
    file.service.add(name="ForgottenService").method.add(
        name="Call", input_type=".alignd.v1.Forgotten", output_type=".alignd.v1.Forgotten"
    )
    descriptor_pool.Default().AddSerializedFile(file.SerializeToString())
    _, secret = create_key(path, "all", "shop", ["sample", "feedback", "operate", "train"], "ada")
    found = refusal("/alignd.v1.ForgottenService/Call", read_keys(path), secret)
    assert found.reason == "MISSING_SCOPE"
    assert access_pb2.Scope.Name(0) == "SCOPE_UNSPECIFIED"


def test_keys_that_have_ended_are_refused(path: Path) -> None:
    _, expired = create_key(path, "expired", "shop", ["sample"], "ada", timedelta(seconds=-1))
    _, revoked = create_key(path, "revoked", "shop", ["sample"], "ada")
    revoke_key(path, "revoked", "ada")
    keys = read_keys(path)
    assert refusal(SAMPLE, keys, expired).reason == "API_KEY_EXPIRED"
    assert refusal(SAMPLE, keys, revoked).reason == "BAD_API_KEY"
    for found in (refusal(SAMPLE, keys, expired), refusal(SAMPLE, keys, revoked)):
        assert expired not in found.message
        assert revoked not in found.message


def test_where_no_key_is_needed_nobody_samples_and_ranks_and_does_nothing_else(path: Path) -> None:
    for method in (SAMPLE, RANK, REFLECTION, HEALTH):
        assert call(method, [], needs_key=False) == NOBODY
    for method in (PROMOTE, LIST):
        assert refusal(method, [], needs_key=False).reason == "NO_API_KEY"
    # A bad key is no key: who sends one means to be somebody.
    assert refusal(SAMPLE, [], "alignd_x", needs_key=False).reason == "BAD_API_KEY"


def test_health_needs_no_key_and_reflection_any(path: Path) -> None:
    assert call(HEALTH, []) == NOBODY
    _, secret = create_key(path, "web", "shop", ["sample"], "ada")
    assert call(REFLECTION, read_keys(path), secret).name == "web"
    assert refusal(REFLECTION, []).reason == "NO_API_KEY"


@pytest.mark.parametrize("sent", ["Basic YTpi", "alignd_0", "Bearer", b"\xff\xfe"])
def test_what_is_no_bearer_token_is_refused(sent: str | bytes) -> None:
    with pytest.raises(Refusal) as raised:
        check(SAMPLE, {"authorization": sent}, list, needs_key=True)
    assert raised.value.reason == "BAD_API_KEY"
