"""Runs inside vLLM's process, and ends it when the server that started it is gone: after kill -9 nobody else would.

vLLM imports this module before it loads a model, because it mixes a class of this module into its worker. Until then,
and if this thread fails, serving.engine_guard does the same from outside.
"""

import multiprocessing
import os
import signal
import threading

from vllm.utils import cpu_resource_utils

from policies.vllm_settings import count_caches_as_free, keep_content_out_of_log


class EndsWithServer:
    """Adds nothing to vLLM's worker; naming it makes vLLM import this module."""


def _end_with_parent() -> None:
    """Waits until the process that started this one is gone, and then kills this one."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)


threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()
count_caches_as_free(cpu_resource_utils)
keep_content_out_of_log()
