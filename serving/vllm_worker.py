"""Runs inside vLLM's process, and ends it when the server that started it is gone: after kill -9 nobody else would.

vLLM imports this module, for the class that it is told to mix into its worker, before it loads a model. A process that
has not come so far gives up by itself when the server does not answer its handshake, after 5 minutes.
"""

import multiprocessing
import os
import signal
import threading


class EndsWithServer:
    """Adds nothing to vLLM's worker."""


def _end_with_parent() -> None:
    """Waits until the process that started this one is gone, and then ends this one at once."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.kill(os.getpid(), signal.SIGKILL)


threading.Thread(target=_end_with_parent, name="end-with-parent", daemon=True).start()
