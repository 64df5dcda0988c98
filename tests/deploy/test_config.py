"""The configuration: environment over file, what is unknown or bad refused by name, and printed as TOML."""

import math
import os
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from deploy.config import RENAMED, AligndConfig, ConfigError, load_config, resolved
from deploy.simulation.config import SimulationConfig, SimulationSettings, load_simulation


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """No file, and no variable of ours."""
    monkeypatch.chdir(tmp_path)
    for variable in list(os.environ):
        if variable.upper().startswith("ALIGND_"):
            monkeypatch.delenv(variable)


def write(text: str | bytes) -> None:
    Path("alignd.toml").write_bytes(text if isinstance(text, bytes) else text.encode())


def refusal() -> str:
    with pytest.raises(ConfigError) as raised:
        load_config()
    return str(raised.value)


def test_defaults_are_one_machine_without_anything_else() -> None:
    config = load_config()
    assert config == AligndConfig()
    here = Path.cwd()
    assert config.bus_url == f"sqlite:///{here}/var/bus.db"
    assert config.store_url == f"sqlite:///{here}/var/store.db"
    assert config.server_address == "127.0.0.1:50051"
    assert config.policies_dir == here / "var" / "policies"
    assert config.runs_dir == here / "var" / "runs"


def test_the_environment_wins_over_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    write('bus = "kafka://file:9092"\n[serving]\nport = 1\nmax_model_len = 64\n[training.ppo]\nkl_coef = 0.5\n')
    monkeypatch.setenv("ALIGND_BUS", "kafka://environment:9092")
    monkeypatch.setenv("ALIGND_SERVING__PORT", "2")
    monkeypatch.setenv("ALIGND_TRAINING__PPO__NUM_ROUNDS", "3")
    config = load_config()
    assert config.bus_url == "kafka://environment:9092"
    assert (config.serving.port, config.serving.max_model_len) == (2, 64)
    assert (config.training.ppo.kl_coef, config.training.ppo.num_rounds) == (0.5, 3)
    assert config.server_address == "127.0.0.1:2"


def test_a_file_elsewhere_is_named_by_a_variable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    write('data_dir = "here"')
    (tmp_path / "other.toml").write_text('data_dir = "there"')
    monkeypatch.setenv("ALIGND_CONFIG", str(tmp_path / "other.toml"))
    assert load_config().data_dir == Path("there")
    monkeypatch.setenv("ALIGND_CONFIG", str(tmp_path / "missing.toml"))
    assert refusal() == f"ALIGND_CONFIG: there is no file {tmp_path / 'missing.toml'}"


@pytest.mark.parametrize(
    "variable", ["ALIGND_FOO", "ALIGND_SERVNG__PORT", "ALIGND_BUS__URL", "ALIGND_DATA_DIR__", "alignd_foo", "ALIGND_"]
)
def test_a_variable_that_sets_nothing_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "1")
    assert refusal().startswith(f"{variable}: ")


def test_what_is_for_the_tests_is_no_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGND_TEST_KAFKA", "127.0.0.1:9092")
    assert load_config() == AligndConfig()


@pytest.mark.parametrize(
    ("variable", "new_name"),
    [
        ("ALIGND_SERVING__KV_CACHE_GIB", "serving.kv_cache_mib"),
        ("ALIGND_FEEDBACK__TOKEN_TTL_S", "feedback.token_ttl_seconds"),
        ("ALIGND_TRAINING__PPO__NUM_STEPS", "training.ppo.num_rounds"),
        ("ALIGND_SIMULATION__DEADLINE_S", "simulation.deadline_seconds"),
    ],
)
def test_a_setting_that_was_renamed_is_refused_with_its_new_name(
    monkeypatch: pytest.MonkeyPatch, variable: str, new_name: str
) -> None:
    monkeypatch.setenv(variable, "1")
    with pytest.raises(ConfigError, match=f"is called {new_name} now"):
        load_config() and load_simulation()


def test_every_new_name_is_a_setting_and_no_old_one_is() -> None:
    names = {*dotted_names(AligndConfig()), *dotted_names(SimulationSettings())}
    for section, renamed in RENAMED.items():
        assert {f"{section}.{new}" for new in renamed.values()} <= names
        assert not {f"{section}.{old}" for old in renamed} & names


def dotted_names(model: BaseModel) -> Iterator[str]:
    for name in type(model).model_fields:
        value = getattr(model, name)
        yield from (f"{name}.{each}" for each in dotted_names(value)) if isinstance(value, BaseModel) else (name,)


@pytest.mark.parametrize(
    ("variable", "value", "field"),
    [
        ("ALIGND_SERVING__PRT", "1", "serving.prt"),
        ("ALIGND_SERVING__PORT", "abc", "serving.port"),
        ("ALIGND_SERVING__PORT", "65536", "serving.port"),
        ("ALIGND_SERVING__DTYPE", "int4", "serving.dtype"),
        ("ALIGND_SERVING__PROBE_TOLERANCE", "nan", "serving.probe_tolerance"),
        ("ALIGND_SERVING", '{"prt": 1}', "serving.prt"),
        ("ALIGND_TRAINING__PPO__CLIP", "1", "training.ppo.clip"),
        ("ALIGND_TRAINING__PPO__GAE_LAMBDA", "2", "training.ppo.gae_lambda"),
        ("ALIGND_FEEDBACK__OUTBOX_RETENTION_SECONDS", "1", "feedback"),
        ("ALIGND_BUS", "amqp://host", "bus"),
        ("ALIGND_BUS", "kafka://one:9092,two", "bus"),
        ("ALIGND_STORE", "mysql://host", "store"),
    ],
)
def test_a_bad_variable_is_refused_by_the_name_of_its_field(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, field: str
) -> None:
    monkeypatch.setenv(variable, value)
    assert refusal().startswith(f"{field}: ")


