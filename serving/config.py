"""Settings of the gRPC server and its engine."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class ServingConfig(BaseModel):
    """Settings of one serving replica."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    host: str = Field("127.0.0.1", description="Address to listen on. 0.0.0.0 for all interfaces.")
    port: int = Field(50051, ge=0, le=65535, description="TCP port of the gRPC server. 0 takes a free one.")
    replica_id: str = Field("serving-0", min_length=1, max_length=64, description="Names this replica in reports.")
    initial_model: Path | None = Field(
        None, description="Hugging Face model folder that becomes version 1 when no policy is registered yet."
    )
    max_model_len: int = Field(1024, ge=32, description="Most tokens of a prompt and its completion together.")
    default_max_tokens: int = Field(64, ge=1, description="Most tokens of a completion when a request does not say.")
    max_inflight_completions: int = Field(
        64, ge=16, description="Completions generated at a time; a request beyond them is refused with a retry delay."
    )
    max_message_mib: int = Field(1, ge=1, description="Longest request taken, in MiB.")
    stream_interval_seconds: float = Field(
        0.02, ge=0, description="StreamSample sends new text at most this often, in seconds."
    )
    drain_timeout_seconds: float = Field(
        20.0, ge=0, description="How long a swap waits for requests in flight; it then marks them and continues."
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


# What settings were called in earlier releases: the old name is refused with the new one.
RENAMED = {
    "max_message_bytes": "max_message_mib",
    "stream_interval_ms": "stream_interval_seconds",
    "drain_timeout_s": "drain_timeout_seconds",
    "shutdown_grace_s": "shutdown_grace_seconds",
    "kv_cache_gib": "kv_cache_mib",
}
