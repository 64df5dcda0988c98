"""The supervisor: starts the verbs, starts them again when they die, and never leaves one behind.

With relay and ingest, which are real and light; tests/test_crash.py has all of them.
"""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from deploy.cli import main
from deploy.config import AligndConfig, load_config
from deploy.endings import can_recur
from deploy.models import MODEL_FILES, make_tiny_llama
from deploy.up import (
    FIRST_RESTART_SECONDS,
    Service,
    Supervisor,
    child_environment,
)
from feedback.token import load_keyring
from tests.first_version import write_first
from training.runs.folder import RunFolder

REPOSITORY = Path(__file__).parents[2]
SUPERVISE = """
import logging, os, sys
from pathlib import Path
from deploy.up import Service, Supervisor
logging.basicConfig(level=logging.INFO)
Supervisor(
    Path(sys.argv[1]), dict(os.environ), [Service(verb) for verb in sys.argv[2:]], most_silent_seconds={"relay": 2.0}
).run()
"""


def wait_until(is_done: Callable[[], bool], what: str, timeout_seconds: float = 40) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not is_done():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def start(folder: Path, *verbs: str, **variables: str) -> subprocess.Popen[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ALIGND_")}
    environment |= {"ALIGND_DATA_DIR": str(folder), **variables}
    command = [sys.executable, "-c", SUPERVISE, str(folder), *verbs]
    return subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True)


def pids(folder: Path) -> dict[str, int]:
    path = folder / "up.json"
    return dict(json.loads(path.read_text())) if path.exists() else {}


