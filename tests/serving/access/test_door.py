"""The door and TLS on a real server: who gets in, who does not, and what changes while it runs."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import trustme
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from alignd.client import AsyncClient
from alignd.v1 import inference_service_pb2 as inference
from alignd.v1 import inference_service_pb2_grpc, policy_service_pb2_grpc
from alignd.v1 import policy_service_pb2 as policies
from policies.server_connection import ServerConnection, ServerConnectionError, Tls
from serving.access.callers import caller
from serving.access.certificates import CertificateError, Certificates
from serving.access.door import Door
from serving.access.keys import KeysFile, create_key, revoke_key
from serving.boundary import Boundary
from serving.config import ServingConfig
from serving.listening import ListenError, listen
from tests.serving.calls import sample_request

CALL_SECONDS = 20.0


class Echo(inference_service_pb2_grpc.InferenceServiceServicer):
    """Answers with who called."""

    async def Sample(self, request: Any, context: Any) -> inference.SampleResponse:  # noqa: N802
        await asyncio.sleep(0.01)
        return inference.SampleResponse(sample_id=f"{caller().name} of {caller().application}")

    async def StreamSample(self, request: Any, context: Any) -> AsyncIterator[inference.StreamSampleResponse]:  # noqa: N802
        await asyncio.sleep(0.01)
        yield inference.StreamSampleResponse(finished=inference.SampleResponse(sample_id=caller().name))


class Running:
    """A server with keys, and certificates if it is given any."""

    def __init__(self, folder: Path, **settings: Any) -> None:
        self.keys = folder / "api_keys.json"
        self.config = ServingConfig(port=0, **{"require_keys": True, **settings})
        self.address = ""

    async def __aenter__(self) -> "Running":
        door = Door(KeysFile(self.keys), needs_key=self.config.needs_key)
        self.server = grpc.aio.server(interceptors=[door, Boundary(30.0, {})])
        inference_service_pb2_grpc.add_InferenceServiceServicer_to_server(Echo(), self.server)
        health_pb2_grpc.add_HealthServicer_to_server(health.aio.HealthServicer(), self.server)
        self.address = f"localhost:{listen(self.server, self.config)}"
        await self.server.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.server.stop(0)

    def key(self, name: str, **options: Any) -> str:
        return create_key(self.keys, name, options.get("application", "shop"), options.get("scopes", ["sample"]), "a")[
            1
        ]


async def sample(server: ServerConnection) -> str:
    """Returns who the server says has called."""
    async with server.async_channel() as channel:
        stub: Any = inference_service_pb2_grpc.InferenceServiceStub(channel)
        answer = await stub.Sample(sample_request(), timeout=CALL_SECONDS, metadata=server.metadata())
        return str(answer.sample_id)


async def refused(server: ServerConnection) -> grpc.StatusCode:
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await sample(server)
    return raised.value.code()


async def test_a_handler_learns_who_calls_and_a_stranger_is_refused(tmp_path: Path) -> None:
    async with Running(tmp_path) as running:
        keys = {name: running.key(name, application=f"app-{name}") for name in ("one", "two")}
        calls = [sample(ServerConnection(running.address, api_key=keys[n])) for n in ("one", "two") * 5]
        assert await asyncio.gather(*calls) == ["one of app-one", "two of app-two"] * 5
        assert await refused(ServerConnection(running.address)) is grpc.StatusCode.UNAUTHENTICATED
        wrong = running.key("ranks", scopes=["feedback"])
        assert await refused(ServerConnection(running.address, api_key=wrong)) is grpc.StatusCode.PERMISSION_DENIED
        async with AsyncClient(running.address, api_key=keys["one"]) as client:
            streamed = [each async for each in client.stream("Hi", user_id="ada")]
        assert [each.sample_id for each in streamed if isinstance(each, inference.SampleResponse)] == ["one"]
        async with grpc.aio.insecure_channel(running.address) as channel:
            stub: Any = health_pb2_grpc.HealthStub(channel)
            assert (await stub.Check(health_pb2.HealthCheckRequest(), timeout=CALL_SECONDS)).status


async def test_a_key_counts_from_when_it_is_made_until_it_is_revoked(tmp_path: Path) -> None:
    async with Running(tmp_path) as running:
        server = ServerConnection(running.address, key_file=tmp_path / "key")
        assert await refused(server) is grpc.StatusCode.UNAUTHENTICATED
        server.key_file.write_text(running.key("web") + "\n")  # type: ignore[union-attr]
        assert await sample(server) == "web of shop"
        revoke_key(running.keys, "web", "ada")
        assert await refused(server) is grpc.StatusCode.UNAUTHENTICATED


class Endless(policy_service_pb2_grpc.PolicyServiceServicer):
    """Has one change, and waits for the next one for ever."""

    async def Watch(self, request: Any, context: Any) -> AsyncIterator[policies.WatchResponse]:  # noqa: N802
        yield policies.WatchResponse(revision=1)
        await asyncio.Event().wait()


async def test_a_stream_without_end_ends_with_its_key(tmp_path: Path) -> None:
    keys = tmp_path / "keys.json"
    secret = create_key(keys, "watcher", "", ["operate"], "ada")[1]
    server = grpc.aio.server(interceptors=[Door(KeysFile(keys), needs_key=True), Boundary(30.0, {})])
    policy_service_pb2_grpc.add_PolicyServiceServicer_to_server(Endless(), server)
    address = f"localhost:{server.add_insecure_port('localhost:0')}"
    await server.start()
    reached = ServerConnection(address, api_key=secret)
    async with reached.async_channel() as channel:
        stub: Any = policy_service_pb2_grpc.PolicyServiceStub(channel)
        seen = []
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            async for change in stub.Watch(policies.WatchRequest(), timeout=CALL_SECONDS, metadata=reached.metadata()):
                seen.append(change.revision)
                revoke_key(keys, "watcher", "ada")
        assert (seen, raised.value.code()) == ([1], grpc.StatusCode.UNAUTHENTICATED)
    await server.stop(0)


def test_a_key_does_not_leave_this_machine_in_clear() -> None:
    away = ServerConnection("gpu-box:50051", api_key="alignd_x")
    with pytest.raises(ServerConnectionError, match="would go to gpu-box:50051 in clear"):
        away.metadata()
    for here in ("localhost:1", "127.0.0.1:1", "[::1]:1"):
        assert ServerConnection(here, api_key="k").metadata()
    assert ServerConnection("gpu-box:1").metadata() == ()
    assert "alignd_x" not in repr(away)


@pytest.fixture(scope="module")
def roots() -> tuple[trustme.CA, trustme.CA]:
    return trustme.CA(), trustme.CA()


def write_pair(folder: Path, name: str, issued: trustme.LeafCert) -> tuple[Path, Path]:
    certificate, key = folder / f"{name}.crt", folder / f"{name}.key"
    key.write_bytes(issued.private_key_pem.bytes())
    certificate.write_bytes(b"".join(each.bytes() for each in issued.cert_chain_pems))
    return certificate, key


def write_root(folder: Path, name: str, root: trustme.CA) -> Path:
    path = folder / f"{name}.crt"
    path.write_bytes(root.cert_pem.bytes())
    return path


async def test_tls_is_spoken_to_whoever_knows_the_root_and_to_nobody_in_clear(
    tmp_path: Path, roots: tuple[trustme.CA, trustme.CA]
) -> None:
    ours, others = roots
    certificate, key = write_pair(tmp_path, "server", ours.issue_cert("localhost"))
    known, unknown = write_root(tmp_path, "known", ours), write_root(tmp_path, "unknown", others)
    async with Running(tmp_path, tls_certificate=certificate, tls_key=key) as running:
        secret = running.key("web")
        assert await sample(ServerConnection(running.address, Tls(known), api_key=secret)) == "web of shop"
        for tls in (Tls(unknown), None):
            assert await refused(ServerConnection(running.address, tls, api_key=secret)) is grpc.StatusCode.UNAVAILABLE
        # The files change: new connections meet the new certificate, by another root. Bad files change nothing.
        key.write_text("no key")
        assert await sample(ServerConnection(running.address, Tls(known), api_key=secret)) == "web of shop"
        write_pair(tmp_path, "server", others.issue_cert("localhost"))
        assert await sample(ServerConnection(running.address, Tls(unknown), api_key=secret)) == "web of shop"


async def test_mtls_lets_in_only_who_has_a_certificate_of_its_root(
    tmp_path: Path, roots: tuple[trustme.CA, trustme.CA]
) -> None:
    ours, others = roots
    certificate, key = write_pair(tmp_path, "server", ours.issue_cert("localhost"))
    root = write_root(tmp_path, "root", ours)
    settings = {"tls_certificate": certificate, "tls_key": key, "tls_client_ca": root}
    async with Running(tmp_path, **settings) as running:
        secret = running.key("web")
        good, bad = (write_pair(tmp_path, n, ca.issue_cert("client")) for n, ca in (("good", ours), ("bad", others)))
        assert await sample(ServerConnection(running.address, Tls(root, *good), api_key=secret)) == "web of shop"
        for tls in (Tls(root, *bad), Tls(root)):
            assert await refused(ServerConnection(running.address, tls, api_key=secret)) is grpc.StatusCode.UNAVAILABLE


async def test_certificates_that_cannot_be_used_are_said(tmp_path: Path, roots: tuple[trustme.CA, trustme.CA]) -> None:
    certificate, key = write_pair(tmp_path, "server", roots[0].issue_cert("localhost"))
    _, other = write_pair(tmp_path, "other", roots[0].issue_cert("localhost"))
    for pair, why in (
        ((tmp_path / "none", key), "cannot be read"), ((key, key), "no certificate in PEM"),
        ((certificate, certificate), "no private key in PEM"), ((certificate, other), "are no pair"),
    ):  # fmt: skip
        with pytest.raises(CertificateError, match=why):
            Certificates(*pair).credentials()
    config = ServingConfig(port=0, tls_certificate=certificate, tls_key=other)
    with pytest.raises(ListenError, match="are no pair"):
        listen(grpc.aio.server(), config)
