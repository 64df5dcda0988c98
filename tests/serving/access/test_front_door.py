"""The front door as strangers meet it: `alignd up` on a public address, clients that nobody here wrote, wrong callers.

The server's certificate, its settings, its key and every client are those that docs/api.md shows, run as they stand.
"""

import json
import os
import re
import ssl
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from sqlalchemy import select

from alignd.client import AligndError, Client, SamplingParams
from feedback.store.engine import open_engine
from feedback.store.tables import RANKINGS
from serving.access.keys import create_key
from tests.docs_page import blocks
from tests.npm import NODE, npm_packages
from tests.serving.processes import REPOSITORY, START_SECONDS, end, environment, log_of, start, wait_until
from tests.tools import find_tool

# The first run fetches npm's packages, too.
pytestmark = pytest.mark.timeout(600)

PAGE = REPOSITORY / "docs" / "api.md"
STEPS = "On a network, step by step"
RANKING_ID = re.compile(r"ranking_?[iI]d\W+([0-9a-f-]{36})")
# As the store has a user of an application.
ADA_OF_SHOP = "shop\x1fada"
CLIENT_SECONDS, STORED_SECONDS = 100, 60


@dataclass(frozen=True)
class FrontDoor:
    """A server with TLS and keys, with its gateway, at an address that others reach."""

    settings: Mapping[str, str]
    folder: Path
    """Where the certificate is, and where clients run."""
    caller: Mapping[str, str]
    """The environment of a client, with the key and the trust that docs/api.md exports."""
    keys: Mapping[str, str]
    """Wrong keys by name, and "web", the good one."""

    @property
    def address(self) -> str:
        return f"localhost:{self.settings['ALIGND_SERVING__PORT']}"

    @property
    def gateway(self) -> str:
        return f"localhost:{self.settings['ALIGND_GATEWAY__PORT']}"

    def client(self, key: str) -> Client:
        """Returns a client of gRPC that trusts the server's certificate."""
        trust = grpc.ssl_channel_credentials((self.folder / "tls.crt").read_bytes())
        return Client(self.address, credentials=trust, api_key=self.keys[key], max_attempts=1)

    def post(self, key: str, path: str, body: Mapping[str, Any]) -> httpx.Response:
        """Calls the gateway, which answers with the server's certificate too."""
        headers = {"Authorization": f"Bearer {self.keys[key]}"} if self.keys[key] else {}
        trust = ssl.create_default_context(cafile=str(self.folder / "tls.crt"))
        return httpx.post(f"https://{self.gateway}/v1/{path}", json=body, headers=headers, verify=trust, timeout=60)

    def run(self, *command: str | Path, **variables: str) -> str:
        """Returns what a client of docs/api.md prints when it calls this server."""
        here = [str(part).replace("localhost:50051", self.address) for part in command]
        here = [part.replace("localhost:8080", self.gateway) for part in here]
        return run(here, self.folder, {**self.caller, **variables}, CLIENT_SECONDS)


