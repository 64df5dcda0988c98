"""One trainer at a time has the lease, whichever crashes, hangs or comes back; and operators' requests reach it."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, Row, event, insert, select, update
from sqlalchemy.exc import IntegrityError, OperationalError

from feedback.store.engine import open_engine, writing
from feedback.store.tables import TRAINER
from training.runs.holder import has_ended, this_process
from training.runs.lease import (
    Control,
    TrainerLease,
    clear_abort,
    read_control,
    request_abort,
    set_paused,
)

REPOSITORY = Path(__file__).parents[3]
SECONDS = 60.0
NUM_THREADS = 6
PATIENCE_SECONDS = 60.0
ABOVE_ALL_PIDS = 2**22 + 1

# Keeps the lease until its stdin ends, and prints when it has it, whether it lost it, and whether it can renew it.
HOLDER = """
import sys
from feedback.store.engine import open_engine
from training.runs.lease import TrainerLease
lease = TrainerLease(open_engine(sys.argv[1]), "held elsewhere", float(sys.argv[2]))
assert lease.acquire()
with lease.held():
    print("held", flush=True)
    if lease.lost.wait(60):
        print("lost", lease.renew(), flush=True)
"""


@pytest.fixture
def engine(store_url: str) -> Iterator[Engine]:
    opened = open_engine(store_url)
    yield opened
    opened.dispose()


def let_pass(engine: Engine, seconds: float) -> None:
    """Lets the database's clock be so many seconds further, as seen from the lease."""
    with engine.begin() as connection:
        connection.execute(update(TRAINER).values(expires_at_us=TRAINER.c.expires_at_us - round(seconds * 1_000_000)))


def row(engine: Engine) -> Row[Any]:
    with engine.connect() as connection:
        return connection.execute(select(TRAINER)).one()


def eventually(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.fixture
def elsewhere(store_url: str) -> Iterator[Callable[[float], subprocess.Popen[str]]]:
    """Starts another process that has the lease for some seconds at a time."""
    started: list[subprocess.Popen[str]] = []

    def start(seconds: float) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDER, store_url, str(seconds)]
        process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_nobody_has_a_new_stores_lease(engine: Engine) -> None:
    assert read_control(engine) == Control(paused=False, abort_run="", holder="", seconds_left=0.0)


def test_one_of_two_has_it_until_it_expires(engine: Engine) -> None:
    first, second = TrainerLease(engine, "first", SECONDS), TrainerLease(engine, "second", SECONDS)
    assert (first.acquire(), second.acquire(), first.acquire()) == (True, False, True)
    control = read_control(engine)
    assert (control.holder, first.epoch) == ("first", 1)
    assert SECONDS / 2 < control.seconds_left <= SECONDS
    let_pass(engine, SECONDS / 2)
    assert not second.acquire()
    let_pass(engine, SECONDS / 2)
    assert read_control(engine).seconds_left == 0
    assert second.acquire()
    assert (read_control(engine).holder, second.epoch) == ("second", 2)


def test_renewing_keeps_it(engine: Engine) -> None:
    first, second = TrainerLease(engine, "first", SECONDS), TrainerLease(engine, "second", SECONDS)
    assert first.acquire()
    for _ in range(3):
        let_pass(engine, SECONDS / 2)
        assert first.renew()
        assert not second.acquire()
    assert not first.lost.is_set()
    assert first.epoch == 1


def test_an_expired_lease_that_nobody_took_is_renewed(engine: Engine) -> None:
    lease = TrainerLease(engine, "first", SECONDS)
    assert lease.acquire()
    let_pass(engine, 2 * SECONDS)
    assert lease.renew()
    assert (read_control(engine).seconds_left > 0, lease.epoch) == (True, 1)


def test_a_zombie_finds_its_lease_gone_and_disturbs_nothing(engine: Engine) -> None:
    zombie, heir = TrainerLease(engine, "zombie", SECONDS), TrainerLease(engine, "heir", SECONDS)
    assert zombie.acquire()
    let_pass(engine, SECONDS)
    assert heir.acquire()
    before = row(engine)
    assert not zombie.renew()
    zombie.release()
    assert not zombie.acquire()
    assert zombie.lost.is_set()
    assert row(engine) == before
    heir.release()
    assert not zombie.renew()
    assert zombie.acquire()
    assert not zombie.lost.is_set()
    assert zombie.epoch == 3


def test_a_process_started_again_replaces_its_zombie_of_the_same_name(engine: Engine) -> None:
    zombie, again = TrainerLease(engine, "host", SECONDS), TrainerLease(engine, "host", SECONDS)
    assert zombie.acquire()
    assert again.acquire()
    assert again.epoch > zombie.epoch
    assert not zombie.renew()
    zombie.release()
    assert again.renew()


