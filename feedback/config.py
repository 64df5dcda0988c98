"""Settings of the feedback path: tokens, outbox, relay and ingest."""

from typing import Self

from pydantic import BaseModel, ConfigDict, Field, model_validator


class FeedbackConfig(BaseModel):
    """Settings of the feedback path. Frozen; an unknown field is refused."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    token_ttl_seconds: int = Field(
        default=7 * 86_400, ge=1, description="Seconds for which a feedback token is taken after its sample was drawn."
    )
    outbox_max_mib: int = Field(
        default=1024,
        ge=1,
        description="Most MiB that the outbox may take on disk. Beyond it feedback is refused with RESOURCE_EXHAUSTED.",
    )
    outbox_retention_seconds: int = Field(
        default=7 * 86_400,
        ge=0,
        description="Seconds for which an event stays in the outbox after it was published, in case the bus loses it. "
        "At least token_ttl_seconds, so that a retry is recognised for as long as its token is taken.",
    )
    relay_batch_size: int = Field(default=500, ge=1, description="Most events that the relay publishes at once.")
    relay_idle_seconds: float = Field(
        default=0.02, gt=0, description="Seconds between two looks at the outbox when it had nothing to publish."
    )
    bus_check_seconds: float = Field(
        default=2.0,
        gt=0,
        description="Seconds between two checks of relay and ingest that the bus still has what it had.",
    )
    retry_max_seconds: float = Field(
        default=5.0, gt=0, description="Longest wait in seconds before the relay or ingest tries a failed bus again."
    )

    @model_validator(mode="after")
    def _retries_are_recognised(self) -> Self:
        if self.outbox_retention_seconds < self.token_ttl_seconds:
            raise ValueError("outbox_retention_seconds must be at least token_ttl_seconds")
        return self


DEFAULTS = FeedbackConfig()

# What settings were called in earlier releases: the old name is refused with the new one.
RENAMED = {
    "token_ttl_s": "token_ttl_seconds",
    "outbox_max_bytes": "outbox_max_mib",
    "outbox_retention_s": "outbox_retention_seconds",
    "relay_idle_s": "relay_idle_seconds",
    "bus_check_s": "bus_check_seconds",
    "retry_max_s": "retry_max_seconds",
}
