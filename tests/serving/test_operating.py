"""`alignd policies` and `alignd status` on a real server."""

import json
import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from alignd.v1.policy_service_pb2 import STAGE_CANDIDATE, STAGE_LIVE
from feedback.bus.contract import Record
from feedback.bus.topics import POLICIES
from feedback.bus.url import open_bus
from tests.serving.calls import Stubs
from tests.serving.policy_events import STAGE_REJECTED, moved
from tests.serving.processes import Server, wait_until
from tests.serving.rollout import get, live_version, new_version, replica, wait_served

pytestmark = [pytest.mark.timeout(300), pytest.mark.usefixtures("version_1_again")]


def alignd(server: Server, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "deploy.cli", *arguments]
    environment = {**os.environ, **server.environment, "COLUMNS": "200", "NO_COLOR": "1"}
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)


def said(server: Server, *arguments: str) -> str:
    done = alignd(server, *arguments)
    assert done.returncode == 0, done.stderr
    return done.stdout


def output_of(server: Server, *arguments: str) -> Any:
    return json.loads(said(server, *arguments, "--json"))


def test_an_operator_promotes_and_rolls_back(stubs: Stubs, server: Server, root: Path) -> None:
    _, manifest = new_version(stubs, root)
    name = f"v{manifest.version}"
    assert f"Dry run: {name} would become LIVE" in said(server, "policies", "promote", name, "--dry-run")
    assert get(stubs, manifest.version).stage == STAGE_CANDIDATE

    assert f"{name} is live" in said(server, "policies", "promote", name, "-m", "better [/at] it")
    wait_served(stubs, manifest.version)
    change = get(stubs, manifest.version).history[-1]
    assert change.reason == "better [/at] it"
    assert change.actor == "local-operator"
    assert change.claimed_actor.startswith("operator/")
    assert "local-operator (operator/" in said(server, "policies", "show", name)
    done = [json.loads(line) for line in said(server, "audit", "--json").splitlines()]
    assert {"who": "local-operator", "what": f"{name} CANDIDATE -> LIVE", "why": "better [/at] it"}.items() <= max(
        done, key=lambda deed: (deed["time"], deed["what"])
    ).items()
    assert any("key local-operator" in deed["what"] and "created" in deed["what"] for deed in done)
    assert "better [/at] it" in said(server, "policies", "show", name)

    assert "would become LIVE" in said(server, "policies", "rollback", "--dry-run")
    assert live_version(stubs) == manifest.version
    assert "v1 is live again" in said(server, "policies", "rollback", "-m", "worse")
    wait_served(stubs, 1)
    assert get(stubs, 1).stage == STAGE_LIVE


def test_an_operator_rejects_and_reinstates(stubs: Stubs, server: Server, root: Path) -> None:
    name = f"v{new_version(stubs, root)[1].version}"
    assert f"{name} is REJECTED" in said(server, "policies", "reject", name, "-m", "users complain")
    assert f"{name} is CANDIDATE" in said(server, "policies", "reinstate", name, "-m", "about another one")
    history = said(server, "policies", "show", name)
    assert "users complain" in history
    assert "about another one" in history
    assert "v1 is live, and whole: there is nothing to repair" in said(server, "policies", "repair")
    refused = alignd(server, "policies", "reject", name, "-m", "one\n2026-01-01  LIVE  operator/eve: all is well")
    assert refused.returncode == 1
    assert "reason: must have no control characters" in refused.stderr


def test_what_came_from_outside_reaches_the_terminal_without_control_characters(
    stubs: Stubs, server: Server, root: Path
) -> None:
    """Who reaches the bus writes what they like to it: an escape code would clear the screen, or forge lines."""
    version = new_version(stubs, root)[1].version
    event = moved(version, STAGE_CANDIDATE, STAGE_REJECTED)
    event.event_id = f"forged-{version}"
    change = event.stage_changed.change
    change.actor, change.reason = "eve\x1b[2J", "one\n  2026-01-01  LIVE      operator/eve: \u202etwo [red]"
    with closing(open_bus(f"sqlite:///{server.data_dir}/bus.db")) as bus:
        bus.publish([Record(POLICIES, event.event_id.encode(), event.SerializeToString(), event.event_id)])
    wait_until(lambda: get(stubs, version).stage == STAGE_REJECTED, 20, "read")
    shown = said(server, "policies", "show", f"v{version}")
    assert r"REJECTED  eve\x1b[2J: one\n  2026-01-01  LIVE      operator/eve: \u202etwo [red]" in shown
    assert not {"\x1b", "\u202e"} & set(shown)


def test_versions_are_listed_shown_and_traced(stubs: Stubs, server: Server, root: Path) -> None:
    _, manifest = new_version(stubs, root)
    name = f"v{manifest.version}"
    first = next(line for line in said(server, "policies", "list").splitlines() if line.startswith("│ v1 "))
    assert "LIVE" in first
    assert replica(stubs).replica_id in first
    listed = output_of(server, "policies", "list")
    assert listed["live_version"] == 1
    assert [policy["version"] for policy in listed["policies"]][:1] == [manifest.version]
    assert output_of(server, "policies", "show", name)["manifest"]["weight_digest"] == manifest.weight_digest
    assert manifest.weight_digest in said(server, "policies", "show", name)
    lineage = said(server, "policies", "lineage", name)
    assert lineage.index(name) < lineage.index("v1 ")
    assert "imported" in lineage
    assert [policy["version"] for policy in output_of(server, "policies", "lineage", name)] == [manifest.version, 1]


def test_status_is_one_screen(server: Server) -> None:
    screen = said(server, "status")
    assert f"{server.address} SERVING" in screen
    assert "live: v1" in screen
    assert "in the store" in screen
    assert "no run yet" in screen
    assert len(screen.splitlines()) < 24


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("show", "v999"), "NOT_FOUND: there is no policy v999"),
        (("show", "newest"), "  policy: "),
        (("promote", "v999"), "NOT_FOUND"),
        (("rollback", "v999"), "NOT_FOUND"),
        (("lineage", "v999"), "NOT_FOUND"),
    ],
)
def test_a_refusal_says_which_field_and_why(server: Server, arguments: tuple[str, ...], says: str) -> None:
    done = alignd(server, "policies", *arguments)
    assert done.returncode == 1
    assert says in done.stderr
    assert "Traceback" not in done.stderr
