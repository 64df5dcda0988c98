"""The API key of this machine's own processes and its operator: made once, so that nobody has to ask for one."""

from __future__ import annotations

import getpass
from datetime import UTC, datetime
from pathlib import Path

from deploy.config import AligndConfig
from feedback.durable import make_private, replace_file_by
from serving.access.keys import SCOPES, create_key, find, read_keys, revoke_key

NAME = "local-operator"


def make_operator_key(config: AligndConfig) -> None:
    """Makes the key, unless there is one, or operators name another file of keys, or another key, themselves.

    Its file is for this machine's user alone. It is the only place where a key stands in clear.

    Raises:
        KeysError: the file of keys cannot be used.
        OSError: a file cannot be written.
    """
    if config.api_keys or config.client.api_key_file or config.client.api_key.get_secret_value():
        return
    path, keys = config.operator_key_path, config.api_keys_path
    now, known = datetime.now(UTC), read_keys(keys)
    found = find(known, path.read_text().strip()) if path.exists() else None
    if found and found.state(now) == "active":
        return
    actor = getpass.getuser()
    if any(key.name == NAME and key.state(now) == "active" for key in known):
        # Its secret was lost.
        revoke_key(keys, NAME, actor)
    _, secret = create_key(keys, NAME, "", SCOPES, actor)
    keep_operator_key(config, secret)


def keep_operator_key(config: AligndConfig, secret: str) -> None:
    """Writes the key to its file.

    Raises:
        OSError: the file cannot be written.
    """
    replace_file_by(config.operator_key_path, lambda draft: _write(draft, secret))


def _write(draft: Path, secret: str) -> None:
    make_private(draft, create=True)
    draft.write_text(f"{secret}\n")
