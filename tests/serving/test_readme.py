"""The README's client, run as it stands there by an application that has alignd-client alone, on a real server."""

import json
import re
import subprocess
import sys
import venv
from importlib import metadata
from pathlib import Path

import pytest

from tests.serving.processes import REPOSITORY, Server

READMES = ("README.md", "protos/client/README.md")
# Printed after the README's lines: which distributions an application has then, and what was sampled.
EPILOGUE = """
import json
from importlib import metadata
packages = sorted(each.metadata["Name"] for each in metadata.distributions())
print(json.dumps([packages, len(sample.completions), len(sample.feedback_token) > 0]))
"""


@pytest.fixture(scope="module")
def python(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The Python of an empty environment into which the wheel was installed, as an application would."""
    folder = tmp_path_factory.mktemp("application")
    uv = [sys.executable, str(REPOSITORY / "requirements" / "uv.py")]
    build = ["build", "--quiet", "--wheel", "--no-build-isolation", "--python", sys.executable, "--out-dir"]
    subprocess.run([*uv, *build, str(folder), str(REPOSITORY / "protos" / "client")], check=True)
    (wheel,) = folder.glob("alignd_client-*.whl")
    venv.create(folder / "venv", with_pip=False)
    made = folder / "venv" / "bin" / "python"
    subprocess.run([*uv, "pip", "install", "--quiet", "--python", str(made), str(wheel)], check=True)
    return made


@pytest.mark.parametrize("path", READMES)
def test_the_readme_client_needs_nothing_but_the_wheel(server: Server, python: Path, path: str) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (REPOSITORY / path).read_text(encoding="utf-8"), re.DOTALL)
    assert len(code.splitlines()) <= 10
    program = code.replace("localhost:50051", server.address) + EPILOGUE
    # In isolated mode: from neither this folder nor PYTHONPATH comes what the wheel should have brought.
    done = subprocess.run([python, "-I", "-c", program], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
    packages, completions, has_token = json.loads(done.stdout.splitlines()[-1])
    # grpcio itself needs the last one.
    assert packages == ["alignd-client", "grpcio", "protobuf", "typing_extensions"]
    assert (completions, has_token) == (4, True)


def test_the_client_has_the_version_of_the_server(python: Path) -> None:
    ask = "from importlib import metadata; print(metadata.version('alignd-client'))"
    told = subprocess.run([python, "-I", "-c", ask], capture_output=True, text=True, check=True).stdout.strip()
    assert told == metadata.version("alignd")
