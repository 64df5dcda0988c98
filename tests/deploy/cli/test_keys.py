"""`alignd keys` and `alignd audit` as an operator uses them, without a server."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from deploy.cli.main import app
from tests.kafka_broker import free_port

Alignd = Callable[..., Result]


@pytest.fixture
def alignd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Alignd:
    """Runs the command line on an empty data_dir, where no server answers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGND_DATA_DIR", str(tmp_path / "var"))
    monkeypatch.setenv("ALIGND_SERVING__PORT", str(free_port()))
    return lambda *arguments: CliRunner().invoke(app, list(arguments))


def rows(alignd: Alignd) -> list[dict[str, object]]:
    found: list[dict[str, object]] = json.loads(alignd("keys", "list", "--json").stdout)
    return found


def test_a_key_is_shown_once_and_listed_rotated_and_revoked(alignd: Alignd, tmp_path: Path) -> None:
    assert "alignd keys create" in alignd("keys", "list").stdout
    made = alignd("keys", "create", "web", "--scope", "sample", "--application", "shop", "--expires", "90d")
    secret = made.stdout.strip()
    assert (made.exit_code, secret.startswith("alignd_"), "not shown again" in made.stderr) == (0, True, True)
    rotated = json.loads(alignd("keys", "rotate", "web", "--overlap", "1h", "--json").stdout)
    assert rotated["key"] != secret
    assert [(each["name"], each["state"]) for each in rows(alignd)] == [("web", "active")] * 2
    assert alignd("keys", "revoke", "web").stdout.count("is revoked") == 2
    assert {each["state"] for each in rows(alignd)} == {"revoked"}
    listed = alignd("keys", "list").stdout
    everything = listed + "".join(path.read_text() for path in (tmp_path / "var").iterdir())
    assert secret not in everything
    assert rotated["key"] not in everything


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("create", "Web", "--scope", "sample"), "'Web' is not a name"),
        (("create", "web", "--scope", "everything"), "a key has one or more of sample, feedback"),
        (("create", "web", "--scope", "sample", "--expires", "soon"), "is no duration"),
        (("revoke", "web"), "there is no active key web"),
        (("rotate", "web"), "there is no active key web"),
    ],
)
def test_what_cannot_be_done_is_said(alignd: Alignd, arguments: tuple[str, ...], says: str) -> None:
    done = alignd("keys", *arguments)
    assert done.exit_code
    assert says in " ".join(done.output.split())
    assert rows(alignd) == []


def test_audit_tells_what_was_done_to_keys_where_no_server_answers_and_that_this_is_not_all(alignd: Alignd) -> None:
    alignd("keys", "create", "web", "--scope", "sample")
    alignd("keys", "rotate", "web")
    first, second = (each["id"] for each in rows(alignd))
    alignd("keys", "revoke", str(second))
    done = alignd("audit", "--json")
    told = [json.loads(line)["what"] for line in done.stdout.splitlines()]
    assert told == [
        f"key web ({first}) of web created: sample",
        f"key web ({second}) of web made in place of {first}: sample",
        f"key web ({second}) of web revoked",
    ]
    assert done.exit_code == 1
    assert "this is not all" in done.stderr
