"""The command line as a person meets it: help, dry runs, and errors that say which field and what to do."""

import os
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from sqlalchemy.exc import DatabaseError, OperationalError

from deploy.cli import main, process, processes
from deploy.config import AligndConfig
from deploy.data_dir import only_up
from deploy.endings import GAVE_UP_CODE, PASSING_CODE
from policies.vllm_settings import MissingError
from serving.bootstrap import NoPolicyError
from tests.kafka_broker import free_port

REPOSITORY = Path(__file__).parents[3]
PROCESSES = ("up", "serve", "relay", "ingest", "train")
VERBS = {
    (): "up",
    ("up",): "--dry-run",
    ("serve",): "--dry-run",
    ("relay",): "--dry-run",
    ("ingest",): "--dry-run",
    ("train",): "--dry-run",
    ("sft",): "--dry-run",
    ("status",): "live",
    ("demo",): "--quick",
    ("config",): "configuration",
    ("policies",): "lineage",
    ("policies", "list"): "--json",
    ("policies", "show"): "--json",
    ("policies", "promote"): "--reason",
    ("policies", "rollback"): "--reason",
    ("policies", "lineage"): "--json",
    ("policies", "repair"): "--live",
    ("runs",): "pause",
    ("runs", "list"): "--json",
    ("runs", "show"): "--json",
    ("runs", "abort"): "run",
}


