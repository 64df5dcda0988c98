"""Whoever waits for long shows that it does: otherwise `alignd up` would kill it for its silence, again and again."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from feedback import heartbeat
from feedback.store.engine import open_engine
from feedback.store.ingest import run_ingest
from feedback.store.reader import Store
from training.attempts import retry_until_done
from training.config import TrainingConfig
from training.context import TrainerContext, open_context
from training.loop import Cursor, begin_run
from training.models.parallel import ALONE
from training.runs.control import OperatorControl
from training.runs.lease import TrainerLease, set_paused

# Far longer than a turn of a wait, which is shortened below.
CONFIG = TrainingConfig(poll_seconds=1.5)
NOBODY = cast(Any, None)
Work = Callable[[], object]


@contextmanager
def for_keys(folder: Path) -> Iterator[Work]:
    stop = threading.Event()
    yield lambda: run_ingest(f"sqlite:///{folder}/bus.db", f"sqlite:///{folder}/store.db", folder / "keys", stop)
    stop.set()


@contextmanager
def in_a_pause(folder: Path) -> Iterator[Work]:
    with controlled(folder) as control:
        set_paused(control.engine, True)
        yield lambda: control.between_rounds("run")


@contextmanager
def for_rankings(folder: Path) -> Iterator[Work]:
    with controlled(folder) as control, closing(Store(f"sqlite:///{folder}/store.db")) as store:
        context = TrainerContext(store, NOBODY, NOBODY, folder, NOBODY, NOBODY, ALONE)
        yield lambda: begin_run(control, context, folder, Cursor(folder / "seen"))


@contextmanager
def controlled(folder: Path) -> Iterator[OperatorControl]:
    """Another trainer takes the place at the end, which ends this one's wait."""
    engine = open_engine(f"sqlite:///{folder}/store.db")
    lease = TrainerLease(engine, "host/1", 60.0)
    assert lease.acquire()
    yield OperatorControl(CONFIG, engine, lease)
    lease.release()
    assert TrainerLease(engine, "host/2", 60.0).acquire()
    engine.dispose()


@contextmanager
def for_serving(folder: Path) -> Iterator[Work]:
    serves = threading.Event()
    client = cast(Any, SimpleNamespace(is_serving=serves.is_set))
    yield lambda: open_context(CONFIG, NOBODY, client, folder, NOBODY, ALONE)
    serves.set()


@contextmanager
def for_room_on_the_disk(folder: Path) -> Iterator[Work]:
    has_room = threading.Event()

    def write() -> None:
        if not has_room.is_set():
            raise OSError("No space left on device")

    yield lambda: retry_until_done(write)
    has_room.set()


@pytest.mark.parametrize("waits", [for_keys, in_a_pause, for_rankings, for_serving, for_room_on_the_disk])
def test_a_wait_shows_progress_all_the_while(
    waits: Callable[[Path], Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("training.attempts.RETRY_SECONDS", CONFIG.poll_seconds)
    monkeypatch.setattr(heartbeat, "_heart", heartbeat._Heart())
    monkeypatch.setattr(heartbeat, "_LEAST_SECONDS", 0.0)
    monkeypatch.setattr(heartbeat, "_WAIT_SECONDS", 0.02)
    heartbeat.start(tmp_path, "waiting")

    def work_to_the_end() -> None:
        # What follows the wait has nobody to work with.
        with suppress(AttributeError, SystemExit):
            work()

    with ExitStack() as stack:
        work = stack.enter_context(waits(tmp_path))
        thread = threading.Thread(target=work_to_the_end)
        thread.start()
        assert beats(tmp_path, 60.0, 1) == 1
        # More than there are ends of waits in this time.
        assert beats(tmp_path, CONFIG.poll_seconds * 2, 6) == 6
        assert thread.is_alive()
    thread.join(30)
    assert not thread.is_alive()


def beats(folder: Path, seconds: float, most: int) -> int:
    """Returns how many beats are seen in this time, at most `most`."""
    deadline, seen = time.monotonic() + seconds, heartbeat.look(folder, "waiting")
    count = 0
    while count < most and time.monotonic() < deadline:
        before, seen = seen, heartbeat.look(folder, "waiting")
        count += seen != before
        time.sleep(0.005)
    return count
