"""What the clients send and refuse to send, and how they say what a server refused."""

import asyncio
import contextlib
import datetime
import ipaddress
import pickle
import subprocess
import sys
from typing import Any

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from alignd.client import AligndError, AsyncClient, Client, FieldViolation, Message, Prompt, SamplingParams, read_error
from alignd.client.connection import SERVICES
from alignd.v1 import feedback_service_pb2, inference_service_pb2
from alignd.v1.types_pb2 import ROLE_SYSTEM, ROLE_USER
from serving.errors import Refusal, Violation
from tests.client.callers import CALLERS, Call
from tests.client.scripted_server import SAMPLE, Script, serving

both = pytest.mark.parametrize("call", CALLERS.values(), ids=CALLERS)


@both
@pytest.mark.parametrize("method", ["sample", "stream"])
def test_a_prompt_is_sent_as_it_was_meant(call: Call, method: str) -> None:
    script = Script()
    turns = [{"role": "system", "content": "Be brief."}, Message(role=ROLE_USER, content="Hello")]
    options = {"num_completions": 2, "sampling": SamplingParams(max_tokens=8), "policy": "v7"}
    with serving(script) as address:
        for prompt in ("Hello", turns, Prompt(text="Once upon")):
            call(address, method, prompt, user_id="ada", **options)
    said, chat, text = (request.prompt for request in script.requests)  # type: ignore[attr-defined]
    assert [(each.role, each.content) for each in said.chat.messages] == [(ROLE_USER, "Hello")]
    assert [(each.role, each.content) for each in chat.chat.messages] == [
        (ROLE_SYSTEM, "Be brief."),
        (ROLE_USER, "Hello"),
    ]
    assert text.text == "Once upon"
    first: Any = script.requests[0]
    assert (first.user_id, first.num_completions, first.sampling.max_tokens, first.policy) == ("ada", 2, 8, "v7")


@both
def test_a_ranking_is_sent_with_its_ties(call: Call) -> None:
    script = Script()
    with serving(script) as address:
        call(address, "rank", "t", ["b", ["a", "c"]], user_id="ada", shown=["a", "b", "c"], comment="hm")
    request: Any = script.requests[0]
    assert [list(group.completion_ids) for group in request.groups] == [["b"], ["a", "c"]]
    assert list(request.shown_completion_ids) == ["a", "b", "c"]
    assert (request.feedback_token, request.user_id, request.comment) == ("t", "ada", "hm")


@pytest.mark.parametrize("turn", [{"role": "robot", "content": "Hi"}, {"role": "user"}, {"content": "Hi"}])
def test_a_message_that_is_none_is_refused_before_it_is_sent(turn: dict[str, str]) -> None:
    with Client() as client, pytest.raises(ValueError, match="one of system, user, assistant"):
        client.sample([turn], user_id="ada")


def test_one_id_is_no_ranking() -> None:
    with Client() as client, pytest.raises(TypeError, match="a list of completion ids"):
        client.rank("t", "abc", user_id="ada")


@both
def test_a_refusal_says_all_that_the_server_said(call: Call) -> None:
    violations = [Violation("groups[2]", "is empty – so"), Violation("user_id", "is empty")]
    refusal = Refusal(
        grpc.StatusCode.FAILED_PRECONDITION,
        "SO_AND_SO",
        "no, v9 is not",
        violations=violations,
        metadata={"policy": "v9", "served": "v1"},
        retry_after_seconds=1.5,
    )
    with serving(Script([refusal])) as address, pytest.raises(AligndError) as raised:
        call(address, "sample", "Hello", user_id="ada")
    error = pickle.loads(pickle.dumps(raised.value))
    assert str(error) == "FAILED_PRECONDITION: no, v9 is not"
    assert (error.code, error.reason, error.retry_after_seconds) == (refusal.code, "SO_AND_SO", 1.5)
    assert error.violations == tuple(FieldViolation(each.field, each.description) for each in violations)
    assert error.metadata == {"policy": "v9", "served": "v1"}


@both
@pytest.mark.parametrize("method", ["sample", "stream"])
def test_rules_are_checked_before_a_request_is_sent_if_that_is_asked_for(call: Call, method: str) -> None:
    """And broken ones are told as the server tells them."""
    told = []
    script = Script()
    sampling = SamplingParams(top_p=3, stop=["", "x"])
    with serving(script) as address:
        for validate in (True, False):
            with pytest.raises(AligndError) as raised:
                call(address, method, "Hello", user_id="", sampling=sampling, client={"validate": validate})
            error = raised.value
            told.append((error.code, error.reason, error.message, error.violations))
    assert script.requests == []
    assert told[0] == told[1]
    assert {each.field for each in told[0][3]} == {"user_id", "sampling.top_p", "sampling.stop[0]"}


