"""npm's packages: nothing but npm's own registry is named, and a registry that is away is said."""

import re
from pathlib import Path

import pytest

from tests.npm import NODE_FOLDER, NpmError, npm_packages


def test_the_lock_file_names_no_host_but_npms_and_exact_versions() -> None:
    text = (NODE_FOLDER / "package-lock.json").read_text()
    assert set(re.findall(r'"resolved": "(https?://[^/"]+)', text)) <= {"https://registry.npmjs.org"}
    named = re.findall(r'^    "(?:@[\w/-]+|[\w-]+)": "(.*)"', (NODE_FOLDER / "package.json").read_text(), re.MULTILINE)
    assert named
    assert all(re.fullmatch(r"[0-9]+\.[0-9]+\.[0-9]+", version) for version in named)


def test_a_registry_that_is_away_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Nobody listens at port 1; and npm's own cache would have the packages.
    for name, value in (("registry", "http://127.0.0.1:1/"), ("fetch_retries", "0"), ("cache", str(tmp_path / "npm"))):
        monkeypatch.setenv(f"npm_config_{name}", value)
    with pytest.raises(NpmError, match=r"npm registry not reachable: .*ECONNREFUSED(.|\n)*; these tests need it"):
        npm_packages(tmp_path)
    assert not list(tmp_path.glob("node-*"))
