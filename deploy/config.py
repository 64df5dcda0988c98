"""The operators' configuration: a TOML file and the environment, resolved into one frozen, typed object.

The environment wins over the file: ALIGND_BUS sets `bus`, ALIGND_SERVING__PORT sets `serving.port`. Each setting that
is unknown or bad is refused by its name.
"""

import json
import os
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pydantic import BaseModel, ConfigDict, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    InitSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    SettingsError,
)

import feedback.config
import serving.config
import training.config
from feedback.bus.kafka_security import read_security
from feedback.config import FeedbackConfig
from policies.server_connection import ServerConnection, Tls
from serving.config import ServingConfig, host_and_port
from serving.gateway.config import GatewayConfig
from training.config import TrainingConfig

PREFIX = "ALIGND_"
_DEFAULT_FILE = Path("alignd.toml")
# Variables with our prefix that are not settings: where the settings are, and what the tests look for.
_OTHER_VARIABLES = ("ALIGND_CONFIG", "ALIGND_TEST_")
# The settings of the demo's simulated users, which deploy.simulation.config loads and checks. They are no setting of
# the operators', but `alignd demo` starts `alignd up` with its own file and environment: there they are ignored.
_SIMULATION = "simulation"
Settings = TypeVar("Settings", bound=BaseSettings)
RENAMED = {
    "serving": serving.config.RENAMED,
    "feedback": feedback.config.RENAMED,
    "training": training.config.RENAMED,
    "simulation": {"deadline_s": "deadline_seconds"},
}


class ConfigError(Exception):
    """The configuration cannot be used; each line names a field and says what is wrong with it."""


