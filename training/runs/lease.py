"""Ensures that one trainer at a time works on a store, and passes operators' requests to it: to pause, to end a run.

The lease is a row of the store's database. So it is where the rankings are, and outlives the trainer that has it. Times
are by the database's clock, which is one for all. Where that clock was set back, a lease holds no longer than if it had
been taken now. A trainer that has ended on this machine is not waited for (training.runs.holder).
"""

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Connection,
    Engine,
    and_,
    case,
    false,
    literal_column,
    or_,
    select,
    true,
    update,
)
from sqlalchemy.exc import SQLAlchemyError

from feedback.store.engine import writing
from feedback.store.tables import TRAINER
from training.runs.holder import has_ended, this_process

logger = logging.getLogger(__name__)

_MICROSECONDS = 1_000_000
# The present time in Unix microseconds, by each kind of database. SQLite's is to the millisecond.
_NOW_US = {
    "sqlite": "CAST(strftime('%s', 'now') || substr(strftime('%f', 'now'), 4) || '000' AS INTEGER)",
    "postgresql": "CAST(extract(epoch FROM clock_timestamp()) * 1000000 AS BIGINT)",
}


@dataclass(frozen=True)
class Control:
    """What operators ask of the trainer, and which trainer has the lease. `holder` and `abort_run` may be empty."""

    paused: bool
    abort_run: str
    """Id of the run that is to end."""
    holder: str
    seconds_left: float
    """Until another trainer may take the lease: 0 if it may now."""


def read_control(engine: Engine) -> Control:
    """Reads the present requests and holder.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: the database cannot be used; all functions of this module raise it.
    """
    with engine.connect() as connection:
        row = connection.execute(select(TRAINER, _now_us(engine).label("now_us"))).one()
    left_us = 0 if has_ended(row.process) else max(row.expires_at_us - row.now_us, 0)
    # A clock that was set back has left a lease that seems longer than any is taken for.
    left_us = min(left_us, row.lease_us or left_us)
    return Control(bool(row.paused), row.abort_run, row.holder, left_us / _MICROSECONDS)


def set_paused(engine: Engine, paused: bool) -> None:
    """Makes the trainer wait between two rounds or phases, or continue. It stays set for any later trainer too."""
    _set(engine, paused=int(paused))


def request_abort(engine: Engine, run_id: str) -> None:
    """Asks for this run to end. There is one such request at a time: a new one replaces it."""
    _set(engine, abort_run=run_id)


def clear_abort(engine: Engine, run_id: str) -> None:
    """Removes the request to end this run, once it has ended. A request to end another run stays."""
    _set(engine, TRAINER.c.abort_run == run_id, abort_run="")


def _set(engine: Engine, *conditions: ColumnElement[bool], **values: object) -> None:
    with writing(engine) as connection:
        connection.execute(update(TRAINER).where(*conditions).values(**values))
        connection.commit()


def _now_us(engine: Engine) -> ColumnElement[int]:
    return literal_column(_NOW_US[engine.dialect.name], BigInteger)


def _shorten(connection: Connection) -> None:
    """Lets a lease end no later than one that were taken now: it is longer only if the clock was set back since."""
    longest = _now_us(connection.engine) + TRAINER.c.lease_us
    too_long = and_(TRAINER.c.lease_us > 0, TRAINER.c.expires_at_us > longest)
    connection.execute(update(TRAINER).where(too_long).values(expires_at_us=longest))