def alignd(folder: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs the command in a folder, with these variables and no others of ours."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("ALIGND_")}
    environment = {**inherited, "COLUMNS": "200", "NO_COLOR": "1", **variables}
    command = [sys.executable, "-m", "deploy.cli", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=60, check=False)


@pytest.mark.parametrize(("verb", "says"), VERBS.items(), ids=str)
def test_every_verb_has_help(tmp_path: Path, verb: tuple[str, ...], says: str) -> None:
    done = alignd(tmp_path, *verb, "--help")
    assert done.returncode == 0, done.stderr
    assert says in done.stdout
    assert done.stderr == ""


def test_an_unknown_verb_is_refused(tmp_path: Path) -> None:
    done = alignd(tmp_path, "serv")
    assert done.returncode == 2
    assert "No such command 'serv'" in done.stderr


@pytest.mark.parametrize("verb", PROCESSES)
def test_a_dry_run_prints_the_configuration_and_does_nothing(tmp_path: Path, verb: str) -> None:
    done = alignd(tmp_path, verb, "--dry-run", ALIGND_SERVING__PORT="1234")
    assert done.returncode == 0, done.stderr
    assert tomllib.loads(done.stdout)["serving"]["port"] == 1234
    assert list(tmp_path.iterdir()) == []


def test_a_demo_that_is_only_asked_what_it_would_do_makes_no_model(tmp_path: Path) -> None:
    done = alignd(tmp_path, "demo", "--dry-run", ALIGND_SIMULATION__NUM_USERS="3")
    assert done.returncode == 0, done.stderr
    printed = tomllib.loads(done.stdout)
    assert printed["serving"]["initial_model"] == "var/models/smollm2"
    assert printed["simulation"]["num_users"] == 3
    assert list(tmp_path.iterdir()) == []


def test_a_demo_refuses_a_bad_setting_of_its_users_and_up_does_not_know_it(tmp_path: Path) -> None:
    done = alignd(tmp_path, "demo", "--quick", ALIGND_SIMULATION__AGREEMENT="2")
    assert done.returncode == 2
    assert done.stderr == "configuration\nsimulation.agreement: Input should be less than 1\n"
    assert list(tmp_path.iterdir()) == []
    done = alignd(tmp_path, "up", "--dry-run", ALIGND_SIMULATION__AGREEMENT="2")
    assert done.returncode == 0, done.stderr
    assert "simulation" not in done.stdout


def test_a_demo_keeps_to_topics_of_its_own_whoever_names_the_bus(tmp_path: Path) -> None:
    (tmp_path / "alignd.toml").write_text('bus = "kafka://broker:9092"')
    printed = tomllib.loads(alignd(tmp_path, "demo", "--dry-run").stdout)
    assert printed["bus"].startswith("kafka://broker:9092/demo-")


def test_a_demo_is_not_told_where_another_was(tmp_path: Path) -> None:
    run = tmp_path / "var" / "runs" / "20261126T140004-01fb6b"
    run.mkdir(parents=True)
    (run / "metrics.jsonl").write_text("")
    done = alignd(tmp_path, "demo", "--quick", ALIGND_DATA_DIR="var")
    assert done.returncode == 1
    assert f"The demo needs a place of its own: there are runs in {tmp_path}/var/runs" in done.stdout


def test_up_takes_a_recipe_and_leaves_out_what_it_is_told_to(tmp_path: Path) -> None:
    done = alignd(tmp_path, "up", "--without", "train", "--recipe", "tiny", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert tomllib.loads(done.stdout)["training"]["reward_model"]["num_layers"] == 1
    done = alignd(tmp_path, "up", "--without", "sft", "--dry-run")
    assert done.returncode == 2
    assert "takes one of serve, gateway, relay, ingest, train" in done.stderr


def test_a_server_without_a_policy_says_what_to_set(tmp_path: Path) -> None:
    done = alignd(tmp_path, "serve", ALIGND_SERVING__PORT="0")
    assert done.returncode == GAVE_UP_CODE
    assert done.stderr.splitlines()[-1].startswith("no policy is registered; set serving.initial_model")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("verb", [("up",), ("train",), ("policies", "import", ".")], ids=str)
def test_a_folder_that_cannot_be_written_to_ends_every_verb_that_writes(tmp_path: Path, verb: tuple[str, ...]) -> None:
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        (tmp_path / name).touch()
    (tmp_path / "link").symlink_to("nowhere")
    done = alignd(tmp_path, *verb, ALIGND_DATA_DIR="link")
    said = f"configuration\ndata_dir: nothing can be written in {tmp_path}/link (No such file or directory)"
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(said)


def test_a_store_that_is_no_database_is_said_and_one_that_is_away_may_be_back(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for kind, said, code in (
        (DatabaseError, "the store cannot be used: (builtins.Exception) of the store", process.EXIT_FAILED),
        (OperationalError, "the store is away: (builtins.Exception) of the store", PASSING_CODE),
    ):
        with pytest.raises(typer.Exit) as ended, process.store_in_words():
            raise kind(None, None, Exception("of the store"))
        assert ended.value.exit_code == code
        assert capsys.readouterr().err.startswith(said)


def test_a_second_up_on_the_same_folder_is_refused(tmp_path: Path) -> None:
    with only_up(tmp_path):
        done = alignd(tmp_path, "up", ALIGND_DATA_DIR=str(tmp_path))
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith(f"configuration\ndata_dir: another `alignd up` runs on {tmp_path}")


def test_what_a_recipe_does_not_name_stays_as_configured(tmp_path: Path) -> None:
    (tmp_path / "alignd.toml").write_text("[training]\npromote = false\nmax_num_seqs = 7\n")
    (tmp_path / "mine.toml").write_text("max_num_seqs = 9\n")
    done = alignd(tmp_path, "train", "--dry-run", "--recipe", "mine.toml")
    training = tomllib.loads(done.stdout)["training"]
    assert (training["promote"], training["max_num_seqs"]) == (False, 9)


def test_the_configuration_is_printed_and_can_be_used_as_a_file(tmp_path: Path) -> None:
    printed = alignd(tmp_path, "config", ALIGND_SERVING__PORT="1234").stdout
    (tmp_path / "alignd.toml").write_text(printed)
    assert alignd(tmp_path, "config").stdout == printed


@pytest.mark.parametrize("verb", [*PROCESSES, "status", "config"])
def test_a_bad_setting_ends_every_verb_with_its_name(tmp_path: Path, verb: str) -> None:
    done = alignd(tmp_path, verb, ALIGND_SERVING__PRT="1")
    assert done.returncode == 2
    assert done.stderr == "configuration\nserving.prt: Extra inputs are not permitted\n"
    assert done.stdout == ""
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_variable_and_a_missing_file_are_named(tmp_path: Path) -> None:
    for name, value in (("ALIGND_FOO", "[/bar]"), ("ALIGND_CONFIG", "[/nowhere].toml")):
        done = alignd(tmp_path, "config", **{name: value})
        assert done.returncode == 2
        assert done.stderr.startswith(f"configuration\n{name}: ")


def test_status_says_that_nothing_runs_and_what_to_do(tmp_path: Path) -> None:
    done = alignd(tmp_path, "status", ALIGND_SERVING__PORT=str(free_port()))
    assert done.returncode == 1
    assert "nothing answers at 127.0.0.1:" in done.stdout
    assert "alignd up" in done.stdout
    assert done.stderr == ""


@pytest.mark.parametrize("verb", [("list",), ("show", "v1"), ("promote", "v1"), ("rollback",), ("lineage",)])
def test_operating_nothing_says_so(tmp_path: Path, verb: tuple[str, ...]) -> None:
    done = alignd(tmp_path, "policies", *verb, ALIGND_SERVING__PORT=str(free_port()))
    assert done.returncode == 1
    assert done.stderr.startswith("nothing answers at 127.0.0.1:")
    assert done.stdout == ""


def test_what_vllm_lacks_of_the_machine_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    def run() -> None:
        raise MissingError("vLLM needs the library libnuma.so.1; install it")

    with pytest.raises(SystemExit) as ended:
        main.main(run)
    assert ended.value.code == 2
    assert capsys.readouterr().err == "vLLM needs the library libnuma.so.1; install it\n"


@pytest.mark.parametrize(("is_imported", "num_starts"), [(True, 2), (False, 1)])
def test_a_server_that_finds_no_policy_starts_again_where_the_configured_model_can_be_imported(
    is_imported: bool, num_starts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bus was away, or has no version while v1 on disk was made from another model."""
    starts: list[bool] = []

    async def serve(*settings: object, is_wanted: Callable[[], bool]) -> None:
        starts.append(is_wanted())
        raise NoPolicyError("v1 was not made from serving.initial_model")

    (tmp_path / "policies" / "v1").mkdir(parents=True)
    config = AligndConfig(data_dir=tmp_path)
    monkeypatch.setattr("serving.server.serve", serve)
    monkeypatch.setattr(processes, "start", lambda *options: config)
    monkeypatch.setattr(processes, "import_first", lambda config: is_imported)
    with pytest.raises(typer.Exit) as ended:
        processes.serve()
    assert (starts, ended.value.exit_code) == ([True] * num_starts, GAVE_UP_CODE)
