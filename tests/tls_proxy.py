"""A proxy that speaks TLS as PostgreSQL does, before a PostgreSQL that was built without it, as in tests."""

import contextlib
import socket
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import trustme

_GSS_REQUEST = b"\x00\x00\x00\x08\x04\xd2\x16\x30"
_SSL_REQUEST = b"\x00\x00\x00\x08\x04\xd2\x16\x2f"


@contextmanager
def postgres_by_tls(root: trustme.CA, port: int) -> Iterator[int]:
    """Gives the port of a proxy to the PostgreSQL at `port`, with a certificate for localhost. It takes TLS alone."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    root.issue_cert("localhost").configure_cert(context)
    with socket.create_server(("127.0.0.1", 0)) as listening:
        threading.Thread(target=_accept, args=(listening, context, port), daemon=True).start()
        yield listening.getsockname()[1]
        listening.shutdown(socket.SHUT_RDWR)


def _accept(listening: socket.socket, context: ssl.SSLContext, port: int) -> None:
    with contextlib.suppress(OSError):
        while True:
            client, _ = listening.accept()
            threading.Thread(target=_serve, args=(client, context, port), daemon=True).start()


def _serve(client: socket.socket, context: ssl.SSLContext, port: int) -> None:
    with contextlib.suppress(OSError), client:
        asked = client.recv(8)
        if asked == _GSS_REQUEST:
            client.sendall(b"N")
            asked = client.recv(8)
        if asked != _SSL_REQUEST:
            return
        client.sendall(b"S")
        # Both directions from one thread, as a TLS socket wants it.
        with (
            context.wrap_socket(client, server_side=True) as spoken,
            socket.create_connection(("127.0.0.1", port)) as server,
        ):
            spoken.settimeout(0.02)
            server.settimeout(0.02)
            while _passed(spoken, server) and _passed(server, spoken):
                pass


def _passed(source: socket.socket, target: socket.socket) -> bool:
    """Passes on what there is. Whether the source is still open."""
    try:
        data = source.recv(1 << 16)
    except TimeoutError:
        return True
    target.sendall(data)
    return bool(data)