@pytest.fixture
def supervisor(tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """It supervises relay and ingest, and both are at work."""
    # Ingest waits for the keys, which a server makes.
    load_keyring(tmp_path / "feedback_keys")
    process = start(tmp_path, "relay", "ingest")
    wait_until(lambda: {"relay", "ingest"} <= pids(tmp_path).keys(), "both started")
    for verb in ("relay", "ingest"):
        log = tmp_path / "logs" / f"{verb}.log"
        wait_until(lambda log=log: f"{log.stem}: the bus" in log.read_text(), f"{verb} at work")  # type: ignore[misc]
    yield process
    process.kill()
    process.communicate()


def test_it_tells_who_runs(supervisor: subprocess.Popen[str], tmp_path: Path) -> None:
    told = pids(tmp_path)
    assert told.keys() == {"supervisor", "relay", "ingest"}
    assert told["supervisor"] == supervisor.pid
    assert all(is_alive(pid) for pid in told.values())


def test_who_dies_is_started_again_and_the_others_are_left_alone(
    supervisor: subprocess.Popen[str], tmp_path: Path
) -> None:
    before = pids(tmp_path)
    os.kill(before["relay"], signal.SIGKILL)
    killed_at = time.monotonic()
    wait_until(lambda: pids(tmp_path)["relay"] != before["relay"], "relay again")
    assert time.monotonic() - killed_at >= FIRST_RESTART_SECONDS / 2
    after = pids(tmp_path)
    assert is_alive(after["relay"])
    assert after["ingest"] == before["ingest"]


def test_who_makes_no_progress_is_killed_and_started_again(supervisor: subprocess.Popen[str], tmp_path: Path) -> None:
    before = pids(tmp_path)
    # Ingest may be silent for longer here. It also waits for the bus, and beats all the same.
    for verb in ("relay", "ingest"):
        os.kill(before[verb], signal.SIGSTOP)
    wait_until(lambda: pids(tmp_path)["relay"] != before["relay"], "relay again", timeout_seconds=10)
    assert not is_alive(before["relay"])
    assert is_alive(before["ingest"])
    os.kill(before["ingest"], signal.SIGCONT)
    log = tmp_path / "logs" / "relay.log"
    wait_until(lambda: log.read_text().count("relay: the bus is up") == 2, "relay at work again")
    supervisor.terminate()
    _, said = supervisor.communicate(timeout=40)
    assert re.search(r"relay ended with -9; starting it again\. It had made no progress for [23] s", said)
    assert said.count("starting it again") == 1


def test_sigterm_ends_all_in_order(supervisor: subprocess.Popen[str], tmp_path: Path) -> None:
    children = [pid for verb, pid in pids(tmp_path).items() if verb != "supervisor"]
    supervisor.terminate()
    _, log = supervisor.communicate(timeout=40)
    assert supervisor.returncode == 0
    assert not any(is_alive(pid) for pid in children)
    assert not (tmp_path / "up.json").exists()
    assert "killing it" not in log


def test_kill_9_of_the_supervisor_ends_the_others_too(supervisor: subprocess.Popen[str], tmp_path: Path) -> None:
    children = [pid for verb, pid in pids(tmp_path).items() if verb != "supervisor"]
    assert children and all(is_alive(pid) for pid in children)
    # One that is stopped could not be asked to end.
    os.kill(children[0], signal.SIGSTOP)
    supervisor.kill()
    wait_until(lambda: not any(is_alive(pid) for pid in children), "the end of the children", timeout_seconds=15)


def test_it_goes_on_where_it_cannot_write_down_who_runs(tmp_path: Path) -> None:
    (tmp_path / "up.json.tmp").mkdir()
    process = start(tmp_path, "relay")
    log = tmp_path / "logs" / "relay.log"
    wait_until(log.exists, "the relay's start")
    time.sleep(1)
    assert process.poll() is None
    process.terminate()
    _, said = process.communicate(timeout=20)
    assert (process.returncode, "`alignd status` will not know" in said) == (0, True)


def test_who_dies_at_the_same_place_three_times_ends_all_with_the_cause(tmp_path: Path) -> None:
    process = start(tmp_path, "relay", "no-such-verb")
    _, said = process.communicate(timeout=60)
    assert process.returncode == 1
    starts = [line for line in said.splitlines() if "no-such-verb runs as process" in line]
    assert len(starts) == 3
    log = tmp_path / "logs" / "no-such-verb.log"
    assert re.search(r"no-such-verb ended with 2; starting it again\. .*No such command 'no-such-verb'", said)
    last = said.splitlines()[-1]
    assert re.search(r"no-such-verb died 3 times at the same place: .*No such command 'no-such-verb'", last)
    assert str(log) in last
    assert "No such command 'no-such-verb'" in log.read_text()
    assert not any(is_alive(int(pid)) for pid in re.findall(r"relay runs as process (\d+)", said))


def test_who_is_killed_is_started_again_however_often(supervisor: subprocess.Popen[str], tmp_path: Path) -> None:
    for _ in range(4):
        before = pids(tmp_path)["relay"]
        os.kill(before, signal.SIGKILL)
        wait_until(lambda before=before: pids(tmp_path).get("relay", before) != before, "relay again")  # type: ignore[misc]
    assert supervisor.poll() is None


def test_a_run_that_takes_the_trainer_down_is_for_the_trainer_to_give_up(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "runs" / "a-run")
    run.state.mkdir(parents=True)
    process = start(tmp_path, "train", ALIGND_TRAINING__SEED="none")
    seen: set[int] = set()
    for _ in range(3):
        # As the trainer does, once in each of its lives.
        wait_until(lambda: pids(tmp_path).get("train", -1) not in {-1, *seen}, "another start")
        seen.add(pids(tmp_path)["train"])
        run.begin_attempt()
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said.count("train runs as process")) == (1, 5)
    assert "train died 3 times at the same place: training.seed: Input should be a valid integer" in said


