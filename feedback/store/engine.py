"""Opens the store's database, SQLite or PostgreSQL, and brings its tables up to date."""

import sqlite3
import threading
from pathlib import Path

from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine, ExceptionContext, QueuePool, create_engine, event, make_url

from feedback.sqlite_file import open_sqlite

_MIGRATIONS = Path(__file__).parent / "migrations"

# The advisory lock that a writer holds until its transaction ends: any number that nothing else in the database uses.
_WRITER_LOCK = 0x616C6967

# A server gives up the transaction, and with it the lock, of a process that is silent for so long inside of one.
_GIVE_UP = "SET LOCAL idle_in_transaction_session_timeout = '30s'"

# Alembic keeps the running migration in a global variable, so one thread migrates at a time.
_MIGRATING = threading.Lock()


def open_engine(url: str) -> Engine:
    """Opens `sqlite:///relative.db`, `sqlite:////absolute.db` or `postgresql://user@host/database`.

    Several processes may open the same database at once, even an empty one.

    Raises:
        ValueError: the URL is none of these.
        sqlalchemy.exc.SQLAlchemyError: the database cannot be reached or used.
        OSError: the folder of the SQLite file cannot be created.
    """
    parsed = make_url(url)
    backend = parsed.get_backend_name()
    if backend == "postgresql":
        engine = create_engine(parsed.set(drivername="postgresql+psycopg"), pool_pre_ping=True, hide_parameters=True)
    elif backend == "sqlite" and parsed.database:
        engine = _sqlite_engine(Path(parsed.database))
    else:
        raise ValueError(f"not a store: {parsed!r}; give sqlite:///path/store.db or postgresql://user@host/database")
    event.listen(engine, "handle_error", _shorten)
    if _is_up_to_date(engine):
        # Without a lock: whoever opens the store would keep ingest out, for ever if it is stopped there.
        return engine
    with _MIGRATING, writing(engine) as connection:
        if not connection.in_transaction():
            # Otherwise alembic would commit after each migration, and another process might run the next one.
            connection.begin()
        config = Config()
        config.set_main_option("script_location", str(_MIGRATIONS))
        config.attributes["connection"] = connection
        command.upgrade(config, "head")
        connection.commit()
    return engine


def _shorten(context: ExceptionContext) -> None:
    """Makes an error of the database say what the database said, in one line.

    SQLAlchemy would add the statement with its values, which are what users wrote, and a link to its documentation.
    """
    error = context.sqlalchemy_exception
    if error is not None:
        error.args = (" ".join(str(error.args[0]).split()),)
        error.statement = error.code = None


def _is_up_to_date(engine: Engine) -> bool:
    with engine.connect() as connection:
        present = MigrationContext.configure(connection).get_current_heads()
    return list(present) == ScriptDirectory(str(_MIGRATIONS)).get_heads()


def writing(engine: Engine) -> Connection:
    """Begins a transaction, which waits until every other writer's has ended. To be used as a context manager.

    Nothing in it may wait for anything else than the database: it keeps every other writer out.
    """
    connection = engine.connect().execution_options(begin="BEGIN IMMEDIATE")
    if engine.dialect.name == "postgresql":
        try:
            connection.exec_driver_sql(_GIVE_UP)
            connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_WRITER_LOCK})")
        except BaseException:
            connection.close()
            raise
    return connection


def _sqlite_engine(path: Path) -> Engine:
    def connect() -> sqlite3.Connection:
        return open_sqlite(path)

    # For this URL SQLAlchemy would choose the pool of in-memory databases, which closes what other threads use.
    engine = create_engine("sqlite://", creator=connect, poolclass=QueuePool, hide_parameters=True)

    # sqlite3 begins transactions late and ends them early by itself; open_sqlite() turns that off.
    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql(connection.get_execution_options().get("begin", "BEGIN"))

    return engine
