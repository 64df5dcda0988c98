"""A client that speaks HTTP/2 frame by frame, for what no client does that was made to be used."""

import socket
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

DATA, HEADERS, SETTINGS, PING, GOAWAY, WINDOW_UPDATE = 0, 1, 4, 6, 7, 8
ACK = END_STREAM = 1
_END_HEADERS = 4
_INITIAL_WINDOW_SIZE = 4
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


@dataclass(frozen=True)
class Frame:
    """One frame that the server sent."""

    kind: int
    flags: int
    payload: bytes


def frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes([kind, flags]) + stream.to_bytes(4, "big") + payload


def message(raw: bytes, claimed: int | None = None) -> bytes:
    """Returns a message as gRPC frames it; it may claim another length than it has."""
    return b"\0" + struct.pack(">I", len(raw) if claimed is None else claimed) + raw


class Connection:
    """One connection, with one call at most."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._received = connected.makefile("rb")

    def call(self, path: str, data: bytes, *, ended: bool = True) -> None:
        """Begins a call with this data."""
        headers = {
            ":method": "POST",
            ":scheme": "http",
            ":path": path,
            ":authority": "localhost",
            "te": "trailers",
            "content-type": "application/grpc",
        }
        pairs = (bytes([len(text)]) + text.encode() for item in headers.items() for text in item)
        literal = b"".join(b"\0" * (index % 2 == 0) + text for index, text in enumerate(pairs))
        self.send(frame(HEADERS, _END_HEADERS, 1, literal) + frame(DATA, END_STREAM if ended else 0, 1, data))

    def send(self, raw: bytes) -> None:
        self._socket.sendall(raw)

    def read_on(self) -> None:
        """Lets the server send, if it had to wait for that."""
        room = struct.pack(">I", 1 << 24)
        self.send(frame(WINDOW_UPDATE, 0, 0, room) + frame(WINDOW_UPDATE, 0, 1, room))

    def wait_answered(self) -> None:
        """Waits until the server begins to answer the call, which must not be refused."""
        begun = next(each for each in self.frames() if each.kind == HEADERS)
        assert not begun.flags & END_STREAM, begun.payload

    def frames(self) -> Iterator[Frame]:
        """Yields what the server sends, until it ends the call or the connection."""
        while len(head := self._received.read(9)) == 9:
            received = Frame(head[3], head[4], self._received.read(int.from_bytes(head[:3], "big")))
            yield received
            if received.kind == HEADERS and received.flags & END_STREAM:
                return

    def messages(self) -> tuple[list[bytes], bytes]:
        """Returns the messages of the call, and the payload of the trailers that ended it."""
        received = list(self.frames())
        data, found = b"".join(each.payload for each in received if each.kind == DATA), []
        while data:
            end = 5 + int.from_bytes(data[1:5], "big")
            found.append(data[5:end])
            data = data[end:]
        return found, received[-1].payload


@contextmanager
def connect(address: str, *, window: int = 65535) -> Iterator[Connection]:
    """Yields a connection on which the server may send so many bytes of a call before it is told to go on."""
    host, port = address.split(":")
    with socket.create_connection((host, int(port)), timeout=20) as connected:
        connected.sendall(PREFACE + frame(SETTINGS, 0, 0, struct.pack(">HI", _INITIAL_WINDOW_SIZE, window)))
        yield Connection(connected)
