"""Calls a server as from a shell: by grpcurl or by buf curl, which know the contracts by reflection alone."""

import base64
import json
import subprocess
import sysconfig
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from google.rpc import error_details_pb2

from tests.tools import find_tool

TIMEOUT_SECONDS = 60


@dataclass(frozen=True)
class Answer:
    """What a call came to: a message, or an error with the fields that its google.rpc.BadRequest names."""

    message: Mapping[str, Any]
    code: str = "ok"
    fields: Sequence[str] = ()


@dataclass(frozen=True)
class StockClient:
    """A client that nobody here wrote."""

    name: str
    methods: Callable[[str], Sequence[str]]
    """The full names of all methods of the server at an address."""
    call: Callable[[str, str, object, str], Answer]
    """Calls the method of this full name, such as alignd.v1.PolicyService/Promote, of the server at an address, with an
    API key."""


def stock_clients() -> list[StockClient]:
    """Returns buf curl, which is among the pinned packages, and grpcurl where it is found."""
    clients = [StockClient("buf curl", _buf_methods, _buf_call)]
    try:
        find_tool("grpcurl")
    except FileNotFoundError:
        return clients
    return [*clients, StockClient("grpcurl", _grpcurl_methods, _grpcurl_call)]


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, timeout=2 * TIMEOUT_SECONDS, check=False)


def _buf(*arguments: str) -> subprocess.CompletedProcess[str]:
    return _run(str(Path(sysconfig.get_path("scripts"), "buf")), "curl", "--protocol", "grpc", *arguments)


def _buf_methods(address: str) -> Sequence[str]:
    return _buf("--list-methods", f"http://{address}").stdout.split()


def _buf_call(address: str, method: str, data: object, key: str) -> Answer:
    done = _buf("-H", f"authorization: Bearer {key}", "--data", json.dumps(data), f"http://{address}/{method}")
    if done.returncode == 0:
        return Answer(json.loads(done.stdout))
    error = json.loads(done.stderr)
    fields: list[str] = []
    for detail in error.get("details", ()):
        if detail["type"] == "google.rpc.BadRequest":
            packed = base64.b64decode(detail["value"] + "==")
            request = error_details_pb2.BadRequest.FromString(packed)
            fields += [each.field for each in request.field_violations]
    return Answer({}, error["code"], fields)


def _grpcurl(*arguments: str) -> subprocess.CompletedProcess[str]:
    return _run(str(find_tool("grpcurl")), "-plaintext", "-max-time", str(TIMEOUT_SECONDS), *arguments)


def _grpcurl_methods(address: str) -> Sequence[str]:
    services = _grpcurl(address, "list").stdout.split()
    methods = [method for service in services for method in _grpcurl(address, "list", service).stdout.split()]
    return ["/".join(method.rsplit(".", 1)) for method in methods]


def _grpcurl_call(address: str, method: str, data: object, key: str) -> Answer:
    header = f"authorization: Bearer {key}"
    done = _grpcurl("-H", header, "-format-error", "-d", json.dumps(data), address, method)
    if done.returncode == 0:
        return Answer(json.loads(done.stdout))
    error = json.loads(done.stderr)
    violations = [each for detail in error.get("details", ()) for each in detail.get("field_violations", ())]
    return Answer({}, CODES[error["code"]], [each["field"] for each in violations])


# Those that the tests meet, as grpcurl numbers and buf names them.
CODES = {3: "invalid_argument", 5: "not_found"}