def test_what_was_released_is_free(engine: Engine) -> None:
    first, second = TrainerLease(engine, "first", SECONDS), TrainerLease(engine, "second", SECONDS)
    first.release()
    assert first.acquire()
    second.release()
    assert read_control(engine).holder == "first"
    first.release()
    assert read_control(engine).holder == ""
    assert not first.renew()
    assert second.acquire()
    assert second.epoch == 2


def test_of_many_at_once_exactly_one_gets_it(store_url: str) -> None:
    engines = [open_engine(store_url) for _ in range(NUM_THREADS)]
    leases = [TrainerLease(engine, f"t{index}", SECONDS) for index, engine in enumerate(engines)]
    for epoch in range(1, 4):
        start = threading.Barrier(NUM_THREADS)
        winners: list[TrainerLease] = []

        def contend(lease: TrainerLease, start: threading.Barrier, winners: list[TrainerLease]) -> None:
            start.wait()
            if lease.acquire():
                winners.append(lease)

        threads = [threading.Thread(target=contend, args=(lease, start, winners)) for lease in leases]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (winner,) = winners
        assert winner.epoch == epoch
        assert read_control(engines[0]).holder == winner.holder
        winner.release()
    for engine in engines:
        engine.dispose()


def test_a_held_lease_is_renewed_and_then_released(engine: Engine) -> None:
    lease = TrainerLease(engine, "first", 3.0)
    assert lease.acquire()
    with lease.held():
        let_pass(engine, 2.0)
        eventually(lambda: read_control(engine).seconds_left > 1.5)
        assert not lease.lost.is_set()
        assert read_control(engine).holder == "first"
    assert read_control(engine).holder == ""
    assert not lease.lost.is_set()


def test_the_heartbeat_finds_out_that_another_has_it(engine: Engine) -> None:
    lease, thief = TrainerLease(engine, "first", 3.0), TrainerLease(engine, "thief", SECONDS)
    assert lease.acquire()
    with lease.held():
        let_pass(engine, 3.0)
        assert thief.acquire()
        assert lease.lost.wait(PATIENCE_SECONDS)
    assert read_control(engine).holder == "thief"


def test_it_is_released_when_the_block_raises(engine: Engine) -> None:
    lease = TrainerLease(engine, "first", SECONDS)
    assert lease.acquire()
    with pytest.raises(SystemExit), lease.held():
        raise SystemExit(0)
    assert read_control(engine).holder == ""


def test_it_counts_as_lost_when_the_database_is_out_of_reach_for_too_long(
    engine: Engine, caplog: pytest.LogCaptureFixture
) -> None:
    # Long enough that a busy machine comes to try a renewal before the lease has run out.
    lease = TrainerLease(engine, "first", 2.0)
    assert lease.acquire()

    def fail(connection: object, cursor: object, statement: str, *_: object) -> None:
        if statement.startswith("UPDATE"):
            raise OperationalError(statement, {}, Exception("unreachable"))

    event.listen(engine, "before_cursor_execute", fail)
    with lease.held():
        assert lease.lost.wait(PATIENCE_SECONDS)
    event.remove(engine, "before_cursor_execute", fail)
    assert "could not be renewed" in caplog.text
    assert "could not be released" in caplog.text
    assert read_control(engine).holder == "first"


def test_it_counts_as_lost_while_a_renewal_hangs(store_url: str, engine: Engine) -> None:
    lease, other = TrainerLease(engine, "first", 0.5), open_engine(store_url)
    assert lease.acquire()
    with lease.held(), writing(other) as connection:
        connection.execute(select(1))
        assert lease.lost.wait(PATIENCE_SECONDS)
    other.dispose()
    assert read_control(engine).holder == ""


def test_what_was_never_acquired_is_lost_at_once(engine: Engine) -> None:
    lease = TrainerLease(engine, "first", SECONDS)
    with lease.held():
        assert lease.lost.wait(PATIENCE_SECONDS)
    assert read_control(engine).holder == ""


def test_after_kill_9_another_on_the_machine_acquires_it_at_once(
    engine: Engine, elsewhere: Callable[[float], subprocess.Popen[str]]
) -> None:
    process, heir = elsewhere(SECONDS), TrainerLease(engine, "heir", SECONDS)
    assert not heir.acquire()
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # a zombie until somebody waits for it
    control = read_control(engine)
    assert (control.holder, control.seconds_left) == ("held elsewhere", 0)
    assert heir.acquire()
    assert heir.epoch == 2


