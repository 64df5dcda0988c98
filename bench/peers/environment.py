"""Runs TRL's PPO as a peer, in a virtual environment of its own with the last release of TRL that has PPO."""

import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]
_PINS = Path(__file__).with_name("requirements-trl-1.12.txt")
_SCRIPT = Path(__file__).with_name("ppo_trl.py")
VENV = _ROOT / "var" / "bench" / "venv-trl-1.12"


def run_trl_ppo(job: dict[str, Any], folder: Path) -> list[dict[str, Any]]:
    """Runs `job` and returns what was measured of each update; bench/peers/ppo_trl.py's docstring describes both.

    Leaves job.json, updates.jsonl and the peer's own output, trl.log, in `folder`.

    Raises:
        RuntimeError: the peer failed; the text has the end of its output.
    """
    python = trl_python(VENV)
    folder.mkdir(parents=True, exist_ok=True)
    job_path, updates_path, log_path = folder / "job.json", folder / "updates.jsonl", folder / "trl.log"
    job_path.write_text(json.dumps(job, indent=2) + "\n")
    environment = {**os.environ, "OMP_NUM_THREADS": str(job["threads"]), "HF_HUB_OFFLINE": "1"}
    with log_path.open("w") as log:
        # -I: nothing of ours is on its path, whatever PYTHONPATH says.
        command = [str(python), "-I", str(_SCRIPT), str(job_path), str(updates_path)]
        done = subprocess.run(command, env=environment, stdout=log, stderr=subprocess.STDOUT, check=False)
    if done.returncode:
        raise RuntimeError(f"TRL's PPO failed, see {log_path}:\n{log_path.read_text()[-2000:]}")
    return [json.loads(line) for line in updates_path.read_text().splitlines()]


def trl_python(folder: Path) -> Path:
    """Makes `folder` a virtual environment with exactly the pinned packages, unless it is one; returns its Python.

    Raises:
        subprocess.CalledProcessError: a package cannot be installed; the installer has printed why.
    """
    python, installed, pins = folder / "bin" / "python", folder / "installed.txt", _PINS.read_text()
    if installed.is_file() and installed.read_text() == pins:
        return python
    venv.create(folder, clear=True, symlinks=True)
    (torch,) = (line for line in pins.splitlines() if line.startswith("torch=="))
    # As in requirements/install.sh: PyPI has no +cpu build of torch. It comes from where pip is configured to look, or
    # else from PyTorch's own index, which uv knows.
    if _pip_install(python, torch, "--quiet", check=False):
        _pip_install(python, torch, "--torch-backend", "cpu")
    _pip_install(python, "-r", str(_PINS))
    installed.write_text(pins)
    return python


def _pip_install(python: Path, *arguments: str, check: bool = True) -> int:
    """Installs exactly what is named into the environment of `python`, with uv; returns uv's exit status."""
    command = [sys.executable, str(_ROOT / "requirements" / "uv.py"), "pip", "install", "--python", str(python)]
    quiet = None if check else subprocess.DEVNULL
    return subprocess.run([*command, "--no-deps", *arguments], stderr=quiet, check=check).returncode


if __name__ == "__main__":
    trl_python(VENV)