class TrainerLease:
    """The right to train from a store, for `lease_seconds` at a time. Methods raise sqlalchemy.exc.SQLAlchemyError.

    A process that was suspended for longer than that does not know whether another has taken the lease. So call renew()
    right before an action that cannot be undone; for all else it is enough to look at `lost`.
    """

    def __init__(self, engine: Engine, holder: str, lease_seconds: float) -> None:
        """Makes a lease that is not acquired yet. `holder` should name machine and process, for people.

        Raises:
            ValueError: `holder` is empty, or `lease_seconds` is not positive.
        """
        if not holder or lease_seconds <= 0:
            raise ValueError(f"a lease needs a holder and a positive time: {holder!r}, {lease_seconds} seconds")
        self.holder = holder
        self.lost = threading.Event()
        """Set when another trainer has the lease or may have it; cleared when the lease turns out to be ours still."""
        self.epoch = 0
        """Fencing number: greater than those of all earlier holders. 0 before the lease is acquired."""
        self._engine = engine
        self._seconds = lease_seconds
        # By the monotonic clock: until then no other trainer takes the lease.
        self._good_until = 0.0

    def acquire(self) -> bool:
        """Takes the lease if it is free, has expired or has our holder's name, and returns whether it did.

        If several call this at the same time, one of them gets the lease. An earlier process of our holder's name is
        replaced like any other holder, and so is one that has ended on this machine.
        """
        with self._engine.connect() as connection:
            before = connection.execute(select(TRAINER.c.process, TRAINER.c.epoch)).one()
        has_died = and_(TRAINER.c.epoch == before.epoch, true() if has_ended(before.process) else false())
        has_expired = TRAINER.c.expires_at_us <= _now_us(self._engine)
        taken = self._take(or_(TRAINER.c.holder.in_(("", self.holder)), has_expired, has_died))
        if taken:
            self.lost.clear()
        return taken

    def renew(self) -> bool:
        """Keeps the lease for another `lease_seconds`. Returns False, and sets `lost`, if another has taken it.

        An expired lease is kept too if nobody has taken it: whoever takes it increases `epoch`.
        """
        kept = self._take(self._is_ours())
        if kept:
            self.lost.clear()
        else:
            self.lost.set()
        return kept

    def release(self) -> None:
        """Frees the lease, so that another can take it at once. Does nothing if it is not ours."""
        _set(self._engine, self._is_ours(), holder="", process="", expires_at_us=0)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Renews the acquired lease every third of `lease_seconds` while the block runs, and then releases it.

        `lost` is set when another has taken it. It is also set when the lease could not be renewed in time, because the
        database may be out of reach for this process alone.
        """
        ended = threading.Event()
        threads = [
            threading.Thread(target=each, args=(ended,), name=f"lease-{each.__name__.strip('_')}", daemon=True)
            for each in (self._keep, self._watch)
        ]
        for thread in threads:
            thread.start()
        try:
            yield
        finally:
            ended.set()
            for thread in threads:
                thread.join()
            self._release_or_warn()

    def _is_ours(self) -> ColumnElement[bool]:
        return and_(TRAINER.c.holder == self.holder, TRAINER.c.epoch == self.epoch)

    def _take(self, condition: ColumnElement[bool]) -> bool:
        """Takes or keeps the lease if the condition is true in the database, and returns whether it did.

        Our time is read before the wait for other writers: the lease may end too early for us, but never too late.
        """
        good_until = time.monotonic() + self._seconds
        lease_us = round(self._seconds * _MICROSECONDS)
        statement = (
            update(TRAINER)
            .where(condition)
            .values(
                holder=self.holder,
                process=this_process(),
                lease_us=lease_us,
                expires_at_us=_now_us(self._engine) + lease_us,
                epoch=TRAINER.c.epoch + case((self._is_ours(), 0), else_=1),
            )
            .returning(TRAINER.c.epoch)
        )
        with writing(self._engine) as connection:
            _shorten(connection)
            epoch = connection.execute(statement).scalar()
            connection.commit()
        if epoch is None:
            return False
        self.epoch, self._good_until = epoch, good_until
        return True

    def _keep(self, ended: threading.Event) -> None:
        while not ended.wait(self._seconds / 3):
            try:
                self.renew()
            except SQLAlchemyError as error:
                logger.warning("the trainer's lease could not be renewed, trying again: %s", error)

    def _watch(self, ended: threading.Event) -> None:
        """Sets `lost` when the lease has expired. It has its own thread, because a renewal may hang."""
        while not ended.wait(max(self._seconds / 10, self._good_until - time.monotonic())):
            if time.monotonic() >= self._good_until:
                self.lost.set()

    def _release_or_warn(self) -> None:
        try:
            self.release()
        except SQLAlchemyError as error:
            logger.warning("the trainer's lease could not be released, and will expire: %s", error)
