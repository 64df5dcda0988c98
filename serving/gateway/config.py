"""Settings of the HTTP gateway."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from serving.config import check_tls, is_loopback


class GatewayConfig(BaseModel):
    """Settings of one gateway."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="Address to listen on. 0.0.0.0 for all interfaces, :: with IPv6.")
    port: int = Field(8080, ge=0, le=65535, description="TCP port. 0 takes a free one.")
    tls_certificate: Path | None = Field(
        None, description="The gateway's certificate, with those up to its root, in PEM; read again when it changes."
    )
    tls_key: Path | None = Field(None, description="The key of this certificate, in PEM.")
    tls_client_ca: Path | None = Field(
        None, description="The root of callers' certificates, in PEM. If it is set, callers need one (mTLS)."
    )
    require_keys: bool | None = Field(
        None,
        description="Whether callers need an API key even where the server behind takes them without one. Not set: if "
        "`host` is more than this machine, or a proxy has forwarded the request.",
    )
    allow_cleartext: bool = Field(
        False, description="Listen without TLS although others reach `host`, such as where a proxy before it has TLS."
    )
    allowed_origins: tuple[str, ...] = Field(
        (), description="Web sites whose pages may call, such as https://app.example.com. None: no page may."
    )
    max_body_mib: int = Field(1, ge=1, description="Longest request taken, in MiB.")
    timeout_seconds: float = Field(120.0, gt=0, description="How long a request may take.")

    @model_validator(mode="after")
    def _others_need_tls(self) -> Self:
        check_tls(
            self.host, self.tls_certificate, self.tls_key, self.tls_client_ca, allow_cleartext=self.allow_cleartext
        )
        return self

    def needs_key(self, *, forwarded: bool) -> bool:
        """Whether a caller needs an API key even where the server behind takes it without one."""
        return forwarded or not is_loopback(self.host) if self.require_keys is None else self.require_keys