def test_a_section_that_is_no_json_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALIGND_SERVING", "port=1")
    assert '"serving"' in refusal()


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("[serving]\nprt = 1", "serving.prt: "),
        ("[serving]\nport = 'x'", "serving.port: "),
        ("[servng]\nport = 1", "servng: "),
        ("foo = 1", "foo: "),
        ("serving = 1", "serving: "),
        ("data_dir = 7", "data_dir: "),
        ("bus = ", "alignd.toml: "),
        ("bus = ''\nbus = ''", "alignd.toml: "),
        (b"\xff\xfe", "alignd.toml: "),
    ],
)
def test_a_bad_file_is_refused_by_the_name_of_the_field(text: str | bytes, names: str) -> None:
    write(text)
    assert refusal().startswith(names)


def test_every_fault_is_named_at_once() -> None:
    write("foo = 1\n[serving]\nport = -1\nprt = 1\n")
    assert {line.split(":")[0] for line in refusal().splitlines()} == {"foo", "serving.port", "serving.prt"}


def test_it_is_frozen() -> None:
    config = load_config()
    with pytest.raises(ValidationError):
        config.data_dir = Path("other")
    with pytest.raises(ValidationError):
        config.serving.port = 1


def test_every_field_is_documented() -> None:
    def undocumented(model: type[BaseModel], prefix: str = "") -> list[str]:
        found = []
        for name, field in model.model_fields.items():
            found += [] if field.description else [prefix + name]
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                found += undocumented(field.annotation, f"{prefix}{name}.")
        return found

    assert undocumented(AligndConfig) == []
    assert undocumented(SimulationSettings) == []


TEXT = st.text(st.characters(codec="utf-8", exclude_characters="\x00\x7f"), min_size=1, max_size=20)


@given(
    text=TEXT,
    number=st.floats(0, allow_infinity=True, allow_nan=False),
    port=st.integers(0, 65535),
    compiled=st.booleans(),
)
@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_is_printed_is_toml_that_reads_back_the_same(text: str, number: float, port: int, compiled: bool) -> None:
    config = AligndConfig(
        data_dir=Path(text),
        address=text,
        serving={"drain_timeout_seconds": number, "port": port, "compile": compiled},  # type: ignore[arg-type]
    )
    printed = resolved(config)
    read = tomllib.loads(printed)
    assert read["serving"]["port"] == port
    assert math.isclose(read["serving"]["drain_timeout_seconds"], number)
    write(printed)
    assert load_config() == config


SIMULATED = "[simulation]\nnum_users = 3\nseed = 1\n"


def test_the_simulated_users_are_no_setting_of_operators_and_none_that_is_unknown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`alignd demo` starts `alignd up` with the file and the environment that it has itself."""
    write(SIMULATED + "[serving]\nport = 1\n")
    monkeypatch.setenv("ALIGND_SIMULATION__SEED", "7")
    monkeypatch.setenv("ALIGND_SIMULATION", '{"num_rankings": 9}')
    assert load_config().serving.port == 1
    assert SimulationConfig(num_users=3, seed=7, num_rankings=9) == load_simulation().simulation
    assert "simulation" not in resolved(load_config())


@pytest.mark.parametrize("variable", ["ALIGND_SIMULATED", "ALIGND_SIMULATIONS__SEED"])
def test_a_misspelt_section_of_theirs_is_refused(monkeypatch: pytest.MonkeyPatch, variable: str) -> None:
    monkeypatch.setenv(variable, "1")
    assert refusal().startswith(f"{variable}: ")


@pytest.mark.parametrize(
    ("text", "variable", "value", "names"),
    [
        ("", "ALIGND_SIMULATION__AGREEMENT", "0.2", "simulation.agreement: "),
        ("", "ALIGND_SIMULATION__NUM_UZERS", "2", "simulation.num_uzers: "),
        ("[simulation]\nnum_uzers = 2\n", "ALIGND_SIMULATION__SEED", "1", "simulation.num_uzers: "),
        ("simulation = 1\n", "ALIGND_TEST_NOTHING", "", "simulation: "),
        ("simulation = \n", "ALIGND_TEST_NOTHING", "", "alignd.toml: "),
    ],
)
def test_a_bad_setting_of_theirs_is_refused_by_name(
    monkeypatch: pytest.MonkeyPatch, text: str, variable: str, value: str, names: str
) -> None:
    write(text)
    monkeypatch.setenv(variable, value)
    with pytest.raises(ConfigError) as raised:
        load_simulation()
    assert str(raised.value).startswith(names)


def test_their_settings_are_printed_as_a_section_that_reads_back_the_same() -> None:
    write(SIMULATED)
    found = load_simulation()
    write(resolved(found))
    assert load_simulation() == found
    assert tomllib.loads(resolved(found)).keys() == {"simulation"}


def test_a_field_that_is_not_set_is_shown_as_a_comment() -> None:
    assert "# initial_model = (Path, not set)" in resolved(load_config())
