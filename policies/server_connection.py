"""How alignd's own processes reach a server: its address, TLS, and the key that they call it with."""

from __future__ import annotations

import ipaddress
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import grpc


class ServerConnectionError(Exception):
    """The server cannot be called so: a file cannot be read, or a key would go over the network in clear."""


_MOST_ANSWER_BYTES = 64 << 20


@dataclass(frozen=True)
class Tls:
    """What a caller checks a server by, and shows it; all in PEM."""

    ca: Path | None = None
    """The roots that the server's certificate must lead to. None: those of the machine."""
    certificate: Path | None = None
    """The caller's own, where the server asks for one."""
    key: Path | None = None
    server_name: str = ""
    """The name that the server's certificate must have, where that is not the one in its address."""


@dataclass(frozen=True)
class ServerConnection:
    """Where a server is, and how it is called."""

    address: str
    tls: Tls | None = None
    key_file: Path | None = None
    """Has the API key. It is read for each call, so that a rotated key counts at once."""
    api_key: str = field(default="", repr=False)
    """The key itself, in place of a file."""

    def channel(self, options: Sequence[tuple[str, Any]] = ()) -> grpc.Channel:
        """Returns a channel by which every call carries the key.

        Raises:
            ServerConnectionError: a certificate cannot be read.
        """
        credentials = self.credentials()
        named = [*options, *self.options()]
        channel = (
            grpc.secure_channel(self.address, credentials, named)
            if credentials
            else grpc.insecure_channel(self.address, named)
        )
        return grpc.intercept_channel(channel, _WithKey(self.metadata))

    def async_channel(self) -> grpc.aio.Channel:
        """Returns a channel for an event loop. Its calls need `metadata`.

        Raises:
            ServerConnectionError: a certificate cannot be read.
        """
        credentials = self.credentials()
        if credentials:
            return grpc.aio.secure_channel(self.address, credentials, self.options())
        return grpc.aio.insecure_channel(self.address, self.options())

    def options(self) -> list[tuple[str, Any]]:
        """Returns the options of a channel that this connection needs."""
        named = self.tls.server_name if self.tls else ""
        options: list[tuple[str, Any]] = [("grpc.max_receive_message_length", _MOST_ANSWER_BYTES)]
        if named:
            options.append(("grpc.ssl_target_name_override", named))
        if stays_here(self.address):
            # Or http_proxy would lead what is meant for this machine off it.
            options.append(("grpc.enable_http_proxy", 0))
        return options

    def credentials(self) -> grpc.ChannelCredentials | None:
        """Returns what a channel checks the server by; None to speak in clear.

        Raises:
            ServerConnectionError: a certificate cannot be read.
        """
        if self.tls is None:
            return None
        return grpc.ssl_channel_credentials(*map(_read, (self.tls.ca, self.tls.key, self.tls.certificate)))

    def files_version(self) -> tuple[tuple[int, int], ...]:
        """Returns what changes when a file changes by which the server is checked: then a new channel is needed."""
        if self.tls is None:
            return ()
        found = [path.stat() for path in (self.tls.ca, self.tls.certificate, self.tls.key) if path and path.exists()]
        return tuple((each.st_ino, each.st_mtime_ns) for each in found)

    def key(self) -> str:
        """Returns the API key; empty if there is none."""
        if self.api_key or self.key_file is None:
            return self.api_key
        try:
            return self.key_file.read_text().strip()
        except OSError:
            # The server says what it needs; on a machine of its own it may need nothing.
            return ""

    def metadata(self) -> tuple[tuple[str, str], ...]:
        """Returns the metadata of a call.

        Raises:
            ServerConnectionError: the key would go to another machine in clear.
        """
        key = self.key()
        if key and self.tls is None and not stays_here(self.address):
            raise ServerConnectionError(
                f"the API key would go to {self.address} in clear: set client.tls = true, and client.tls_ca if its "
                "certificate leads to no root of this machine"
            )
        return (("authorization", f"Bearer {key}"),) if key else ()


def stays_here(address: str) -> bool:
    """Whether all that is sent to this host:port stays on this machine."""
    host = address.rpartition(":")[0].strip("[]")
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


class _WithKey(grpc.UnaryUnaryClientInterceptor, grpc.UnaryStreamClientInterceptor):
    """Adds the key to each call."""

    def __init__(self, metadata: Callable[[], tuple[tuple[str, str], ...]]) -> None:
        self._metadata = metadata

    def intercept_unary_unary(self, continuation: Any, details: Any, request: Any) -> Any:
        return continuation(self._with_key(details), request)

    def intercept_unary_stream(self, continuation: Any, details: Any, request: Any) -> Any:
        return continuation(self._with_key(details), request)

    def _with_key(self, details: Any) -> Any:
        return details._replace(metadata=(*(details.metadata or ()), *self._metadata()))


def _read(path: Path | None) -> bytes | None:
    try:
        return path.read_bytes() if path else None
    except OSError as error:
        raise ServerConnectionError(f"{path} cannot be read: {error.strerror}") from error
