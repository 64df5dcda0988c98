"""How a Kafka cluster is spoken to, as its URL says: in clear, by TLS, and as which user (SASL)."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

PROTOCOLS = ("PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL")
MECHANISMS = ("PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512")
_FILES = ("ssl_cafile", "ssl_certfile", "ssl_keyfile", "sasl_password_file")
_NAMES = ("security_protocol", "sasl_mechanism", "sasl_username", *_FILES)


@dataclass(frozen=True)
class KafkaSecurity:
    """What a client needs to be let in. Names are those of Kafka's own clients."""

    protocol: str = "PLAINTEXT"
    ca: Path | None = None
    """The roots of the brokers' certificates, in PEM. None: those of the machine."""
    certificate: Path | None = None
    """The client's own, where brokers ask for one."""
    key: Path | None = None
    mechanism: str = ""
    username: str = ""
    password_file: Path | None = None

    def options(self) -> Mapping[str, Any]:
        """Returns the options of a client. The password is read anew for each.

        Raises:
            OSError: the file with the password cannot be read.
        """
        if self.protocol == "PLAINTEXT":
            return {}
        files = {"ssl_cafile": self.ca, "ssl_certfile": self.certificate, "ssl_keyfile": self.key}
        options: dict[str, Any] = {"security_protocol": self.protocol}
        options |= {name: str(path) for name, path in files.items() if path}
        if self.mechanism:
            assert self.password_file is not None
            options |= {
                "sasl_mechanism": self.mechanism,
                "sasl_plain_username": self.username,
                "sasl_plain_password": self.password_file.read_text().strip(),
            }
        return options


def read_security(query: str) -> KafkaSecurity:
    """Reads the part of a URL after its "?".

    Raises:
        ValueError: a parameter is unknown, is missing, or has a value that Kafka does not have.
    """
    given = dict(parse_qsl(query, keep_blank_values=True))
    unknown = sorted(set(given) - set(_NAMES))
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: a Kafka bus takes {', '.join(_NAMES)}")
    protocol = given.get("security_protocol", "PLAINTEXT")
    _check("security_protocol", protocol, PROTOCOLS)
    sasl = [name for name in ("sasl_mechanism", "sasl_username", "sasl_password_file") if name in given]
    if protocol.startswith("SASL") != bool(sasl) or len(sasl) not in (0, 3):
        raise ValueError(
            "security_protocol SASL_SSL or SASL_PLAINTEXT goes with sasl_mechanism, sasl_username and "
            "sasl_password_file, and no other protocol does"
        )
    tls = [name for name in _FILES[:3] if name in given]
    if tls and not protocol.endswith("SSL"):
        raise ValueError(f"{', '.join(tls)}: goes with security_protocol SSL or SASL_SSL")
    if sasl:
        _check("sasl_mechanism", given["sasl_mechanism"], MECHANISMS)
    files = {name: Path(given[name]) for name in _FILES if given.get(name)}
    return KafkaSecurity(
        protocol, files.get("ssl_cafile"), files.get("ssl_certfile"), files.get("ssl_keyfile"),
        given.get("sasl_mechanism", ""), given.get("sasl_username", ""), files.get("sasl_password_file"),
    )  # fmt: skip


def _check(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} is one of {', '.join(known)}, not {value!r}")