def alignd(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs the command with these settings and no others of ours, to its end."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ALIGND_")}
    environment |= {"ALIGND_DATA_DIR": str(folder), "ALIGND_SERVING__PORT": "0", **variables}
    command = [sys.executable, "-m", "deploy.cli", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.timeout(300)  # vLLM is loaded three times
def test_an_engine_that_cannot_start_ends_alignd_up_with_its_cause(tmp_path: Path) -> None:
    """It asks for more than any machine's memory, which is found out in vLLM's own process if nobody asks before."""
    write_first(tmp_path / "policies", make_tiny_llama(tmp_path / "tiny"))
    settings = {"KV_CACHE_MIB": "1000000000", "PORT": "0"}
    process = start(tmp_path, "serve", **{f"ALIGND_SERVING__{name}": value for name, value in settings.items()})
    _, said = process.communicate()
    assert process.returncode == 1
    last = said.splitlines()[-1]
    assert "serve gave up: ValueError: Available memory on node" in last
    assert last.endswith(f"({tmp_path / 'logs' / 'serve.log'})")
    assert [is_alive(int(pid)) for pid in re.findall(r"runs as process (\d+)", said)] == [False]
    assert (tmp_path / "logs" / "serve.log").read_text().count("serving.engine_life: starting vLLM on v1") == 3


def test_a_server_that_cannot_start_ends_the_demo_with_its_cause(tmp_path: Path) -> None:
    for version in ("v1", "v2"):
        (tmp_path / "policies" / version).mkdir(parents=True)
    done = alignd(tmp_path, "demo", "--quick")
    assert (done.returncode, done.stderr) == (1, "")
    opening, *waiting, failed, logs = done.stdout.splitlines()
    assert opening.startswith("alignd demo: a tiny random Llama.")
    assert any(line.startswith("✓ import the model") for line in waiting)
    assert f"serve gave up: the policy log is empty, but {tmp_path}/policies holds v1, v2" in failed
    assert failed.endswith(f"({tmp_path / 'logs' / 'serve.log'})")
    assert logs == f"The logs are in {tmp_path / 'logs'}"
    up = (tmp_path / "up.log").read_text()
    assert up.splitlines()[-1] in failed
    assert [is_alive(int(pid)) for pid in re.findall(r"runs as process (\d+)", up)] == [False] * 4


def test_kill_9_of_the_demo_ends_the_others_too(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ALIGND_")}
    environment["ALIGND_DATA_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "deploy.cli", "demo", "--quick"]
    demo = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stdout=subprocess.DEVNULL)
    try:
        wait_until(lambda: "train" in pids(tmp_path), "all started", timeout_seconds=90)
        # Asked before the end: that removes what names them.
        started = pids(tmp_path)
        assert all(is_alive(pid) for pid in started.values())
    finally:
        demo.kill()
        demo.wait()
    wait_until(lambda: not any(is_alive(pid) for pid in started.values()), "the end of all", timeout_seconds=50)


@pytest.mark.parametrize("verb", [("up",), ("serve",), ("demo", "--quick")], ids=str)
def test_a_model_that_cannot_be_imported_is_said_before_anything_starts(tmp_path: Path, verb: tuple[str, ...]) -> None:
    (tmp_path / "mine").mkdir()
    done = alignd(tmp_path, *verb, ALIGND_SERVING__INITIAL_MODEL=str(tmp_path / "mine"))
    assert done.returncode == 2
    assert done.stderr == (
        f"configuration\nserving.initial_model: {tmp_path}/mine: there are no weights (model.safetensors, or several "
        "with model.safetensors.index.json)\n"
    )
    left = {path.name for path in tmp_path.rglob("*")}
    assert left <= {"mine", "logs", "heartbeats", "serve", "demo.log", "models", "tiny-llama", *MODEL_FILES, "store.db"}


def test_the_demo_asks_for_memory_before_it_imports(tmp_path: Path) -> None:
    done = alignd(tmp_path, "demo", "--quick", ALIGND_SERVING__KV_CACHE_MIB="1000000000")
    assert (done.returncode, "✓" in done.stdout) == (2, False)
    assert done.stderr.startswith("configuration\nmemory: serving and training will need ")
    assert not list(tmp_path.rglob("policies"))


@pytest.mark.parametrize(("without", "imports"), [(["serve"], 0), (["train"], 1)])
def test_only_a_server_needs_the_first_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without: list[str], imports: int
) -> None:
    imported: list[AligndConfig] = []
    monkeypatch.setenv("ALIGND_DATA_DIR", str(tmp_path))
    monkeypatch.setattr("deploy.apart.apart", lambda *arguments: {})
    monkeypatch.setattr("deploy.importing.first.import_configured", imported.append)
    monkeypatch.setattr(Supervisor, "run", lambda supervisor: None)
    main.up(without=without)
    assert len(imported) == imports


def test_a_server_whose_outbox_cannot_be_used_may_be_started_again(tmp_path: Path) -> None:
    (tmp_path / "outbox.db").mkdir()
    done = alignd(tmp_path, "serve")
    assert (done.returncode, can_recur(done.returncode)) == (os.EX_TEMPFAIL, False)


def test_a_verb_in_several_processes_is_one_process_to_the_supervisor(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ALIGND_")}
    become = "from deploy.up import run_in_ranks; run_in_ranks('config', 2); print('still here')"
    done = subprocess.run(
        [sys.executable, "-c", become], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.count("[serving]") == 2
    assert "still here" not in done.stdout


def test_a_free_port_is_decided_once_for_all_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ALIGND_SERVING__PORT", "0")
    assert int(child_environment(load_config())["ALIGND_SERVING__PORT"]) > 0
    monkeypatch.setenv("ALIGND_SERVING__PORT", "1234")
    assert child_environment(load_config())["ALIGND_SERVING__PORT"] == "1234"
    assert Service("relay").failures == 0
