"""TLS: the server's certificate, and which callers' certificates it takes, read again when their files change."""

import logging
import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import grpc

logger = logging.getLogger(__name__)


class CertificateError(Exception):
    """A certificate cannot be used. The text says which, and why."""


@dataclass(frozen=True)
class Certificates:
    """The files of a server's TLS, all in PEM."""

    certificate: Path
    """The server's, with those between it and its root."""
    key: Path
    client_ca: Path | None = None
    """The root of callers' certificates. Callers need one if this is set (mTLS)."""

    def credentials(self) -> grpc.ServerCredentials:
        """Returns credentials for a port, by which each new connection meets the certificates of now.

        Raises:
            CertificateError: a file cannot be read, or has no certificate or key.
        """
        watched = Watched(self)
        # None, for what has not changed, is left out of its stub.
        changed: Any = watched.changed
        return grpc.dynamic_ssl_server_credentials(watched.now, changed, self.client_ca is not None)


class Watched:
    """Certificates whose files are looked at again and again.

    Raises:
        CertificateError: when it is made, if they cannot be used.
    """

    def __init__(self, files: Certificates) -> None:
        self.files = files
        self.now = _read(files)
        """As gRPC takes them: those of the last time that all files could be used."""
        # Of before the files were read, or a change in between would be missed; nothing matches the first time.
        self._version: tuple[tuple[int, int, int], ...] = ()
        self._said = ""

    def has_changed(self) -> bool:
        """Reads the files again if they have changed, and returns whether there are other certificates since."""
        try:
            version = _version(self.files)
            if version == self._version:
                return False
            self.now = _read(self.files)
        except (CertificateError, OSError) as error:
            # They are read again at the next look, in which a passing error is over. It is said once.
            if str(error) != self._said:
                self._said = str(error)
                logger.warning("the certificates cannot be read again, those of before are used: %s", error)
            return False
        self._version, self._said = version, ""
        return True

    def changed(self) -> grpc.ServerCertificateConfiguration | None:
        """Returns the certificates if they have changed, else None."""
        return self.now if self.has_changed() else None


def _read(files: Certificates) -> grpc.ServerCertificateConfiguration:
    certificate, key = _pem(files.certificate, b"CERTIFICATE"), _pem(files.key, b"PRIVATE KEY")
    _check_pair(files)
    client_ca = _pem(files.client_ca, b"CERTIFICATE") if files.client_ca else None
    return grpc.ssl_server_certificate_configuration([(key, certificate)], client_ca)


def _check_pair(files: Certificates) -> None:
    """Checks that certificate and key belong together: gRPC would notice only when somebody connects, and say nothing.

    Raises:
        CertificateError: they do not, or are no certificate and key.
    """
    try:
        # With a password nobody is asked for one, where the key has one.
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(files.certificate, files.key, password="")
    except ssl.SSLError as error:
        raise CertificateError(f"{files.certificate} and {files.key} are no pair: {error.reason or error}") from error


def _pem(path: Path, kind: bytes) -> bytes:
    """Returns a file that has a part of this kind.

    Raises:
        CertificateError: it cannot be read, or has none.
    """
    try:
        found = path.read_bytes()
    except OSError as error:
        raise CertificateError(f"{path} cannot be read: {error.strerror}") from error
    if b"-----BEGIN " not in found or kind + b"-----" not in found:
        raise CertificateError(f"{path} has no {kind.decode().lower()} in PEM")
    return found


def _version(files: Certificates) -> tuple[tuple[int, int, int], ...]:
    found = [path.stat() for path in (files.certificate, files.key, files.client_ca) if path]
    return tuple((each.st_ino, each.st_mtime_ns, each.st_size) for each in found)
