"""Sees to it that one trainer at a time works on a store, and tells it what operators ask: to pause, to end a run.

The lease is a row of the store's database, so that it is where the rankings are, and outlives whoever holds it. Times
are those of each machine's clock: clocks must agree to well within `lease_seconds`, or a trainer's place is taken too
soon or too late.
"""

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from sqlalchemy import ColumnElement, Engine, and_, case, or_, select, update
from sqlalchemy.exc import SQLAlchemyError

from feedback.store.engine import writing
from feedback.store.tables import TRAINER

logger = logging.getLogger(__name__)

MICROSECONDS = 1_000_000


@dataclass(frozen=True)
class Control:
    """What operators ask of the trainer, and who it is. `holder` and `abort_run` are empty for none."""

    paused: bool
    abort_run: str
    """Id of the run that is to end."""
    holder: str
    expires_at: float
    """When the holder's place may be taken, in Unix seconds."""


def read_control(engine: Engine) -> Control:
    """Reads it as it is now. Raises sqlalchemy.exc.SQLAlchemyError, as all functions here do."""
    with engine.connect() as connection:
        row = connection.execute(select(TRAINER)).one()
    return Control(bool(row.paused), row.abort_run, row.holder, row.expires_at_us / MICROSECONDS)


def set_paused(engine: Engine, paused: bool) -> None:
    """Has the trainer wait between two steps, or go on. Holds for whoever trains, until it is set otherwise."""
    _set(engine, paused=int(paused))


def request_abort(engine: Engine, run_id: str) -> None:
    """Asks for this run to end. There is one such request at a time: it replaces an earlier one."""
    _set(engine, abort_run=run_id)


def clear_abort(engine: Engine, run_id: str) -> None:
    """Takes back the request to end this run, once it has ended. A request to end another stays."""
    _set(engine, TRAINER.c.abort_run == run_id, abort_run="")


def _set(engine: Engine, *conditions: ColumnElement[bool], **values: object) -> None:
    with writing(engine) as connection:
        connection.execute(update(TRAINER).where(*conditions).values(**values))
        connection.commit()


class TrainerLease:
    """The right to train from a store, for `lease_seconds` at a time. Methods raise sqlalchemy.exc.SQLAlchemyError.

    Who has been stopped for longer than that does not know that its place was taken. So ask renew() right before what
    cannot be undone; `lost` is soon enough for the rest.
    """

    def __init__(
        self, engine: Engine, holder: str, lease_seconds: float, clock: Callable[[], float] = time.time
    ) -> None:
        """Takes nothing yet. `holder` should name the machine and process; `clock` gives Unix seconds.

        Raises ValueError for an empty `holder` and for `lease_seconds` that are not positive.
        """
        if not holder or lease_seconds <= 0:
            raise ValueError(f"a lease needs a holder and a time: {holder!r}, {lease_seconds} seconds")
        self.holder = holder
        self.lost = threading.Event()
        """Set when another has the lease or may have it; cleared when it proves to be ours still."""
        self.epoch = 0
        """Fencing number: greater than those of all earlier holders. 0 before the lease was acquired."""
        self._engine = engine
        self._seconds = lease_seconds
        self._clock = clock
        # By the monotonic clock: until then nobody else takes the lease.
        self._good_until = 0.0

    def acquire(self) -> bool:
        """Takes the lease if it is free, has expired or has our holder's name; of several at once one gets it.

        Another process of the same name is replaced like any other holder.
        """
        has_expired = TRAINER.c.expires_at_us <= round(self._clock() * MICROSECONDS)
        taken = self._take(or_(TRAINER.c.holder.in_(("", self.holder)), has_expired))
        if taken:
            self.lost.clear()
        return taken

    def renew(self) -> bool:
        """Keeps the lease for another `lease_seconds`. False, and `lost` set, if another has taken it.

        One that has expired is kept all the same while nobody has: whoever takes it counts `epoch` up.
        """
        kept = self._take(self._is_ours())
        if kept:
            self.lost.clear()
        else:
            self.lost.set()
        return kept

    def release(self) -> None:
        """Lets another have the lease at once. Harmless when it is not ours."""
        _set(self._engine, self._is_ours(), holder="", expires_at_us=0)

    @contextmanager
    def held(self) -> Iterator[None]:
        """Renews the acquired lease every third of `lease_seconds` while the block runs, and then releases it.

        `lost` is set when another has taken it, and also when it could not be renewed in time: the database may be out
        of reach for us alone.
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
        """Compare and set. The times are from before the wait for other writers: rather too early than too late."""
        good_until = time.monotonic() + self._seconds
        statement = (
            update(TRAINER)
            .where(condition)
            .values(
                holder=self.holder,
                expires_at_us=round((self._clock() + self._seconds) * MICROSECONDS),
                epoch=TRAINER.c.epoch + case((self._is_ours(), 0), else_=1),
            )
            .returning(TRAINER.c.epoch)
        )
        with writing(self._engine) as connection:
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
        """In a thread of its own, since a renewal may hang."""
        while not ended.wait(max(self._seconds / 10, self._good_until - time.monotonic())):
            if time.monotonic() >= self._good_until:
                self.lost.set()

    def _release_or_warn(self) -> None:
        try:
            self.release()
        except SQLAlchemyError as error:
            logger.warning("the trainer's lease could not be released, and will expire: %s", error)
