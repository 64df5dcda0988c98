"""`alignd keys`: makes, lists, rotates and revokes the API keys by which callers are let in."""

from __future__ import annotations

import getpass
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from deploy.cli.plain import plain
from deploy.cli.process import fail
from deploy.config import load_config
from deploy.operator_key import NAME, keep_operator_key
from feedback.durable import private_folder
from serving.access.keys import SCOPES, ApiKey, KeysError, create_key, read_keys, revoke_key, rotate_key

app = typer.Typer(help="Let callers in, and keep them out.", no_args_is_help=True)
console = Console(highlight=False)

Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]
Name = Annotated[str, typer.Argument(help="The key's name, or its id.")]
_UNITS = {"m": timedelta(minutes=1), "h": timedelta(hours=1), "d": timedelta(days=1)}


def _duration(text: str) -> timedelta:
    """Reads a duration such as 90d, 12h or 30m."""
    match = re.fullmatch(r"(\d{1,5})([mhd])", text)
    if not match:
        raise typer.BadParameter(f"{text!r} is no duration: write a number and m, h or d, such as 90d")
    return int(match[1]) * _UNITS[match[2]]


@app.command()
def create(
    name: Annotated[str, typer.Argument(help="What to call it: of a-z, 0-9 and -.")],
    scope: Annotated[list[str], typer.Option(help=f"What it is for: {', '.join(SCOPES)}; may be repeated.")],
    application: Annotated[
        str, typer.Option(help="The application that it belongs to, whose users its user ids are. Default: its name.")
    ] = "",
    expires: Annotated[str, typer.Option(help="After which it is refused, such as 90d. Default: never.")] = "",
    as_json: Json = False,
) -> None:
    """Make a key, and print it once: it is kept nowhere."""
    lifetime = _duration(expires) if expires else None
    path = load_config().api_keys_path
    with _in_words():
        private_folder(path.parent)
        made, secret = create_key(path, name, application or name, scope, getpass.getuser(), lifetime)
    _print_made(made, secret, as_json)


@app.command("list")
def list_keys(as_json: Json = False) -> None:
    """List all keys, those that are no longer taken too. None is shown in clear."""
    now = datetime.now(UTC)
    with _in_words():
        found = read_keys(load_config().api_keys_path)
    if as_json:
        typer.echo(json.dumps([_as_row(key, now) for key in found], indent=2))
        return
    table = Table("name", "application", "scopes", "state", "created", "expires", "id", box=None, pad_edge=False)
    for key in found:
        expires = f"{key.expires_at:%Y-%m-%d %H:%M}" if key.expires_at else "never"
        table.add_row(
            key.name, key.application or "-", ", ".join(key.scopes), key.state(now),
            f"{key.created_at:%Y-%m-%d %H:%M} by {plain(key.created_by)}", expires, key.key_id,
        )  # fmt: skip
    console.print(table if found else "There is no key; `alignd keys create` makes one.")


@app.command()
def revoke(name: Name) -> None:
    """Refuse a key from now on. Servers follow within two seconds."""
    with _in_words():
        for key in revoke_key(load_config().api_keys_path, name, getpass.getuser()):
            console.print(f"{key.name} ({key.key_id}) is revoked.")


@app.command()
def rotate(
    name: Name,
    overlap: Annotated[str, typer.Option(help="For how long the old key is still taken, such as 24h.")] = "24h",
    as_json: Json = False,
) -> None:
    """Make a new key in place of one, for the same application and scopes, and print it once."""
    config = load_config()
    with _in_words():
        made, secret = rotate_key(config.api_keys_path, name, getpass.getuser(), _duration(overlap))
        if made.name == NAME and config.operator_key_path.exists():
            # This machine's own processes read it there.
            keep_operator_key(config, secret)
    _print_made(made, secret, as_json)


def _print_made(made: ApiKey, secret: str, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(_as_row(made, datetime.now(UTC)) | {"key": secret}, indent=2))
        return
    # The key alone on standard output, so that a script can keep it.
    until = f", until {made.expires_at:%Y-%m-%d %H:%M} UTC" if made.expires_at else ""
    Console(stderr=True, highlight=False).print(
        f"{made.name}, of the application {made.application}: {', '.join(made.scopes)}{until}. "
        "Keep it now: it is not shown again.",
        soft_wrap=True,
    )
    typer.echo(secret)


def _as_row(key: ApiKey, now: datetime) -> dict[str, object]:
    """Returns a key for JSON, without its digest."""
    times = {name: getattr(key, name) for name in ("created_at", "expires_at", "revoked_at")}
    return {
        "id": key.key_id,
        "name": key.name,
        "application": key.application,
        "scopes": list(key.scopes),
        "state": key.state(now),
        "created_by": key.created_by,
        **{name: value.isoformat() if value else None for name, value in times.items()},
    }


@contextmanager
def _in_words() -> Iterator[None]:
    """Raises typer.Exit in place of an error of the file of keys; its message has been printed."""
    try:
        yield
    except KeysError as error:
        raise fail(str(error)) from error
    except OSError as error:
        raise fail(f"the file of API keys cannot be used: {error}") from error
