"""Ensures that one trainer at a time works on a store, and passes operators' requests to it: to pause, to end a run.

The lease is a row of the store's database. So it is where the rankings are, and outlives the trainer that has it. Times
are by each machine's clock. The clocks must differ by much less than `lease_seconds`; otherwise another trainer takes
over too soon or too late.
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

_MICROSECONDS = 1_000_000


@dataclass(frozen=True)
class Control:
    """What operators ask of the trainer, and which trainer has the lease. `holder` and `abort_run` may be empty."""

    paused: bool
    abort_run: str
    """Id of the run that is to end."""
    holder: str
    expires_at: float
    """When another trainer may take the lease, in Unix seconds."""


def read_control(engine: Engine) -> Control:
    """Reads the present requests and holder.

    Raises:
        sqlalchemy.exc.SQLAlchemyError: the database cannot be used; all functions of this module raise it.
    """
    with engine.connect() as connection:
        row = connection.execute(select(TRAINER)).one()
    return Control(bool(row.paused), row.abort_run, row.holder, row.expires_at_us / _MICROSECONDS)


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


class TrainerLease:
    """The right to train from a store, for `lease_seconds` at a time. Methods raise sqlalchemy.exc.SQLAlchemyError.

    A process that was suspended for longer than that does not know whether another has taken the lease. So call renew()
    right before an action that cannot be undone; for all else it is enough to look at `lost`.
    """

    def __init__(
        self, engine: Engine, holder: str, lease_seconds: float, clock: Callable[[], float] = time.time
    ) -> None:
        """Makes a lease that is not acquired yet. `holder` should name machine and process; `clock` gives Unix seconds.

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
        self._clock = clock
        # By the monotonic clock: until then no other trainer takes the lease.
        self._good_until = 0.0

    def acquire(self) -> bool:
        """Takes the lease if it is free, has expired or has our holder's name, and returns whether it did.

        If several call this at the same time, one of them gets the lease. An earlier process of our holder's name is
        replaced like any other holder.
        """
        has_expired = TRAINER.c.expires_at_us <= round(self._clock() * _MICROSECONDS)
        taken = self._take(or_(TRAINER.c.holder.in_(("", self.holder)), has_expired))
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
        _set(self._engine, self._is_ours(), holder="", expires_at_us=0)

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

        Times are read before the wait for other writers: the lease may end too early for us, but never too late.
        """
        good_until = time.monotonic() + self._seconds
        statement = (
            update(TRAINER)
            .where(condition)
            .values(
                holder=self.holder,
                expires_at_us=round((self._clock() + self._seconds) * _MICROSECONDS),
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
        """Sets `lost` when the lease has expired. It has its own thread, because a renewal may hang."""
        while not ended.wait(max(self._seconds / 10, self._good_until - time.monotonic())):
            if time.monotonic() >= self._good_until:
                self.lost.set()

    def _release_or_warn(self) -> None:
        try:
            self.release()
        except SQLAlchemyError as error:
            logger.warning("the trainer's lease could not be released, and will expire: %s", error)