class ClientConfig(BaseModel):
    """How the command line, the trainer, the gateway and the demo reach the server: as any other caller does."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    api_key: SecretStr = Field(SecretStr(""), description="The API key. Empty: the one in api_key_file.")
    api_key_file: Path | None = Field(
        None, description="File with the API key. Not set: the one that `alignd up` makes in data_dir for its own use."
    )
    tls: bool | None = Field(
        None, description="Whether to speak TLS. Not set: if `address` is empty and serving.tls_certificate is set."
    )
    tls_ca: Path | None = Field(
        None,
        description="Roots of the server's certificate, in PEM. Not set: those of this machine, and for a server of "
        "this configuration its own certificate.",
    )
    tls_server_name: str = Field(
        "", description="Name that the server's certificate must have; empty for the one in its address."
    )
    tls_certificate: Path | None = Field(
        None, description="Our own certificate, in PEM, where the server asks for one."
    )
    tls_key: Path | None = Field(None, description="The key of this certificate, in PEM.")


class AligndConfig(BaseSettings):
    """Everything that operators can set."""

    model_config = SettingsConfigDict(
        frozen=True, extra="forbid", env_prefix=PREFIX, env_nested_delimiter="__", validate_default=True
    )

    data_dir: Path = Field(Path("var"), description="Folder for everything that alignd writes.")
    bus: str = Field(
        "",
        pattern=r"^(|kafka://[^/?,]+:[0-9]+(,[^/?,]+:[0-9]+)*(/[^?]*)?(\?.*)?|sqlite:///.+)$",
        description="The bus: kafka://host:port[,host:port][/name], sqlite:///path, or empty for a file in data_dir. "
        "For TLS and SASL, Kafka's own names follow a question mark: ?security_protocol=SASL_SSL&ssl_cafile=...&"
        "sasl_mechanism=SCRAM-SHA-512&sasl_username=...&sasl_password_file=...",
    )
    store: str = Field(
        "",
        pattern=r"^(|sqlite:///.+|postgresql(\+\w+)?://.+)$",
        description="The feedback store: an SQLAlchemy URL of SQLite or PostgreSQL, or empty for a file in data_dir.",
    )
    address: str = Field("", description="host:port of the gRPC server for clients; empty for the one configured here.")
    api_keys: Path | None = Field(
        None,
        description="File of the API keys' digests, the same for all replicas. Not set: a file in data_dir, with a key "
        "for this machine's own use.",
    )
    log_format: Literal["text", "json"] = Field(
        "text", description="Form of log lines: text for people, or one JSON object a line, for whatever collects them."
    )
    client: ClientConfig = Field(ClientConfig(), description="How alignd's own processes reach the server.")
    serving: ServingConfig = Field(ServingConfig(), description="The gRPC server and its engine.")
    gateway: GatewayConfig = Field(GatewayConfig(), description="HTTP: OpenAI's API, and feedback.")
    feedback: FeedbackConfig = Field(FeedbackConfig(), description="Tokens, outbox, relay and ingest.")
    training: TrainingConfig = Field(TrainingConfig(), description="Reward model, PPO and when to run them.")

    @field_validator("bus")
    @classmethod
    def _bus_is_spoken_to(cls, bus: str) -> str:
        """Refuses a wrong part after the question mark now, and not when the bus is first needed."""
        if bus.startswith("kafka://"):
            read_security(bus.partition("?")[2])
        return bus

    @property
    def bus_url(self) -> str:
        """The URL of the bus."""
        return self.bus or f"sqlite:///{(self.data_dir / 'bus.db').resolve()}"

    @property
    def store_url(self) -> str:
        """The URL of the feedback store."""
        return self.store or f"sqlite:///{(self.data_dir / 'store.db').resolve()}"

    @property
    def server_address(self) -> str:
        """Where clients find the gRPC server, as host:port."""
        return self.address or host_and_port(_dialled(self.serving.host), self.serving.port)

    @property
    def server(self) -> ServerConnection:
        """How alignd's own processes reach the server."""
        client, here = self.client, not self.address
        files = (
            client.tls_ca or (self.serving.tls_certificate if here else None),
            client.tls_certificate,
            client.tls_key,
        )
        speaks_tls = here and self.serving.tls_certificate is not None if client.tls is None else client.tls
        return ServerConnection(
            self.server_address,
            Tls(*files, client.tls_server_name) if speaks_tls else None,
            client.api_key_file or (self.operator_key_path if here else None),
            client.api_key.get_secret_value(),
        )

    @property
    def api_keys_path(self) -> Path:
        """The file of the API keys' digests."""
        return self.api_keys or self.data_dir / "api_keys.json"

    @property
    def operator_key_path(self) -> Path:
        """The API key that this machine's own processes and its operator use, unless they are given another."""
        return self.data_dir / "operator_key"

    @property
    def policies_dir(self) -> Path:
        """The folder of the policy versions."""
        return (self.data_dir / "policies").resolve()

    @property
    def runs_dir(self) -> Path:
        """The folder of the training runs, with a folder for each."""
        return (self.data_dir / "runs").resolve()

    @property
    def outbox_path(self) -> Path:
        """The outbox of the serving replica on this machine."""
        return self.data_dir / "outbox.db"

    @property
    def keyring_path(self) -> Path:
        """The keys that sign feedback tokens. All replicas need the same keys."""
        return self.data_dir / "feedback_keys"

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Puts the environment before the file."""
        found = {name: value for name, value in read_file().items() if name != _SIMULATION}
        return init_settings, env_settings, InitSettingsSource(settings_cls, found)


def _dialled(host: str) -> str:
    """Returns the address by which this machine reaches a server that listens on this one."""
    return {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)


def read_file() -> dict[str, Any]:
    """Returns all that the configuration file says; nothing if there is no file.

    Raises:
        ConfigError: ALIGND_CONFIG names a file that is not there.
        tomllib.TOMLDecodeError, UnicodeDecodeError: the file is not TOML.
    """
    file = _configured_file()
    return tomllib.loads(file.read_bytes().decode()) if file else {}


def _configured_file() -> Path | None:
    """Returns the file that ALIGND_CONFIG names, else alignd.toml if there is one."""
    named = os.environ.get("ALIGND_CONFIG")
    if named:
        if not Path(named).is_file():
            raise ConfigError(f"ALIGND_CONFIG: there is no file {named}")
        return Path(named)
    return _DEFAULT_FILE if _DEFAULT_FILE.is_file() else None


def load_config() -> AligndConfig:
    """Returns the operators' configuration.

    Raises:
        ConfigError: naming each unknown or bad field.
    """
    _refuse_unknown_variables()
    return load_settings(AligndConfig)


def load_settings(settings: Callable[[], Settings]) -> Settings:
    """Returns settings that are read from file and environment.

    Raises:
        ConfigError: naming each unknown or bad field.
    """
    try:
        return settings()
    except ValidationError as error:
        raise ConfigError("\n".join(_line(each) for each in error.errors())) from error
    except (SettingsError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{_configured_file() or 'environment'}: {error}") from error


def _line(error: Mapping[str, Any]) -> str:
    """Returns the field at fault and what is wrong with it, or what it is called now."""
    name = ".".join(str(part) for part in error["loc"])
    section, _, field = name.partition(".")
    new_name = RENAMED.get(section, {}).get(field) if error["type"] == "extra_forbidden" else None
    said = str(error["msg"]).removeprefix("Value error, ")
    return f"{name}: is called {section}.{new_name} now" if new_name else f"{name}: {said}"


def _refuse_unknown_variables() -> None:
    """Refuses a variable that looks like ours, in whatever case, but sets nothing.

    Raises:
        ConfigError: naming the variable.
    """
    for variable in os.environ:
        if not variable.upper().startswith(PREFIX) or variable.upper().startswith(_OTHER_VARIABLES):
            continue
        name, separator, _ = variable.upper().removeprefix(PREFIX).lower().partition("__")
        field = AligndConfig.model_fields.get(name)
        # What is unknown inside a section is refused with the section.
        is_known = field is not None and (not separator or isinstance(field.default, BaseModel))
        if not is_known and name != _SIMULATION:
            raise ConfigError(f"{variable}: there is no such setting; `alignd config` lists all")


def resolved(config: BaseModel) -> str:
    """Returns the resolved configuration as TOML, each field with its description."""
    return "\n".join(_toml_lines(config, "")) + "\n"


def _toml_lines(model: BaseModel, section: str) -> list[str]:
    sections: list[str] = []
    lines: list[str] = []
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            sections += ["", f"[{section}{name}]  # {field.description}", *_toml_lines(value, f"{section}{name}.")]
        elif value is None:
            kind = next((each.__name__ for each in get_args(field.annotation) if each is not type(None)), "")
            lines.append(f"# {name} = ({kind}, not set)  # {field.description}")
        else:
            lines.append(f"{name} = {_toml_value(value)}  # {field.description}")
    return lines + sections


def _toml_value(value: object) -> str:
    # JSON writes strings, integers, booleans and lists as TOML does, but not infinity.
    if isinstance(value, float):
        return repr(value)
    return json.dumps(str(value) if isinstance(value, Path | SecretStr) else value, ensure_ascii=False)