@pytest.mark.parametrize("field", [0, 1, 2], ids=["another host", "before a reboot", "in another container"])
def test_only_where_a_process_could_be_seen_is_it_taken_for_ended(engine: Engine, field: int) -> None:
    assert TrainerLease(engine, "elsewhere", SECONDS).acquire()
    parts = [*row(engine).process.split(" ")[:3], str(ABOVE_ALL_PIDS), "1"]
    parts[field] = "elsewhere"
    with engine.begin() as connection:
        connection.execute(update(TRAINER).values(process=" ".join(parts)))
    heir = TrainerLease(engine, "heir", SECONDS)
    assert not heir.acquire()
    let_pass(engine, SECONDS)
    assert heir.acquire()


def test_a_process_id_that_was_given_out_again_is_another_process() -> None:
    mine = this_process()
    place, pid, started = mine.rsplit(" ", 2)
    assert not has_ended(mine)
    assert has_ended(f"{place} {pid} {int(started) - 1}")
    assert has_ended(f"{place} {ABOVE_ALL_PIDS} {started}")
    assert not has_ended("")


def test_a_lease_that_was_taken_with_the_clock_a_day_ahead_ends_as_any_other(engine: Engine) -> None:
    dead, heir = TrainerLease(engine, "dead", 0.5), TrainerLease(engine, "heir", SECONDS)
    assert dead.acquire()
    let_pass(engine, -24 * 3600.0)
    assert 0 < read_control(engine).seconds_left <= 0.5
    eventually(heir.acquire)
    let_pass(engine, -24 * 3600.0)
    assert heir.renew()
    assert read_control(engine).seconds_left <= SECONDS


def test_a_process_that_was_suspended_for_too_long_finds_out_when_it_continues(
    engine: Engine, elsewhere: Callable[[float], subprocess.Popen[str]]
) -> None:
    process = elsewhere(3.0)
    process.send_signal(signal.SIGSTOP)
    heir = TrainerLease(engine, "heir", SECONDS)
    let_pass(engine, 3.0)
    assert heir.acquire()
    process.send_signal(signal.SIGCONT)
    said, _ = process.communicate(timeout=PATIENCE_SECONDS)
    assert (said, process.returncode) == ("lost False\n", 0)
    assert heir.renew()


def test_pausing_and_resuming(engine: Engine) -> None:
    set_paused(engine, True)
    assert read_control(engine) == Control(paused=True, abort_run="", holder="", seconds_left=0.0)
    set_paused(engine, True)
    assert read_control(engine).paused
    set_paused(engine, False)
    assert not read_control(engine).paused


def test_a_run_is_asked_to_end_until_it_has(engine: Engine) -> None:
    request_abort(engine, "run1")
    assert read_control(engine) == Control(paused=False, abort_run="run1", holder="", seconds_left=0.0)
    request_abort(engine, "run2")
    clear_abort(engine, "run1")
    assert read_control(engine).abort_run == "run2"
    clear_abort(engine, "run2")
    assert read_control(engine).abort_run == ""


def test_lease_and_control_leave_each_other_alone(engine: Engine) -> None:
    lease = TrainerLease(engine, "first", SECONDS)
    assert lease.acquire()
    set_paused(engine, True)
    request_abort(engine, "run1")
    assert lease.renew()
    control = read_control(engine)
    assert (control.paused, control.abort_run, control.holder) == (True, "run1", "first")
    lease.release()
    assert read_control(engine) == Control(True, "run1", "", 0.0)


def test_a_store_of_the_first_version_gets_the_table(store_url: str, engine: Engine) -> None:
    with engine.begin() as connection:
        TRAINER.drop(connection)
        for column in ("last_digest", "num_losses"):
            connection.exec_driver_sql(f"ALTER TABLE offsets DROP COLUMN {column}")
        connection.exec_driver_sql("DROP INDEX samples_first")
        connection.exec_driver_sql("UPDATE alembic_version SET version_num = '0001'")
    again = open_engine(store_url)
    assert read_control(again) == Control(False, "", "", 0.0)
    again.dispose()


def test_there_is_one_row(engine: Engine) -> None:
    row = {"id": 2, "holder": "", "expires_at_us": 0, "epoch": 0, "paused": 0, "abort_run": ""}
    with pytest.raises(IntegrityError), engine.begin() as connection:
        connection.execute(insert(TRAINER), row)


@pytest.mark.parametrize(("holder", "seconds"), [("", SECONDS), ("first", 0.0), ("first", -1.0)])
def test_a_lease_needs_a_holder_and_a_time(tmp_path: Path, holder: str, seconds: float) -> None:
    engine = open_engine(f"sqlite:///{tmp_path}/store.db")
    with pytest.raises(ValueError, match="a lease needs"):
        TrainerLease(engine, holder, seconds)
    engine.dispose()