def run(command: Sequence[str], folder: Path, variables: Mapping[str, str], timeout_seconds: float) -> str:
    """Returns what a command prints; it must end well."""
    done = subprocess.run(
        command, cwd=folder, env=dict(variables), capture_output=True, text=True, timeout=timeout_seconds, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def with_alignd(settings: Mapping[str, str]) -> dict[str, str]:
    """Returns the environment of a shell that has alignd's commands."""
    return {**settings, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}


@pytest.fixture(scope="module")
def front_door(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FrontDoor]:
    """The server: what docs/api.md says to do, step by step, and `alignd up`."""
    folder = tmp_path_factory.mktemp("front-door")
    settings = {**environment(folder, log_format="json"), "ALIGND_CONFIG": str(folder / "alignd.toml")}
    shell = ["bash", "-euc"]
    find_tool("openssl")
    make_certificate, make_key, trust = blocks(PAGE, STEPS, "sh")
    run([*shell, make_certificate], folder, settings, CLIENT_SECONDS)
    (toml,) = blocks(PAGE, STEPS, "toml")
    (folder / "alignd.toml").write_text(toml.replace('"tls.', f'"{folder}/tls.'))
    up = start("up", settings, "--without", "train")
    try:
        exported = run([*shell, f"{make_key}\n{trust}\nenv -0"], folder, with_alignd(settings), CLIENT_SECONDS)
        caller = dict(line.split("=", 1) for line in exported.split("\0") if line)
        door = FrontDoor(settings, folder, caller, {"web": caller["KEY"], "": "", **wrong_keys(folder / "var")})
        wait_until(lambda: is_serving(door), START_SECONDS, "HTTP 200 by TLS", up)
        yield door
    except AssertionError as error:
        error.add_note(log_of("up", settings).read_text(errors="replace")[-4000:])
        raise
    finally:
        up.terminate()
        code = end(up)
    assert code == 0


def wrong_keys(data_dir: Path) -> dict[str, str]:
    """Makes keys that are each wrong for something, and returns them by their names."""
    path = data_dir / "api_keys.json"
    both = ["sample", "feedback"]
    return {
        "expired": create_key(path, "expired", "shop", both, "test", timedelta(seconds=-1))[1],
        "samples": create_key(path, "samples", "shop", ["sample"], "test")[1],
        "ranks": create_key(path, "ranks", "shop", ["feedback"], "test")[1],
        "bank": create_key(path, "bank", "bank", both, "test")[1],
    }


def is_serving(door: FrontDoor) -> bool:
    """Whether the gateway, by TLS, says that the server behind it serves."""
    trust = ssl.create_default_context(cafile=str(door.folder / "tls.crt"))
    try:
        return httpx.get(f"https://{door.gateway}/health", verify=trust, timeout=5).status_code == 200
    except httpx.TransportError:
        return False


@pytest.fixture(scope="module")
def node(front_door: FrontDoor, pytestconfig: pytest.Config) -> Callable[[str], str]:
    """Runs the program of Node's under a heading of docs/api.md, with npm's packages and protos/ beside it."""
    assert pytestconfig.cache
    packages = npm_packages(pytestconfig.cache.mkdir("npm"))
    (front_door.folder / "node_modules").symlink_to(packages / "node_modules")
    (front_door.folder / "protos").symlink_to(REPOSITORY / "protos")

    def run_program(heading: str) -> str:
        (program,) = blocks(PAGE, heading, "js")
        return front_door.run(NODE, "--input-type=module", "--eval", program)

    return run_program


def check_stored(door: FrontDoor, said: str) -> None:
    """Checks that the ranking that a client has printed comes to the store, as one of a user of its application."""
    found = RANKING_ID.search(said)
    assert found, said
    engine = open_engine(f"sqlite:///{door.folder}/var/store.db")
    users = select(RANKINGS.c.user_id).where(RANKINGS.c.event_id == found[1])

    def stored() -> list[str]:
        with engine.connect() as connection:
            return list(connection.execute(users).scalars())

    try:
        wait_until(lambda: stored() == [ADA_OF_SHOP], STORED_SECONDS, f"{found[1]} in the store")
    finally:
        engine.dispose()


@pytest.mark.parametrize("heading", ["Python: alignd-client", "Python: OpenAI's SDK"])
def test_a_client_in_python_samples_and_ranks(front_door: FrontDoor, heading: str) -> None:
    (program,) = blocks(PAGE, heading, "python")
    check_stored(front_door, front_door.run(sys.executable, "-c", program))


@pytest.mark.parametrize("heading", ["Node: OpenAI's SDK", "Node: gRPC"])
def test_a_client_in_node_samples_and_ranks(front_door: FrontDoor, node: Callable[[str], str], heading: str) -> None:
    said = node(heading)
    check_stored(front_door, said)
    assert heading != "Node: gRPC" or re.search(r"^streamed in [1-9][0-9]* pieces$", said, re.MULTILINE)


def test_a_shell_samples_and_ranks_by_reflection(front_door: FrontDoor) -> None:
    sample, rank = blocks(PAGE, "A shell: buf curl", "sh")
    sampled = json.loads(front_door.run("bash", "-euc", sample))
    first, second = (each["completionId"] for each in sampled["completions"])
    variables = {"TOKEN": sampled["feedbackToken"], "FIRST": first, "SECOND": second}
    check_stored(front_door, front_door.run("bash", "-euc", rank, **variables))


@pytest.fixture(scope="module")
def ranking(front_door: FrontDoor) -> Mapping[str, Any]:
    """A ranking of what the application shop has sampled, as the gateway takes it."""
    with front_door.client("web") as client:
        sample = client.sample("Hi", user_id="ada", num_completions=2, sampling=SamplingParams(max_tokens=4))
    ids = [each.completion_id for each in sample.completions]
    return {"feedback_token": sample.feedback_token, "ranking": ids, "user": "ada"}


@pytest.mark.parametrize(
    ("key", "does", "code", "status", "reason", "says"),
    [
        ("", "samples", grpc.StatusCode.UNAUTHENTICATED, 401, "NO_API_KEY", "API key"),
        ("", "ranks", grpc.StatusCode.UNAUTHENTICATED, 401, "NO_API_KEY", "API key"),
        ("expired", "samples", grpc.StatusCode.UNAUTHENTICATED, 401, "API_KEY_EXPIRED", "has expired"),
        ("expired", "ranks", grpc.StatusCode.UNAUTHENTICATED, 401, "API_KEY_EXPIRED", "has expired"),
        ("ranks", "samples", grpc.StatusCode.PERMISSION_DENIED, 403, "MISSING_SCOPE", "the scope sample"),
        ("samples", "ranks", grpc.StatusCode.PERMISSION_DENIED, 403, "MISSING_SCOPE", "the scope feedback"),
        ("bank", "ranks", grpc.StatusCode.PERMISSION_DENIED, 403, "TOKEN_OF_ANOTHER_APPLICATION", "application"),
    ],
)
def test_a_wrong_caller_is_refused_by_grpc_and_by_http(
    front_door: FrontDoor, ranking: Mapping[str, Any], key: str, does: str, code: grpc.StatusCode, status: int,
    reason: str, says: str,
) -> None:  # fmt: skip
    with front_door.client(key) as client, pytest.raises(AligndError) as refused:
        if does == "samples":
            client.sample("Hi", user_id="ada", num_completions=2)
        else:
            client.rank(ranking["feedback_token"], ranking["ranking"], user_id="ada")
    assert (refused.value.code, refused.value.reason) == (code, reason)
    assert says in refused.value.message
    chat = {"messages": [{"role": "user", "content": "Hi"}], "n": 2}
    asked = ("chat/completions", chat) if does == "samples" else ("feedback/rankings", ranking)
    answer = front_door.post(key, *asked)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, reason.lower())
    assert says in answer.json()["error"]["message"]