def test_without_protovalidate_only_asking_for_it_is_an_error() -> None:
    script = "import sys; sys.modules['protovalidate'] = None\nfrom alignd.client import Client\nClient().close()\n"
    done = subprocess.run(
        [sys.executable, "-c", f"{script}Client(validate=True)"], capture_output=True, text=True, check=False
    )
    assert done.stderr.splitlines()[-1].endswith("pip install 'alignd-client[validate]'")
    assert 'File "<string>", line 4' in done.stderr  # the line before it, without validate, went well


@both
def test_the_api_key_goes_with_every_call(call: Call) -> None:
    script = Script()
    with serving(script) as address:
        call(address, "sample", "Hello", user_id="ada", client={"api_key": "k"})
        call(address, "stream", "Hello", user_id="ada", client={"api_key": "k"})
        call(address, "rank", "t", ["a", "b"], user_id="ada", client={"api_key": "k"})
        call(address, "sample", "Hello", user_id="ada")
    assert [each.get("authorization") for each in script.metadata] == ["Bearer k"] * 3 + [None]


@pytest.mark.parametrize(
    "address",
    ["alignd.example:50051", "10.0.0.1:50051", "[2001:db8::1]:50051", "dns:///alignd.example:1", "0.0.0.0:50051",
     "dns://10.0.0.1/localhost:50051", "ipv4:127.0.0.1:1,10.0.0.1:1", "xds:///alignd", "localhost.example", ""],
)  # fmt: skip
def test_an_api_key_never_leaves_the_machine_in_the_clear(address: str) -> None:
    for client in (Client, AsyncClient):
        with pytest.raises(ValueError, match="in the clear: pass credentials"):
            client(address, api_key="k")
    Client(address, api_key="k", credentials=grpc.ssl_channel_credentials()).close()
    Client(address).close()


@pytest.mark.parametrize(
    "address",
    ["localhost:50051", "localhost", "127.0.0.1:50051", "[::1]:50051", "dns:///localhost:50051", "dns:localhost:1",
     "ipv4:127.0.0.1:50051", "ipv6:[::1]:50051", "unix:/run/alignd.sock"],
)  # fmt: skip
def test_an_api_key_may_go_to_this_machine(address: str) -> None:
    Client(address, api_key="k").close()


@pytest.mark.parametrize("wrong", [{"max_attempts": 0}, {"max_attempts": 6}, {"timeout": 0}])
def test_a_number_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Client(**wrong)


def self_signed() -> tuple[bytes, bytes]:
    """A key and a certificate of localhost, as PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.datetime.now(datetime.UTC)
    names = x509.SubjectAlternativeName([x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))])
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(names, critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    return (
        key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()),
        certificate.public_bytes(pem),
    )


@both
def test_tls_is_an_argument(call: Call) -> None:
    key, certificate = self_signed()
    script = Script()
    trusting = {"credentials": grpc.ssl_channel_credentials(certificate), "api_key": "k"}
    with serving(script, credentials=grpc.ssl_server_credentials([(key, certificate)])) as address:
        assert call(address, "sample", "Hello", user_id="ada", client=trusting) == SAMPLE
        with pytest.raises(AligndError) as raised:
            call(address, "sample", "Hello", user_id="ada", client={"max_attempts": 1})
    assert raised.value.code is grpc.StatusCode.UNAVAILABLE
    assert [each["authorization"] for each in script.metadata] == ["Bearer k"]


def test_a_stream_that_is_left_ends_on_the_server() -> None:
    script = Script(hangs=True)
    with serving(script) as address, Client(address) as client:
        stream = client.stream("Hello", user_id="ada")
        assert next(stream).text == "a"  # type: ignore[union-attr]
        stream.close()  # type: ignore[attr-defined]
        assert script.cancelled.wait(30)


def test_a_stream_that_is_left_ends_on_the_server_for_asyncio_too() -> None:
    script = Script(hangs=True)

    async def leave(address: str) -> None:
        async with AsyncClient(address) as client:
            async with contextlib.aclosing(client.stream("Hello", user_id="ada")) as stream:  # type: ignore[type-var]
                async for _ in stream:
                    break
            assert await asyncio.to_thread(script.cancelled.wait, 5)

    with serving(script) as address:
        asyncio.run(leave(address))


def test_every_call_of_an_application_is_covered_by_the_retries() -> None:
    modules = (inference_service_pb2, feedback_service_pb2)
    names = [service.full_name for module in modules for service in module.DESCRIPTOR.services_by_name.values()]
    assert sorted(SERVICES) == sorted(names)


def test_details_that_are_none_hide_nothing_of_the_error() -> None:
    """Such as from somebody between client and server."""

    class Failed(grpc.RpcError):
        def code(self) -> grpc.StatusCode:
            return grpc.StatusCode.INTERNAL

        def details(self) -> str:
            return "broken"

        def trailing_metadata(self) -> Any:
            return (("grpc-status-details-bin", b"\x1a\x05\x0a\xff"),)

    error = read_error(Failed())
    assert (str(error), error.reason, error.violations) == ("INTERNAL: broken", "", ())
