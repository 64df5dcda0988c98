"""Measures how much memory the demo takes: that of each of its processes at its peak, and of all of them together.

    python -m bench.memory [--json FILE] [--quick]

Memory is what a process has for itself and its share of what it shares with others (PSS), looked at twice a second. The
planner's figure is held against the trainer's, and deploy.capacity's constants come from here.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import psutil

from bench.result import Figure, add_arguments, at_most, bench_result, report

_LOOK_SECONDS = 0.5
_GIB = 1 << 20  # of the KiB in which Linux counts
_GOALS_GIB = {False: 6.0, True: 3.0}
_ENGINE = "engine"


def main() -> None:
    """Runs the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_arguments(parser)
    arguments = parser.parse_args()
    report(bench_result("memory", list(_measure(arguments.quick))), arguments.json)


def _measure(quick: bool) -> Iterator[Figure]:
    """Runs the demo, and yields the peaks.

    Raises:
        subprocess.CalledProcessError: the demo failed.
    """
    peaks: dict[str, int] = {}
    together = 0
    command = [sys.executable, "-m", "deploy.cli", "demo", *(["--quick"] if quick else [])]
    with tempfile.TemporaryDirectory() as folder:
        demo = subprocess.Popen(command, env={**os.environ, "ALIGND_DATA_DIR": folder}, stdout=sys.stderr)
        while demo.poll() is None:
            found = _look(psutil.Process(demo.pid))
            together = max(together, sum(found.values()))
            peaks |= {name: max(kib, peaks.get(name, 0)) for name, kib in found.items()}
            time.sleep(_LOOK_SECONDS)
    if demo.returncode:
        raise subprocess.CalledProcessError(demo.returncode, command)
    yield at_most(_GOALS_GIB[quick], Figure("all processes", together / _GIB, "GiB"))
    for name, kib in sorted(peaks.items(), key=lambda each: -each[1]):
        yield Figure(name, kib / _GIB, "GiB")


def _look(demo: psutil.Process) -> Mapping[str, int]:
    """Returns the KiB of the demo and of each process below it, by name."""
    found: dict[str, int] = {}
    for process in (demo, *_below(demo)):
        try:
            name = _name(process)
            found[name] = found.get(name, 0) + _pss_kib(process.pid)
        except (psutil.Error, OSError):
            continue  # It has ended.
    return found


def _below(process: psutil.Process) -> Sequence[psutil.Process]:
    try:
        below: Sequence[psutil.Process] = process.children(recursive=True)
    except psutil.Error:
        return ()
    return below


def _name(process: psutil.Process) -> str:
    """Returns an alignd process's verb, or what else a process is."""
    arguments: list[str] = process.cmdline()
    if "deploy.cli" in arguments:
        return arguments[arguments.index("deploy.cli") + 1]
    return _ENGINE if "EngineCore" in " ".join([process.name(), *arguments]) else "short-lived"


def _pss_kib(pid: int) -> int:
    for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1])
    return 0


if __name__ == "__main__":
    main()
