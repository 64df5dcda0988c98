"""`alignd up`: runs all processes of one machine, each with a log file, and starts one again when it dies.

A process that dies three times in a row at the same place would always die there: then all processes are stopped, and
the cause is printed.
"""

import ctypes
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType

from deploy.config import AligndConfig
from deploy.endings import can_recur, cause, place
from feedback.durable import write_json
from training.runs.folder import RunFolder

logger = logging.getLogger(__name__)

VERBS = ("serve", "relay", "ingest", "train")
FIRST_RESTART_SECONDS = 0.5
LONGEST_RESTART_SECONDS = 30.0
_MOST_DOUBLINGS = 10
_HEALTHY_AFTER_SECONDS = 300.0
_MOST_SAME_ENDS = 3
_STOP_SECONDS = 45.0
POLL_SECONDS = 0.2
_PR_SET_PDEATHSIG = 1


class ServiceError(Exception):
    """A process died at the same place each time it was started; the message gives the cause and the log."""


@dataclass
class Service:
    """One process, and how often in a row it has ended early."""

    verb: str
    process: subprocess.Popen[bytes] | None = None
    started_at: float = 0.0
    restart_at: float = 0.0
    failures: int = 0
    log_begins: int = 0
    """Where in its log the lines of this process begin, in bytes."""
    place: str = ""
    """Where it died last; see endings.place."""
    same_ends: int = 0
    """How often in a row it died there."""


@dataclass
class Supervisor:
    """Runs each verb as a process, and starts again those that die, until it is asked to stop."""

    folder: Path
    environment: Mapping[str, str]
    services: list[Service] = field(default_factory=lambda: [Service(verb) for verb in VERBS])
    stopping: bool = False

    def run(self) -> None:
        """Runs until SIGTERM or SIGINT, and then stops every process.

        Raises:
            ServiceError: a process keeps dying at the same place; the others have been stopped.
        """
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, self._stop)
        (self.folder / "logs").mkdir(parents=True, exist_ok=True)
        try:
            while not self.stopping:
                for service in self.services:
                    self._look_after(service)
                time.sleep(POLL_SECONDS)
        finally:
            self._end_all()

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self.stopping = True

    def _look_after(self, service: Service) -> None:
        now = time.monotonic()
        process = service.process
        if process is not None and process.poll() is None:
            return
        if process is not None:
            lived = now - service.started_at
            service.failures = 1 if lived > _HEALTHY_AFTER_SECONDS else service.failures + 1
            service.restart_at = now + restart_wait_seconds(service.failures)
            service.process = None
            why = cause(self._log_of(service), service.log_begins)
            self._note_end(service, process.returncode, why)
            logger.warning("%s ended with %s; starting it again. %s", service.verb, process.returncode, why)
        if now >= service.restart_at:
            self._start(service)

    def _note_end(self, service: Service, code: int, why: str) -> None:
        """Counts how often in a row the process has died at this place.

        Raises:
            ServiceError: it has died there _MOST_SAME_ENDS times.
        """
        if not can_recur(code):
            service.place, service.same_ends = "", 0
            return
        ended_at = place(code, why)
        if service.verb == "train":
            # The trainer itself counts the attempts of a run that kills it, and gives that run up.
            ended_at += RunFolder.attempts(self.folder / "runs")
        again = service.failures > 1 and ended_at == service.place
        service.place, service.same_ends = ended_at, service.same_ends + 1 if again else 1
        if service.same_ends == _MOST_SAME_ENDS:
            log_path = self._log_of(service)
            raise ServiceError(f"{service.verb} died {_MOST_SAME_ENDS} times at the same place: {why} ({log_path})")

    def _start(self, service: Service) -> None:
        path = self._log_of(service)
        with path.open("ab") as output:
            service.log_begins = output.tell()
            service.process = subprocess.Popen(
                [sys.executable, "-m", "deploy.cli", service.verb],
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=_die_with_parent,
            )
        service.started_at = time.monotonic()
        logger.info("%s runs as process %d, and logs to %s", service.verb, service.process.pid, path)
        self._write_state()

    def _log_of(self, service: Service) -> Path:
        return self.folder / "logs" / f"{service.verb}.log"

    def _write_state(self) -> None:
        """Writes the process ids for `alignd status`. If the disk is full, the processes run on without that."""
        running = {service.verb: service.process.pid for service in self.services if service.process}
        try:
            write_json(self.folder / "up.json", {"supervisor": os.getpid(), **running})
        except OSError as error:
            logger.warning("`alignd status` will not know the processes: %s", error)

    def _end_all(self) -> None:
        """Asks every process to end, the server last, as the others may still call it; kills those that do not."""
        (self.folder / "up.json").unlink(missing_ok=True)
        for service in reversed(self.services):
            if service.process and service.process.poll() is None:
                service.process.terminate()
        deadline = time.monotonic() + _STOP_SECONDS
        for service in self.services:
            if service.process is None:
                continue
            try:
                service.process.wait(max(0.1, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                logger.warning("%s did not end in time; killing it", service.verb)
                service.process.kill()
                service.process.wait()


def restart_wait_seconds(failures: int) -> float:
    """Returns how long to wait after so many early ends in a row, at least 1: twice as long after each of them."""
    return min(LONGEST_RESTART_SECONDS, FIRST_RESTART_SECONDS * 2.0 ** min(failures - 1, _MOST_DOUBLINGS))


def _die_with_parent() -> None:
    """Makes the kernel end this process when its parent dies, even by kill -9. Does nothing outside Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)


def run_in_ranks(verb: str, num_processes: int) -> None:
    """Replaces this process by torchrun, which runs the verb in `num_processes`. Returns in each of them."""
    if num_processes == 1:
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # A torchrun that is killed by kill -9 cannot end the processes that it has started.
        _die_with_parent()
        return
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    os.execv(sys.executable, [*torchrun, "-m", "deploy.cli", verb])


def child_environment(config: AligndConfig) -> dict[str, str]:
    """Returns the environment of the processes: this one's, with the same free port for all if `port` is 0."""
    environment = dict(os.environ)
    if config.serving.port == 0:
        environment["ALIGND_SERVING__PORT"] = str(free_port(config.serving.host))
    return environment


def free_port(host: str) -> int:
    """Returns a port of this host that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        port: int = probe.getsockname()[1]
    return port
