"""How a client reaches its server: retries, deadline, TLS and API key, the same for both clients."""

import ipaddress
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import grpc
from google.protobuf.message import Message

SERVICES = ("alignd.v1.InferenceService", "alignd.v1.FeedbackService")
# The most tries that gRPC makes, whatever a service config asks for.
MOST_ATTEMPTS = 5
# The waits between tries where the server names none, such as while nothing listens: 0.5, 1.5, 4.5 and 10 s, give or
# take a fifth. Together they outlast a restart. Where it names one, by a RetryInfo with grpc-retry-pushback-ms beside
# it, gRPC waits that long.
_BACKOFF = {"initialBackoff": "0.5s", "backoffMultiplier": 3, "maxBackoff": "10s"}
# gRPC keeps a request for the next try only if it fits here, with its metadata. A server as shipped takes no longer
# ones, and refuses them by RESOURCE_EXHAUSTED, which is then not tried again in vain.
_RETRY_BUFFER_BYTES = 1 << 20
# Of the ways to name a server, those that cannot lead off this machine but by a host's name or address.
_SCHEMES = re.compile(r"^(dns:(///)?|ipv4:|ipv6:)")


@dataclass(frozen=True)
class Connection:
    """A server's address, and how every call to it is made.

    Raises:
        ValueError: the API key would go to another machine in the clear, or a number is out of range.
        ImportError: `validate` is asked for without protovalidate.
    """

    address: str
    credentials: grpc.ChannelCredentials | None
    api_key: str
    timeout: float
    max_attempts: int
    validate: bool

    def __post_init__(self) -> None:
        if self.api_key and self.credentials is None and not _stays_here(self.address):
            raise ValueError(
                f"the API key would go to {self.address} in the clear: pass credentials, "
                "such as grpc.ssl_channel_credentials()"
            )
        if not 1 <= self.max_attempts <= MOST_ATTEMPTS:
            raise ValueError(f"max_attempts is 1 to {MOST_ATTEMPTS}, not {self.max_attempts}")
        if self.timeout <= 0:
            raise ValueError(f"timeout is a number of seconds, more than 0, not {self.timeout}")
        if self.validate:
            _check_by_rules()

    def options(self) -> list[tuple[str, Any]]:
        """Returns the channel's options."""
        options: list[tuple[str, Any]] = [
            ("grpc.service_config", json.dumps(_service_config(self.max_attempts))),
            ("grpc.per_rpc_retry_buffer_size", _RETRY_BUFFER_BYTES),
        ]
        if _stays_here(self.address):
            # Or http_proxy would lead what is meant for this machine off it.
            options.append(("grpc.enable_http_proxy", 0))
        return options

    def per_call(self, timeout: float | None) -> dict[str, Any]:
        """Returns the deadline, in seconds from now over all tries, and the metadata of a call."""
        metadata = (("authorization", f"Bearer {self.api_key}"),) if self.api_key else ()
        return {"timeout": self.timeout if timeout is None else timeout, "metadata": metadata}

    def check(self, request: Message) -> None:
        """Refuses a request that breaks the contract's rules, if that was asked for.

        Raises:
            AligndError: INVALID_ARGUMENT, with the fields at fault.
        """
        if self.validate:
            _check_by_rules()(request)


def _check_by_rules() -> Callable[[Message], None]:
    """Returns the check by protovalidate, which is loaded only where it is asked for."""
    from alignd.client import rules

    return rules.check


def _service_config(max_attempts: int) -> Mapping[str, Any]:
    """Returns gRPC's service config: each method of an application is safe to retry on what asks for it."""
    method: dict[str, Any] = {"name": [{"service": service} for service in SERVICES]}
    if max_attempts > 1:
        codes = ["UNAVAILABLE", "RESOURCE_EXHAUSTED"]
        method["retryPolicy"] = {"maxAttempts": max_attempts, **_BACKOFF, "retryableStatusCodes": codes}
    return {"methodConfig": [method]}


def _stays_here(address: str) -> bool:
    """Whether all that is sent to this address stays on this machine."""
    if address.startswith(("unix:", "unix-abstract:")):
        return True
    return all(_is_loopback(each) for each in _SCHEMES.sub("", address).split(","))


def _is_loopback(host_and_port: str) -> bool:
    """Whether a host is this machine; it stands with or without a port, and in brackets if it is IPv6."""
    bracketed = re.fullmatch(r"\[([^\]]*)\](:\d+)?", host_and_port)
    host = bracketed[1] if bracketed else re.sub(r"^([^:]*):[^:]*$", r"\1", host_and_port)
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
