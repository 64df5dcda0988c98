"""Settings of the gRPC server and its engine."""

import ipaddress
import re
from pathlib import Path
from typing import Literal, Self
from urllib.parse import parse_qsl, urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator, model_validator

_REDIS_TLS = {"ssl_ca_certs", "ssl_certfile", "ssl_keyfile"}
_NAME_OR_IPV4 = re.compile(r"[\w.-]+")


class LimitsConfig(BaseModel):
    """What a key, and a user within it, may ask for."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    store: SecretStr = Field(
        SecretStr(""),
        description="A Redis in which all replicas count requests and tokens together: redis://host:6379/0, or "
        "rediss:// with TLS. Empty: each replica counts for itself. Completions in flight are counted by each replica.",
    )

    requests_per_minute: int | None = Field(
        None, ge=1, description="Requests of a key in a minute, for samples and for feedback each. Not set: no limit."
    )
    tokens_per_minute: int | None = Field(
        None, ge=1, description="Tokens of a key's samples in a minute, prompts and completions together."
    )
    inflight_completions: int | None = Field(None, ge=1, description="Completions of a key that are being written.")
    user_requests_per_minute: int | None = Field(None, ge=1, description="The same for each user: requests.")
    user_tokens_per_minute: int | None = Field(None, ge=1, description="The same for each user: tokens.")
    user_inflight_completions: int | None = Field(
        None, ge=1, description="The same for each user: completions being written."
    )

    @field_validator("store")
    @classmethod
    def _store_is_redis(cls, store: SecretStr) -> SecretStr:
        if store.get_secret_value() and not _is_redis(store.get_secret_value()):
            raise ValueError(
                "must be redis://host:port/database, or rediss:// with TLS; special characters of a password are "
                "written as %23 and the like"
            )
        return store


class ServingConfig(BaseModel):
    """Settings of one serving replica."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="Address to listen on. 0.0.0.0 for all interfaces, :: with IPv6.")
    port: int = Field(50051, ge=0, le=65535, description="TCP port of the gRPC server. 0 takes a free one.")
    require_keys: bool | None = Field(
        None,
        description="Whether callers need an API key to sample and to rank; for all else they always do. Not set: if "
        "`host` is more than this machine.",
    )
    tls_certificate: Path | None = Field(
        None, description="The server's certificate, with those up to its root, in PEM; read again when it changes."
    )
    tls_key: Path | None = Field(None, description="The key of this certificate, in PEM.")
    tls_client_ca: Path | None = Field(
        None, description="The root of callers' certificates, in PEM. If it is set, callers need one (mTLS)."
    )
    allow_cleartext: bool = Field(
        False, description="Listen without TLS although others reach `host`, such as where a proxy before it has TLS."
    )
    replica_id: str = Field("serving-0", min_length=1, max_length=64, description="Names this replica in reports.")
    initial_model: Path | None = Field(
        None, description="Hugging Face model folder that becomes version 1 when no policy is registered yet."
    )
    max_model_len: int | None = Field(
        None,
        ge=32,
        description="Most tokens of a prompt and its completion together. Default: 1024, or as many as the model takes "
        "if those are fewer.",
    )
    default_max_tokens: int = Field(64, ge=1, description="Most tokens of a completion when a request does not say.")
    max_inflight_completions: int = Field(
        64, ge=16, description="Completions generated at a time; a request beyond them is refused with a retry delay."
    )
    max_message_mib: int = Field(1, ge=1, description="Longest request taken, in MiB.")
    stream_interval_seconds: float = Field(
        0.02, ge=0, description="StreamSample sends new text at most this often, in seconds."
    )
    stream_stall_seconds: float = Field(
        30.0, gt=0, description="A stream is ended when its client has read nothing for so long, in seconds."
    )
    drain_timeout_seconds: float = Field(
        20.0, ge=0, description="How long a swap waits for requests in flight; it then marks them and continues."
    )
    engine_timeout_seconds: float = Field(
        60.0,
        ge=1,
        description="How long the engine may take for a token; it then counts as hung, and is started again. More than "
        "it takes to read one prompt of max_model_len tokens.",
    )
    shutdown_grace_seconds: float = Field(30.0, ge=0, description="How long a stop waits for requests in flight.")
    probe_tolerance: float = Field(
        0.1,
        gt=0,
        description="Largest mean difference of served and trained log-probabilities, in nats, that proves a swap. "
        "Two ways of computing in bf16 differ by 0.05 on CPUs without AMX; versions some rounds of PPO apart by 0.2.",
    )
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto",
        description="Precision of the engine. auto: bfloat16, or float32 on a CPU that has no instructions for it.",
    )
    compile: bool = Field(
        False,
        description="Let vLLM compile the model on a GPU: slower to start, faster then. Needs a C compiler and "
        "Python's headers, and is refused on a CPU, where nothing is compiled at run time.",
    )
    kv_cache_mib: int = Field(1024, ge=16, description="Memory for the key-value cache on a CPU, in MiB.")
    gpu_memory_utilization: float = Field(
        0.4, gt=0, le=1, description="Share of a GPU's memory that the engine takes; the trainer may need the rest."
    )
    num_threads: int | None = Field(None, ge=1, description="Threads of the engine on a CPU. Default: all cores.")
    log_content: bool = Field(
        False, description="Let the log have what users and policies write: prompts, completions, feedback."
    )
    limits: LimitsConfig = Field(LimitsConfig(), description="What a key, and a user within it, may ask for.")

    @field_validator("host")
    @classmethod
    def _without_brackets(cls, host: str) -> str:
        """Takes an IPv6 address in brackets too, as it stands before a port."""
        bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
        if not (_NAME_OR_IPV4.fullmatch(bare) or _is_ipv6(bare)):
            raise ValueError("must be a name or an address without a port, such as 127.0.0.1, localhost or ::1")
        return bare

    @model_validator(mode="after")
    def _others_need_tls(self) -> Self:
        """Refuses to be heard in clear by whoever is on the network, unless that is asked for by name."""
        check_tls(
            self.host, self.tls_certificate, self.tls_key, self.tls_client_ca, allow_cleartext=self.allow_cleartext
        )
        return self

    @property
    def needs_key(self) -> bool:
        """Whether callers need an API key to sample and to rank."""
        return not is_loopback(self.host) if self.require_keys is None else self.require_keys

    @property
    def listen_address(self) -> str:
        """Where the server listens, as host:port."""
        return host_and_port(self.host, self.port)


