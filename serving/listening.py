"""Where the server listens, and how it treats connections: the port, pings, and what is said when the port fails."""

import errno
import os
import socket
from typing import Any

import grpc

from serving.access.certificates import CertificateError, Certificates
from serving.config import ServingConfig

# By default gRPC allows a client one ping in five minutes, and closes the connection of one that sends more. Clients
# behind a load balancer send one every ten seconds or so, since it would drop what is silent for long.
_MIN_PING_INTERVAL_MS = 1_000
# A client that vanished, without a word from its machine, is noticed after these together.
_PING_AFTER_MS, _PING_TIMEOUT_MS = 30_000, 15_000
_CAUSES = {
    errno.EADDRINUSE: "another process listens there; end it, or choose another serving.port",
    errno.EADDRNOTAVAIL: "this machine has no such address; set serving.host to one that it has, or to 0.0.0.0",
    errno.EACCES: "this user may not; choose a serving.port of 1024 or more",
    errno.EAFNOSUPPORT: "this machine has no addresses of that kind; set serving.host to one that it has",
}


class ListenError(Exception):
    """The server cannot listen where it should; the text says why, and what to set."""


def options(max_message_mib: int, ping_after_ms: int = _PING_AFTER_MS) -> list[tuple[str, Any]]:
    """Returns the server's options. After `ping_after_ms` of silence, a client is asked whether it is there."""
    return [
        ("grpc.max_receive_message_length", max_message_mib << 20),
        ("grpc.so_reuseport", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", _MIN_PING_INTERVAL_MS),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.keepalive_time_ms", ping_after_ms),
        # The second closes the connection where a ping is not answered, the first where nothing at all can be sent.
        ("grpc.keepalive_timeout_ms", min(ping_after_ms, _PING_TIMEOUT_MS)),
        ("grpc.http2.ping_timeout_ms", min(ping_after_ms, _PING_TIMEOUT_MS)),
    ]


def listen(server: grpc.aio.Server, config: ServingConfig) -> int:
    """Opens the port, and returns it.

    Raises:
        ListenError: the port cannot be opened, or the certificate cannot be used.
    """
    try:
        if config.tls_certificate and config.tls_key:
            files = Certificates(config.tls_certificate, config.tls_key, config.tls_client_ca)
            return server.add_secure_port(config.listen_address, files.credentials())
        return server.add_insecure_port(config.listen_address)
    except CertificateError as error:
        raise ListenError(str(error)) from error
    except RuntimeError as error:
        why = _cause(config.host, config.port) or str(error)
        raise ListenError(f"cannot listen on {config.listen_address}: {why}") from error


def _cause(host: str, port: int) -> str:
    """Returns why this port cannot be opened, as the machine says it; "" if it says nothing."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
            probe.listen()
    except (socket.gaierror, UnicodeError):
        return "no machine has this name; set serving.host to an address of this machine, such as 127.0.0.1 or ::1"
    except OSError as error:
        return _CAUSES.get(error.errno or 0, os.strerror(error.errno or 0))
    return ""