def test_nobody_is_answered_in_clear(front_door: FrontDoor) -> None:
    with pytest.raises(httpx.TransportError):
        httpx.get(f"http://{front_door.gateway}/health", timeout=20)
    with Client(front_door.address, max_attempts=1) as client, pytest.raises(AligndError) as refused:
        client.sample("Hi", user_id="ada")
    assert refused.value.code is grpc.StatusCode.UNAVAILABLE


def test_what_is_logged_as_json_has_no_line_of_text(front_door: FrontDoor, ranking: Mapping[str, Any]) -> None:
    """vLLM's lines neither, though vLLM logs by itself. What C libraries print of their own is no log."""
    loggers = set()
    for verb in ("serve", "gateway", "relay", "ingest"):
        lines = (front_door.folder / "var" / "logs" / f"{verb}.log").read_text().splitlines()
        records = [json.loads(line) for line in lines if line.startswith("{")]
        assert all({"time", "level", "logger", "message"} <= record.keys() for record in records)
        assert verb == "serve" or len(records) == len(lines)
        assert not [line for line in lines if re.match(r"^(\(EngineCore.*\) )?(\d{4}-|INFO|WARNING|ERROR)", line)]
        loggers |= {record["logger"].partition(".")[0] for record in records}
        assert not any(ranking["feedback_token"] in line or front_door.keys["web"] in line for line in lines)
    assert {"vllm", "serving", "feedback"} <= loggers


@pytest.mark.parametrize("section", ["serving", "gateway"])
def test_on_a_network_nothing_starts_without_tls(tmp_path: Path, section: str) -> None:
    """What docs/api.md shows for the server is so, and for the gateway it is likewise."""
    (shown,) = blocks(PAGE, STEPS, "")
    command, said = re.sub(r"^\$ ", "", shown).split("\n", 1)
    assert said.startswith("configuration\nserving: host 0.0.0.0 ")
    mine = {name: value for name, value in os.environ.items() if not name.startswith("ALIGND_")}
    command = command.replace("SERVING", section.upper())
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=with_alignd(mine), capture_output=True, text=True, timeout=100,
        check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    # The page breaks the line.
    assert done.stderr.split() == said.replace("serving:", f"{section}:").split()
    assert list(tmp_path.iterdir()) == []
