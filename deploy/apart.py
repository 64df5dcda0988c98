"""Runs a function in a process of its own: its memory and libraries end with it, and its death is an error in words."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import threading
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import ParamSpec, TypeVar, cast

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


class DiedError(RuntimeError):
    """The process of a function died; the message says how."""


def apart(function: Callable[Parameters, Result], *arguments: Parameters.args, **options: Parameters.kwargs) -> Result:
    """Returns what `function` returns in a new process. It passes on what libraries and we raise on purpose.

    Raises:
        DiedError: the process died, or one of Python's own errors ended it.
    """
    spawn = multiprocessing.get_context("spawn")
    receiver, sender = spawn.Pipe(duplex=False)
    child = spawn.Process(target=_send, args=(sender, function, arguments, options), daemon=True)
    child.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        child.join()
        raise DiedError(f"the process that tried it {_ending(child.exitcode)}; its messages are above") from None
    finally:
        # Nothing to do if it has ended; otherwise this process was interrupted.
        child.terminate()
        child.join()
    if isinstance(result, Exception):
        raise result
    return cast(Result, result)


def _send(
    sender: Connection, function: Callable[..., object], arguments: tuple[object, ...], options: dict[str, object]
) -> None:
    """Sends what a function returns or raises. An error that cannot be sent ends the process, with its traceback."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        sender.send(function(*arguments, **options))
    except Exception as error:
        if type(error).__module__ == "builtins" or not _can_be_sent(error):
            # Nobody waits for it by its name, and only its traceback says where it came from.
            raise
        sender.send(error)


def _can_be_sent(error: Exception) -> bool:
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        # Whatever the error's own class raises.
        return False
    return True


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
    os._exit(1)


def _ending(code: int | None) -> str:
    if code == -signal.SIGKILL:
        return "was killed, most likely because the machine's memory ran out"
    if code is not None and code < 0:
        return f"was ended by {signal.Signals(-code).name}"
    return f"ended with {code}"
