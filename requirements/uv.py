"""Runs uv with the package sources that pip is set up with, because uv reads neither pip.conf nor PIP_* variables.

    .venv/bin/python requirements/uv.py pip install ...

A UV_* variable that is already set wins.
"""

import ast
import os
import re
import subprocess
import sys
import sysconfig
from pathlib import Path

# pip separates several values by white space; uv does so for indexes, and takes commas for find-links.
_FROM_PIP = {
    "index-url": ("UV_DEFAULT_INDEX", " "),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "trusted-host": ("UV_INSECURE_HOST", " "),
    "cert": ("SSL_CERT_FILE", " "),
}


def _pip_settings() -> dict[str, str]:
    """What pip would use, by option name: the lines of `pip config list`, the most general first."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    settings: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in lines:
        found = re.fullmatch(r"(global|install|:env:)\.([a-z-]+)=(.*)", line)
        if found:
            section, option, value = found.groups()
            settings[section][option] = ast.literal_eval(value)
    return {**settings["global"], **settings["install"], **settings[":env:"]}


def main() -> None:
    environment = dict(os.environ)
    # As pip does: the best version of all indexes together. uv alone would stop at the first index that knows the name.
    environment.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")
    for option, value in _pip_settings().items():
        if option in _FROM_PIP:
            name, separator = _FROM_PIP[option]
            environment.setdefault(name, separator.join(value.split()))
    uv = Path(sysconfig.get_path("scripts"), "uv")
    sys.exit(subprocess.run([uv, *sys.argv[1:]], env=environment, check=False).returncode)


if __name__ == "__main__":
    main()
