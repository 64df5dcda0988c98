"""`alignd up`: runs all processes of one machine, each with a log file, and starts one again when it dies or hangs.

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

from deploy.apart import DiedError, apart
from deploy.config import AligndConfig, ConfigError
from deploy.data_dir import PROCESSES_FILE
from deploy.endings import GAVE_UP_CODE, Ending, can_recur, ending_of
from deploy.silence import SILENT_SECONDS, Silence
from feedback.durable import private_folder, write_json
from feedback.retry import backoff_seconds, place
from policies.process_watch import Watch, started_by
from training.runs.folder import RunFolder

logger = logging.getLogger(__name__)

VERBS = ("serve", "gateway", "relay", "ingest", "train")
FIRST_RESTART_SECONDS = 0.5
_LONGEST_RESTART_SECONDS = 30.0
_HEALTHY_AFTER_SECONDS = 300.0
_MOST_SAME_ENDS = 3
_STOP_SECONDS = 45.0
POLL_SECONDS, _LOOK_SECONDS = 0.2, 1.0
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
    """Its code and where it died last; see feedback.retry.place."""
    same_ends: int = 0
    """How often in a row it died there."""
    watch: Watch = field(default_factory=Watch)
    looked_at: float = 0.0
    silence: Silence = field(default_factory=lambda: Silence(0.0))
    killed_for: str = ""
    """Why it was killed, if it hung, in words that follow its name."""


@dataclass
class Supervisor:
    """Runs each verb as a process, and starts again those that die, until it is asked to stop."""

    folder: Path
    environment: Mapping[str, str]
    services: list[Service] = field(default_factory=lambda: [Service(verb) for verb in VERBS])
    stopping: bool = False
    most_silent_seconds: Mapping[str, float] = field(default_factory=lambda: SILENT_SECONDS)

    def run(self) -> None:
        """Runs until SIGTERM or SIGINT, and then stops every process.

        Raises:
            ServiceError: a process keeps dying at the same place; the others have been stopped.
        """
        for name in (signal.SIGTERM, signal.SIGINT):
            signal.signal(name, self._stop)
        private_folder(self.folder / "logs")
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
            if now - service.looked_at >= _LOOK_SECONDS:
                service.looked_at = now
                service.watch.look(process.pid, *started_by(process.pid))
            service.killed_for = service.killed_for or service.silence.look(
                self.folder, service.verb, now, self.most_silent_seconds
            )
            if service.killed_for:
                # Not asked to end: a process that is stopped would not hear it.
                process.kill()
            return
        if process is not None:
            lived = now - service.started_at
            service.failures = 1 if lived > _HEALTHY_AFTER_SECONDS else service.failures + 1
            service.restart_at = now + backoff_seconds(
                service.failures, _LONGEST_RESTART_SECONDS, FIRST_RESTART_SECONDS
            )
            service.process = None
            code, ending = process.returncode, Ending("", f"It {service.killed_for}")
            if not service.killed_for:
                ending = ending_of(code, process.pid, service.watch, self._log_of(service), service.log_begins)
            if service.verb == "train":
                RunFolder.note_end(self.folder / "runs", ending.killing, service.killed_for, time.time() - lived)
            self._note_end(service, 1 if ending.killing else code, ending.why)
            logger.warning("%s ended with %s; starting it again. %s", service.verb, code, ending.why)
        if now >= service.restart_at:
            self._start(service)

    def _note_end(self, service: Service, code: int, why: str) -> None:
        """Counts how often in a row the process has died at this place.

        Raises:
            ServiceError: it has died there _MOST_SAME_ENDS times, or has itself tried as often.
        """
        if code == GAVE_UP_CODE:
            raise ServiceError(f"{service.verb} gave up: {why} ({self._log_of(service)})")
        if not can_recur(code):
            service.place, service.same_ends = "", 0
            return
        ended_at = f"{code} {place(why)}"
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
        service.silence, service.killed_for = Silence.begin(self.folder, service.verb, time.monotonic()), ""
        with path.open("ab") as output:
            service.log_begins = output.tell()
            service.process = subprocess.Popen(
                [sys.executable, "-m", "deploy.cli", service.verb],
                env=dict(self.environment),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=die_with_parent,
            )
        service.started_at, service.watch = time.monotonic(), Watch()
        logger.info("%s runs as process %d, and logs to %s", service.verb, service.process.pid, path)
        self._write_state()

    def _log_of(self, service: Service) -> Path:
        return self.folder / "logs" / f"{service.verb}.log"

    def _write_state(self) -> None:
        """Writes the process ids for `alignd status`. If the disk is full, the processes run on without that."""
        running = {service.verb: service.process.pid for service in self.services if service.process}
        try:
            write_json(self.folder / PROCESSES_FILE, {"supervisor": os.getpid(), **running})
        except OSError as error:
            logger.warning("`alignd status` will not know the processes: %s", error)

    def _end_all(self) -> None:
        """Asks every process to end, the server last, as the others may still call it; kills those that do not."""
        (self.folder / PROCESSES_FILE).unlink(missing_ok=True)
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


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Makes the kernel send this process a signal when its parent dies, even by kill -9. Does nothing outside Linux.

    It is killed, and not asked to end: a process that is stopped or hangs would not hear it, and would be there still,
    at its port and its files, when the next parent starts another. Each may be killed at any moment; what the server
    has started outside of this process ends by serving.engine_guard.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, number)


def run_in_ranks(verb: str, num_processes: int) -> None:
    """Replaces this process by torchrun, which runs the verb in `num_processes`. Returns in each of them."""
    if num_processes == 1:
        return
    if "TORCHELASTIC_RUN_ID" in os.environ:
        # A torchrun that is killed by kill -9 cannot end the processes that it has started.
        die_with_parent()
        return
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={num_processes}"]
    os.execv(sys.executable, [*torchrun, "-m", "deploy.cli", verb])


def update_store(config: AligndConfig) -> None:
    """Brings a store of an earlier release up to date, before any process that may be silent only so long opens it.

    That takes minutes where there are millions of samples. If the store is away, ingest does it once it is back.
    """
    if not config.store and not (config.data_dir / "store.db").exists():
        return
    logger.info("bringing the store up to date, if an earlier release has made it")
    try:
        failure = apart(_opened, config.store_url)
    except DiedError as error:
        failure = str(error)
    if failure:
        logger.warning("the store cannot be used yet: %s", failure)


def _opened(store_url: str) -> str:
    """Opens the store once, and returns why that failed, if it did."""
    from sqlalchemy.exc import SQLAlchemyError

    from feedback.store.engine import open_engine

    try:
        open_engine(store_url).dispose()
    except (SQLAlchemyError, OSError) as error:
        return str(error).partition("\n")[0]
    return ""


def child_environment(config: AligndConfig) -> dict[str, str]:
    """Returns the environment of the processes: this one's, with the same free port for all if `port` is 0."""
    environment = dict(os.environ)
    if config.serving.port == 0:
        environment["ALIGND_SERVING__PORT"] = str(free_port(config.serving.host))
    return environment


def free_port(host: str) -> int:
    """Returns a port of this host that nothing listens on.

    Raises:
        ConfigError: it is no host of this machine.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.bind(address)
            port: int = probe.getsockname()[1]
    except OSError as error:
        raise ConfigError(f"serving.host: nobody can listen on {host} of this machine: {error.strerror}") from error
    return port