def host_and_port(host: str, port: int) -> str:
    """Returns host:port, with brackets about an IPv6 address, whose own colons would be taken for the port's."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def check_tls(
    host: str, certificate: Path | None, key: Path | None, client_ca: Path | None, *, allow_cleartext: bool
) -> None:
    """Checks that what listens on a host has TLS, or that only this machine reaches it, or that clear text is allowed.

    Raises:
        ValueError: it does not, or its settings of TLS do not go together.
    """
    if (certificate is None) != (key is None):
        raise ValueError("tls_certificate and tls_key are set together")
    if client_ca and not certificate:
        raise ValueError("tls_client_ca needs tls_certificate and tls_key")
    if not (certificate or allow_cleartext or is_loopback(host)):
        raise ValueError(
            f"host {host} is more than this machine: set tls_certificate and tls_key, or, where a proxy before it has "
            "TLS, allow_cleartext = true"
        )


def is_loopback(host: str) -> bool:
    """Whether nobody but this machine reaches what listens on this host."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"


def _is_redis(url: str) -> bool:
    """Whether this is the URL of a Redis."""
    try:
        parts = urlsplit(url)
        named = {name for name, _ in parse_qsl(parts.query, keep_blank_values=True, strict_parsing=bool(parts.query))}
        return (
            parts.scheme in ("redis", "rediss")
            and bool(parts.hostname)
            and bool(parts.port)
            and re.fullmatch(r"(/\d{0,3})?", parts.path) is not None
            and not parts.fragment
            and named <= (_REDIS_TLS if parts.scheme == "rediss" else set())
            and not re.search(r"\s", url)
        )
    except ValueError:
        # Its port is none, which may be a part of a password.
        return False


def _is_ipv6(host: str) -> bool:
    """Whether this is an IPv6 address."""
    try:
        ipaddress.IPv6Address(host)
    except ValueError:
        return False
    return True


# What settings were called in earlier releases: the old name is refused with the new one.
RENAMED = {
    "max_message_bytes": "max_message_mib",
    "stream_interval_ms": "stream_interval_seconds",
    "drain_timeout_s": "drain_timeout_seconds",
    "shutdown_grace_s": "shutdown_grace_seconds",
    "kv_cache_gib": "kv_cache_mib",
}
