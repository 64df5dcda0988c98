"""How a process of `alignd` begins and ends: its configuration, its log, its folder, and errors in words."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console

from deploy.cli.log import begin_log
from deploy.cli.plain import plain
from deploy.config import AligndConfig, ConfigError, load_config, resolved
from deploy.data_dir import check_usable
from deploy.endings import PASSING_CODE
from feedback import heartbeat
from feedback.durable import make_private

EXIT_FAILED = 1


def start(dry_run: bool, verb: str = "") -> AligndConfig | None:
    """Returns the configuration, and begins to log and, if a verb of `alignd up` is given, to show its progress.

    On a dry run, prints the configuration and returns None.

    Raises:
        ConfigError: nothing can be written in data_dir.
    """
    config = load_config()
    if dry_run:
        typer.echo(resolved(config), nl=False)
        return None
    begin_log(config.log_format)
    check_usable(config.data_dir)
    # A release that did not do so may have made it. What users wrote lies below it, in runs and versions too.
    make_private(config.data_dir)
    if verb:
        heartbeat.start(config.data_dir, verb)
    return config


def use_recipe(name_or_path: str) -> None:
    """Makes this process and its children use a recipe, if one is named.

    Raises:
        ConfigError: there is no such recipe, or it is bad.
    """
    from training.recipes import RecipeError, load_recipe

    if not name_or_path:
        return
    try:
        # A setting that the recipe does not name stays as alignd.toml has it.
        os.environ["ALIGND_TRAINING"] = load_recipe(name_or_path).model_dump_json(exclude_unset=True)
    except RecipeError as error:
        raise ConfigError(f"recipe {name_or_path}: {error}") from error


def stop_on_signal() -> threading.Event:
    """Returns an event that SIGTERM and SIGINT set."""
    stop = threading.Event()
    for name in (signal.SIGTERM, signal.SIGINT):
        signal.signal(name, lambda number, frame: stop.set())
    return stop


@contextmanager
def store_in_words() -> Iterator[None]:
    """Raises typer.Exit in place of an error of the store; its message has been printed."""
    from sqlalchemy.exc import OperationalError, SQLAlchemyError

    try:
        yield
    except OperationalError as error:
        raise fail(f"the store is away: {error}", PASSING_CODE) from error
    except SQLAlchemyError as error:
        raise fail(f"the store cannot be used: {error}") from error


def fail(message: str, code: int = EXIT_FAILED) -> typer.Exit:
    """Prints an error that operators can fix, and returns the exception that ends the command."""
    Console(stderr=True).print(plain(message, lines=True), style="red", highlight=False, markup=False, soft_wrap=True)
    return typer.Exit(code)
