"""Where the server listens: IPv4 and IPv6, and a sentence instead of a traceback where it cannot."""

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from deploy.cli import main
from deploy.config import AligndConfig, ConfigError
from deploy.up import free_port
from serving.config import ServingConfig
from serving.listening import ListenError, listen


@pytest.fixture
def taken() -> Iterator[int]:
    """A port of this machine on which another process listens."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        yield other.getsockname()[1]


@pytest.mark.parametrize(
    ("host", "address"),
    [
        ("127.0.0.1", "127.0.0.1:5000"),
        ("localhost", "localhost:5000"),
        ("::1", "[::1]:5000"),
        ("[::1]", "[::1]:5000"),
        ("::", "[::]:5000"),
        ("fe80::1%eth0", "[fe80::1%eth0]:5000"),
    ],
)
def test_an_ipv6_address_has_brackets_before_its_port(host: str, address: str) -> None:
    config = ServingConfig(host=host, port=5000, allow_cleartext=True)
    assert config.listen_address == address
    # What listens on all addresses is called by the one that does not leave the machine.
    assert AligndConfig(serving=config).server_address == address.replace("[::]", "[::1]")


@pytest.mark.parametrize("host", ["", "a b", "127.0.0.1:80", "localhost:80", "[::1", "::1]", "http://x", "::1::"])
def test_what_is_no_host_is_refused(host: str) -> None:
    with pytest.raises(ValidationError, match="must be a name or an address without a port"):
        ServingConfig(host=host)


@pytest.mark.parametrize("host", ["::", "0.0.0.0", "192.0.2.1", "alignd.example"])
def test_nobody_is_heard_in_clear_over_a_network_unless_it_is_asked_for(host: str) -> None:
    with pytest.raises(ValidationError, match="is more than this machine: set tls_certificate and tls_key"):
        ServingConfig(host=host)
    assert ServingConfig(host=host, allow_cleartext=True).needs_key
    assert not ServingConfig(host=host, allow_cleartext=True, require_keys=False).needs_key
    assert not ServingConfig().needs_key
    with pytest.raises(ValidationError, match="are set together"):
        ServingConfig(tls_certificate="server.crt")


@pytest.mark.parametrize("host", ["::1", "[::1]", "::", "0.0.0.0"])
async def test_it_listens_where_it_is_told(host: str) -> None:
    server = grpc.aio.server()
    port = listen(server, ServingConfig(host=host, port=0, allow_cleartext=True))
    await server.start()
    loopback = "127.0.0.1" if host == "0.0.0.0" else "[::1]"
    async with grpc.aio.insecure_channel(f"{loopback}:{port}") as channel:
        with pytest.raises(grpc.aio.AioRpcError) as raised:
            await channel.unary_unary("/nothing")(b"", timeout=20)
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED
    await server.stop(0)


@pytest.mark.parametrize(
    ("host", "says"),
    [
        ("no.such.host.invalid", "no machine has this name; set serving.host"),
        ("192.0.2.1", "this machine has no such address; set serving.host"),
    ],
)
async def test_a_host_that_is_not_this_machine_is_said(host: str, says: str) -> None:
    with pytest.raises(ListenError, match=says):
        listen(grpc.aio.server(), ServingConfig(host=host, allow_cleartext=True))
    with pytest.raises(ConfigError, match=f"serving.host: nobody can listen on {host}"):
        free_port(host)


def test_a_taken_port_ends_the_server_with_a_sentence(
    taken: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings: dict[str, Any] = {"DATA_DIR": tmp_path, "SERVING__PORT": taken}
    for name, value in settings.items():
        monkeypatch.setenv(f"ALIGND_{name}", str(value))
    done = CliRunner().invoke(main.app, ["serve"])
    assert done.exit_code == main.EXIT_FAILED
    said = f"cannot listen on 127.0.0.1:{taken}: another process listens there; end it, or choose another serving.port"
    assert said in done.output


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_free_port_is_found_on_either_kind_of_address(host: str) -> None:
    assert free_port(host) > 0
