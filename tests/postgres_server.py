"""Starts the PostgreSQL server that the tests write to."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from tests.kafka_broker import free_port

MISSING = (
    "the store's tests need PostgreSQL: install it (on Debian: apt-get install postgresql), or set "
    "ALIGND_TEST_POSTGRES to the URL of a server on which databases may be created"
)


@contextmanager
def running_postgres(folder: Path) -> Iterator[str]:
    """A server for as long as the block runs; gives the URL of its database `postgres`.

    The one at ALIGND_TEST_POSTGRES if that is set, else one started in the folder. Raises AssertionError if there is
    none.
    """
    if "ALIGND_TEST_POSTGRES" in os.environ:
        yield os.environ["ALIGND_TEST_POSTGRES"]
        return
    programs = _programs()
    data, port = folder / "postgres", free_port()
    data.mkdir()
    as_user: list[str] = []
    if os.geteuid() == 0:
        # PostgreSQL refuses to run as root, so it runs as the user that its package made.
        as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"]
        shutil.chown(data, "postgres", "postgres")
        for parent in (folder, *folder.parents[: len(folder.parents) - 1]):
            if not parent.stat().st_mode & 0o001:
                parent.chmod(parent.stat().st_mode | 0o011)
    initdb = [*as_user, str(programs / "initdb"), "-D", str(data), "-A", "trust", "-U", "postgres", "--no-sync"]
    subprocess.run(initdb, check=True, capture_output=True, cwd="/")
    control = [*as_user, str(programs / "pg_ctl"), "-D", str(data), "-w", "-l", str(data / "log")]
    options = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
    subprocess.run([*control, "-o", options, "start"], check=True, capture_output=True, cwd="/")
    server = int((data / "postmaster.pid").read_text().split()[0])
    try:
        yield f"postgresql://postgres@127.0.0.1:{port}/postgres"
    finally:
        stopped = subprocess.run([*control, "-m", "immediate", "stop"], check=False, capture_output=True, cwd="/")
        if stopped.returncode != 0:
            # It also ends by itself, once its folder is gone.
            with suppress(ProcessLookupError):
                os.kill(server, signal.SIGKILL)


def _programs() -> Path:
    """The folder of PostgreSQL's programs."""
    on_path = shutil.which("pg_ctl")
    if on_path:
        return Path(on_path).resolve().parent
    config = shutil.which("pg_config")
    candidates = sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True)
    if config:
        told = subprocess.run([config, "--bindir"], check=True, capture_output=True, text=True).stdout.strip()
        candidates.insert(0, Path(told))
    for candidate in candidates:
        if (candidate / "pg_ctl").exists():
            return candidate
    raise AssertionError(MISSING)
