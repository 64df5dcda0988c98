"""The real processes of the loop, for tests: started by their verbs, awaited until they serve, and ended at the end."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from alignd.v1 import policy_service_pb2, policy_service_pb2_grpc
from deploy.models import make_tiny_llama
from policies.server_connection import ServerConnection
from tests.deploy.importing import folders
from tests.first_version import write_first
from tests.kafka_broker import free_port

REPOSITORY = Path(__file__).parents[2]
# vLLM starts in 25 s on an idle machine, and in several times that on a busy one.
START_SECONDS = 240.0
MAX_MODEL_LEN = 512
# Less than serving.shutdown_grace_seconds, for which a stream that does not end would hold a server up.
LONGEST_STOP_SECONDS = 20.0
SERVING, NOT_SERVING = health_pb2.HealthCheckResponse.SERVING, health_pb2.HealthCheckResponse.NOT_SERVING


@dataclass(frozen=True)
class Server:
    """A replica that serves, with the processes that carry its events to the store."""

    address: str
    data_dir: Path
    environment: Mapping[str, str]
    pids: Mapping[str, int]

    def channel(self) -> grpc.Channel:
        """Returns a channel with the key of the machine's own operator."""
        return channel_of(self.environment)

    @property
    def store_url(self) -> str:
        """Where ingest writes."""
        return f"sqlite:///{self.data_dir}/store.db"


def environment(folder: Path, **settings: object) -> dict[str, str]:
    """Returns the environment of processes that keep everything in `folder`.

    Settings are named as in ALIGND_..., in lower case. Unless they name a model to import, version 1 is a tiny Llama.
    """
    chosen = {
        "data_dir": folder / "var",
        "serving__port": free_port(),
        "gateway__port": free_port(),
        "serving__max_model_len": MAX_MODEL_LEN,
        **settings,
    }
    if "serving__initial_model" not in chosen:
        write_first(Path(str(chosen["data_dir"])) / "policies", make_tiny_llama(folder / "tiny"))
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ALIGND_")}
    ours = {f"ALIGND_{name.upper()}": str(value) for name, value in chosen.items()}
    return {**inherited, **ours, "HF_HUB_OFFLINE": "1"}


def channel_of(settings: Mapping[str, str], options: Sequence[tuple[str, Any]] = ()) -> grpc.Channel:
    """Returns a channel to the server of this environment, with the key of the machine's own operator."""
    key_file = Path(settings["ALIGND_DATA_DIR"]) / "operator_key"
    return ServerConnection(address_of(settings), key_file=key_file).channel(options)


def address_of(settings: Mapping[str, str]) -> str:
    """Returns where the server of this environment listens."""
    return f"127.0.0.1:{settings['ALIGND_SERVING__PORT']}"


def start(verb: str, settings: Mapping[str, str], *options: str) -> subprocess.Popen[bytes]:
    """Starts `alignd VERB`, with these options; it logs to VERB.log beside the folder of its data."""
    log = log_of(verb, settings)
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as output:
        command = [sys.executable, "-m", "deploy.cli", verb, *options]
        return subprocess.Popen(command, cwd=REPOSITORY, env=dict(settings), stdout=output, stderr=output)


def log_of(verb: str, settings: Mapping[str, str]) -> Path:
    return Path(settings["ALIGND_DATA_DIR"]).parent / f"{verb}.log"


def wait_until(
    is_done: Callable[[], bool], timeout_seconds: float, what: str, by: "subprocess.Popen[bytes] | None" = None
) -> None:
    """Waits until `is_done`.

    Raises:
        AssertionError: it did not come about in time, or the process `by` died first; the text says which.
    """
    deadline = time.monotonic() + timeout_seconds
    while not is_done():
        assert by is None or by.poll() is None, f"{what}: the process ended with {by and by.returncode} instead"
        assert time.monotonic() < deadline, f"{what}: not within {timeout_seconds:.0f} s"
        time.sleep(0.05)


def is_serving(address: str, service: str = "") -> bool:
    """Whether the health service reports SERVING; False also if nobody answers."""
    with grpc.insecure_channel(address) as channel:
        health: Any = health_pb2_grpc.HealthStub(channel)
        try:
            answer = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=2.0)
        except grpc.RpcError:
            return False
    return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


def wait_serving(process: subprocess.Popen[bytes], settings: Mapping[str, str]) -> None:
    """Waits until the engine of `alignd serve` serves.

    Raises:
        AssertionError: the server ended instead; the text is its log.
    """

    def serves() -> bool:
        assert process.poll() is None, log_of("serve", settings).read_text(errors="replace")[-4000:]
        return is_serving(address_of(settings))

    wait_until(serves, START_SECONDS, "health SERVING")


def engine_processes(pid: int) -> list[int]:
    """Returns the processes in which the server `pid` runs vLLM."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            command = (folder / "cmdline").read_bytes()
        except (FileNotFoundError, ProcessLookupError):
            continue
        if parent == pid and b"resource_tracker" not in command and b"engine_guard" not in command:
            found.append(int(folder.name))
    return found


def is_alive(pid: int) -> bool:
    """Whether the process runs; one that has ended and waits for its parent does not."""
    try:
        return (Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


@contextmanager
def running_server(folder: Path) -> Iterator[Server]:
    """Runs server, relay and ingest on the embedded bus. They must end cleanly by SIGTERM and leave nothing running."""
    # The server imports its first version itself, from a model as large ones are: fp16, and in several files.
    model = folders.copied(make_tiny_llama(folder / "tiny"), folder / "mine", folders.in_shards(torch.float16))
    settings = environment(folder, serving__initial_model=model)
    processes = {verb: start(verb, settings) for verb in ("serve", "relay", "ingest")}
    try:
        wait_serving(processes["serve"], settings)
        engines = engine_processes(processes["serve"].pid)
        pids = {verb: process.pid for verb, process in processes.items()}
        yield Server(address_of(settings), folder / "var", settings, pids)
    finally:
        # Streams that never end by themselves stay open to the end, and must not delay the stop.
        with channel_of(settings) as channel:
            watch = policy_service_pb2_grpc.PolicyServiceStub(channel).Watch(policy_service_pb2.WatchRequest())
            health = health_pb2_grpc.HealthStub(channel).Watch(health_pb2.HealthCheckRequest())
            told = [next(health).status]
            reflected = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(_endless())
            next(reflected)
            began = time.monotonic()
            for process in processes.values():
                process.send_signal(signal.SIGTERM)
            codes = {verb: end(process) for verb, process in processes.items()}
            lasted = time.monotonic() - began
            watch.cancel()
            reflected.cancel()
            with pytest.raises(grpc.RpcError) as ended:
                told.extend(each.status for each in health)
    assert lasted < LONGEST_STOP_SECONDS
    assert (told, ended.value.code()) == ([SERVING, NOT_SERVING], grpc.StatusCode.UNAVAILABLE)
    assert codes == {"serve": 0, "relay": 0, "ingest": 0}
    assert engines
    assert [pid for pid in engines if is_alive(pid)] == []


def _endless() -> Iterator[reflection_pb2.ServerReflectionRequest]:
    """A question to the reflection service, by a caller who then leaves the stream open."""
    yield reflection_pb2.ServerReflectionRequest(list_services="")
    time.sleep(LONGEST_STOP_SECONDS)


def end(process: subprocess.Popen[bytes], timeout_seconds: float = 60.0) -> int:
    """Returns the exit code of a process that was asked to end, and kills it if it does not."""
    try:
        return process.wait(timeout_seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        return process.wait()
