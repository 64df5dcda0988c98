"""Decides vLLM's settings on a CPU, once for the server and the trainer, which both start engines there.

Nothing here imports vLLM or torch: vLLM reads the environment when it is imported.
"""

import ctypes
import logging
import os
import shutil
import sys
import sysconfig
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from policies.host_memory import used_memory

CPU_ENVIRONMENT: Mapping[str, str] = {
    # The executor stays inside the engine's own process, and is not pinned to some of the cores. In a third process,
    # pinned to all cores but one, the model takes half as long again to start on a small machine, at half the speed.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    # Threads that wait give the core up, which trainer and server share on a small machine, instead of spinning.
    "OMP_WAIT_POLICY": "PASSIVE",
}
# Completions of a prompt share its whole blocks of the KV cache. vLLM's 128 tokens are more than most prompts have; 32
# is the least it takes on a CPU.
_CPU_BLOCK_SIZE = 32
_LEAST_BATCHED_TOKENS = 4096
NUMA_LIBRARY = "libnuma.so.1"


class MissingError(Exception):
    """Something that vLLM needs of the machine is missing; the message says what to install."""


def prepare_cpu() -> None:
    """Sets what vLLM reads from the environment on a CPU. To be called before an engine is started.

    Raises:
        MissingError: a library that vLLM's extension is linked against is missing. vLLM would continue without the
            extension, and fail later, when it first needs it.
    """
    for name, value in CPU_ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    # vLLM ranks log-probabilities by functions under torch.compile, which would call g++ at the first request.
    os.environ["TORCH_COMPILE_DISABLE"] = "1"
    dynamo = sys.modules.get("torch._dynamo.config")
    if dynamo is not None:
        # It is imported already, and has read the environment.
        dynamo.disable = True  # type: ignore[attr-defined]
    try:
        ctypes.CDLL(NUMA_LIBRARY)
    except OSError as error:
        raise MissingError(
            f"vLLM needs the library {NUMA_LIBRARY}, which cannot be loaded ({error}); install it (Debian, Ubuntu: "
            "apt-get install libnuma1; Fedora: dnf install numactl-libs)"
        ) from error


def keep_content_out_of_log() -> None:
    """Drops what vLLM logs of requests where it fails: stop strings, forms and tokens, which people wrote."""
    for name in ("vllm.logging_utils.dump_input", "vllm.v1.structured_output.backend_guidance"):
        logging.getLogger(name).addFilter(lambda record: False)
    for name in ("vllm.v1.core.sched.scheduler", "vllm.v1.structured_output"):
        logging.getLogger(name).addFilter(lambda record: not str(record.msg).startswith("Unexpected: grammar"))


def count_caches_as_free(cpu_resource_utils: Any) -> None:
    """Makes this module of vLLM's count what only caches files as free, in the process of an engine.

    Otherwise an engine does not start in a container in which more files were read than its limit has room for,
    although the kernel gives that memory up at once.
    """
    cpu_resource_utils.get_cgroup_memory_usage = used_memory


def cpu_options(max_model_len: int) -> dict[str, Any]:
    """Returns the arguments of an engine that are the same wherever it runs on a CPU."""
    return {"block_size": _CPU_BLOCK_SIZE, **whole_prefill(max_model_len)}


def whole_prefill(max_model_len: int) -> dict[str, Any]:
    """Returns the arguments that make an engine read every prompt at once.

    vLLM 0.32 dies on a CPU when the prompt of a request with a seed is prefilled in chunks.
    """
    return {"enable_chunked_prefill": False, "max_num_batched_tokens": max(_LEAST_BATCHED_TOKENS, max_model_len)}


def check_compiler() -> None:
    """Checks that the machine has what compiling a model at run time needs: a C compiler and Python's headers.

    Raises:
        MissingError: one of them is missing.
    """
    compiler = os.environ.get("CC") or next(filter(shutil.which, ("gcc", "clang", "cc")), None)
    header = Path(sysconfig.get_path("include"), "Python.h")
    missing = []
    if compiler is None or shutil.which(compiler) is None:
        missing.append(f"a C compiler ({compiler or 'gcc or clang'})")
    if not header.is_file():
        missing.append(f"Python's headers ({header})")
    if missing:
        raise MissingError(
            f"compiling on a GPU needs {' and '.join(missing)}; install them (Debian, Ubuntu: apt-get install gcc "
            f"python{sys.version_info.major}.{sys.version_info.minor}-dev)"
        )
