"""A policy version is complete and as it was written, or it is refused."""

import contextlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from google.protobuf import json_format
from google.protobuf.timestamp_pb2 import Timestamp
from safetensors.numpy import save_file

from alignd.v1.policy_manifest_pb2 import ArtifactFile, PolicyManifest
from policies.artifact import (
    MANIFEST,
    ArtifactError,
    ComparisonError,
    UnreadableError,
    read_manifest,
    verify_artifact,
    weight_digest,
    write_artifact,
)
from policies.weights import INDEX_FILE


def make_manifest(version: int = 1) -> PolicyManifest:
    return PolicyManifest(version=version, reference_version=1, create_time=Timestamp(seconds=1_700_000_000))


def make_writer(seed: int = 0, shape: tuple[int, ...] = (4, 6), value: float | None = None) -> Callable[[Path], None]:
    """Returns a function that writes two files of weights and a config."""

    def write_files(path: Path) -> None:
        numbers = np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
        if value is not None:
            numbers.flat[-1] = value
        (path / "deep").mkdir()
        save_file({"a": numbers, "empty": np.zeros((0, 3), np.float32)}, path / "model-1.safetensors")
        save_file({"b": numbers.astype(np.float16)}, path / "deep" / "model-2.safetensors")
        (path / "config.json").write_text(json.dumps({"seed": seed}))

    return write_files


@pytest.fixture
def version(tmp_path: Path) -> Path:
    return write_artifact(tmp_path / "policies", make_manifest(), make_writer())[0]


def test_what_is_written_is_verified(version: Path) -> None:
    manifest = verify_artifact(version, shapes_like=version)
    assert version.name == "v1"
    assert [file.path for file in manifest.files] == ["config.json", "deep/model-2.safetensors", "model-1.safetensors"]
    assert read_manifest(version) == manifest
    assert [each.name for each in version.parent.iterdir()] == ["v1"]


def test_the_weight_digest_is_as_documented(version: Path) -> None:
    files = ["deep/model-2.safetensors", "model-1.safetensors"]
    sums = subprocess.run(["sha256sum", *files], cwd=version, check=True, capture_output=True).stdout
    digest = subprocess.run(["sha256sum"], input=sums, check=True, capture_output=True).stdout.split()[0].decode()
    assert read_manifest(version).weight_digest == digest
    assert weight_digest([]) != digest


def test_a_version_is_never_overwritten(version: Path) -> None:
    before = read_manifest(version)
    with pytest.raises(ArtifactError, match="exists"):
        write_artifact(version.parent, make_manifest(), make_writer(seed=1))
    assert verify_artifact(version) == before
    assert [each.name for each in version.parent.iterdir()] == ["v1"]


def test_a_writer_that_fails_leaves_nothing(tmp_path: Path) -> None:
    def write_files(path: Path) -> None:
        make_writer()(path)
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        write_artifact(tmp_path, make_manifest(), write_files)
    assert list(tmp_path.iterdir()) == []


def test_a_writer_that_is_killed_leaves_no_version_and_its_draft_is_removed(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from policies.artifact import write_artifact\n"
        "from tests.policies.test_artifact import make_manifest, make_writer\n"
        "def write_files(path):\n"
        "    make_writer()(path)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_artifact(Path(sys.argv[1]), make_manifest(), write_files)\n"
    )
    killed = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=Path(__file__).parents[2], check=False)
    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith(".tmp-")
    write_artifact(tmp_path, make_manifest(), make_writer())
    assert [each.name for each in tmp_path.iterdir()] == ["v1"]


def test_the_draft_of_a_living_writer_is_let_be(tmp_path: Path) -> None:
    def write_files(path: Path) -> None:
        write_artifact(tmp_path, make_manifest(2), make_writer())
        make_writer()(path)

    write_artifact(tmp_path, make_manifest(1), write_files)
    assert sorted(each.name for each in tmp_path.iterdir()) == ["v1", "v2"]


@pytest.mark.parametrize("seed", range(25))
def test_any_flipped_bit_is_refused(version: Path, seed: int) -> None:
    chance = random.Random(seed)
    path = chance.choice([version / file.path for file in read_manifest(version).files])
    data = bytearray(path.read_bytes())
    position = chance.randrange(len(data))
    data[position] ^= 1 << chance.randrange(8)
    path.write_bytes(data)
    with pytest.raises(ArtifactError, match="is not what was written"):
        verify_artifact(version)


def break_manifest(version: Path, change: Callable[[PolicyManifest], None]) -> None:
    manifest = read_manifest(version)
    change(manifest)
    (version / MANIFEST).write_text(json_format.MessageToJson(manifest))


def add_path(path: str) -> Callable[[Path], None]:
    def damage(version: Path) -> None:
        break_manifest(version, lambda manifest: manifest.files.append(ArtifactFile(path=path, sha256="0" * 64)))

    return damage


def swap_files(version: Path) -> None:
    one, other = version / "model-1.safetensors", version / "deep" / "model-2.safetensors"
    one.rename(version / "third")
    other.rename(one)
    (version / "third").rename(other)


def link_file(version: Path) -> None:
    target = version.parent / "elsewhere.json"
    (version / "config.json").rename(target)
    (version / "config.json").symlink_to(target)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "truncated": lambda version: os.truncate(version / "model-1.safetensors", 50),
    "emptied": lambda version: os.truncate(version / "model-1.safetensors", 0),
    "missing": lambda version: (version / "config.json").unlink(),
    "extra": lambda version: (version / "extra.json").write_text("{}"),
    "pickle": lambda version: (version / "model.bin").write_bytes(b"\x80"),
    "code": lambda version: (version / "modeling.py").write_text("print()"),
    "swapped": swap_files,
    "symbolic link": link_file,
    "named pipe": lambda version: os.mkfifo(version / "pipe.json"),
    "no manifest": lambda version: (version / MANIFEST).unlink(),
    "manifest cut": lambda version: os.truncate(version / MANIFEST, 100),
    "manifest not UTF-8": lambda version: (version / MANIFEST).write_bytes(b"\xff\xfe"),
    "manifest deep": lambda version: (version / MANIFEST).write_text('{"files":' + "[" * 100_000),
    "manifest of other fields": lambda version: (version / MANIFEST).write_text('{"version": 1, "pickle": "x"}'),
    "path upwards": add_path("../secret.json"),
    "path from the root": add_path("/etc/hostname"),
    "path with a dot": add_path("deep/../config.json"),
    "path twice": add_path("config.json"),
    "wrong weight digest": lambda version: break_manifest(
        version, lambda manifest: setattr(manifest, "weight_digest", "0" * 64)
    ),
    "folder gone": shutil.rmtree,
}


UNREADABLE = {"missing", "truncated", "emptied", "swapped", "no manifest", "folder gone"}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_version_is_refused_and_only_what_was_read_counts_against_it(version: Path, damage: str) -> None:
    """A folder that is not mounted, or is being copied, says nothing about the version."""
    verify_artifact(version)
    DAMAGES[damage](version)
    with pytest.raises(ArtifactError) as raised:
        verify_artifact(version)
    assert isinstance(raised.value, UnreadableError) == (damage in UNREADABLE)


def test_running_out_of_descriptors_says_nothing_about_a_version(version: Path) -> None:
    limits, manifest = resource.getrlimit(resource.RLIMIT_NOFILE), read_manifest(version)
    taken = []
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 8, limits[1]))
        with contextlib.suppress(OSError):
            while True:
                taken.append(os.open(os.devnull, os.O_RDONLY))
        for _ in range(2):
            for known in (None, manifest):
                with pytest.raises(UnreadableError):
                    verify_artifact(version, manifest=known)
            os.close(taken.pop())
    finally:
        for each in taken:
            os.close(each)
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    verify_artifact(version)


@pytest.mark.timeout(10)
@pytest.mark.parametrize("name", [MANIFEST, "config.json"])
def test_a_pipe_or_a_link_in_place_of_a_file_is_refused_at_once(version: Path, tmp_path: Path, name: str) -> None:
    (version / name).rename(tmp_path / name)
    os.mkfifo(version / name)
    with pytest.raises(ArtifactError, match="is not a plain file"):
        verify_artifact(version)
    (version / name).unlink()
    (version / name).symlink_to(tmp_path / name)
    with pytest.raises(ArtifactError, match="is not a plain file"):
        verify_artifact(version)


def test_a_folder_behind_a_link_is_refused(version: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(version)
    with pytest.raises(ArtifactError, match="link"):
        verify_artifact(tmp_path / "link")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    path, _ = write_artifact(tmp_path, make_manifest(), make_writer(value=value))
    with pytest.raises(ArtifactError, match="not finite"):
        verify_artifact(path)


@pytest.mark.parametrize(("bits", "is_finite"), [(0x7F7F, True), (0xFF7F, True), (0x7F80, False), (0xFFC1, False)])
def test_bfloat16_is_checked(tmp_path: Path, bits: int, is_finite: bool) -> None:
    header = b'{"a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}'
    data = len(header).to_bytes(8, "little") + header + b"\0\0" + bits.to_bytes(2, "little")
    path, _ = write_artifact(
        tmp_path, make_manifest(), lambda path: (path / "m.safetensors").write_bytes(data) and None
    )
    if is_finite:
        assert verify_artifact(path).version == 1
    else:
        with pytest.raises(ArtifactError, match="not finite"):
            verify_artifact(path)


def test_weights_of_another_form_are_refused(version: Path, tmp_path: Path) -> None:
    path, _ = write_artifact(tmp_path / "others", make_manifest(2), make_writer(shape=(6, 4)))
    assert verify_artifact(path).version == 2
    with pytest.raises(ArtifactError, match=r"tensor a: .*\(6, 4\).*\(4, 6\)"):
        verify_artifact(path, shapes_like=version)


def test_missing_tensors_are_refused(version: Path, tmp_path: Path) -> None:
    def write_files(path: Path) -> None:
        save_file({"a": np.zeros((4, 6), np.float32)}, path / "model.safetensors")

    path, _ = write_artifact(tmp_path / "others", make_manifest(2), write_files)
    with pytest.raises(ArtifactError, match="tensor b"):
        verify_artifact(path, shapes_like=version)


def test_no_weights_are_refused(tmp_path: Path) -> None:
    path, _ = write_artifact(tmp_path, make_manifest(), lambda path: (path / "config.json").write_text("{}"))
    with pytest.raises(ArtifactError, match="no weights"):
        verify_artifact(path)


@pytest.mark.parametrize("name", ["model.bin", "model.pt", "run.py", ".hidden.json", "a b.json"])
def test_a_file_that_is_not_allowed_is_not_written(tmp_path: Path, name: str) -> None:
    with pytest.raises(ArtifactError):
        write_artifact(tmp_path, make_manifest(), lambda path: (path / name).write_text("x"))
    assert list(tmp_path.iterdir()) == []


def test_a_manifest_that_breaks_its_contract_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="not valid"):
        write_artifact(tmp_path, make_manifest(version=0), make_writer())
    assert list(tmp_path.iterdir()) == []


def test_what_it_is_compared_with_is_at_fault_if_it_cannot_be_read(version: Path, tmp_path: Path) -> None:
    with pytest.raises(ComparisonError, match="elsewhere"):
        verify_artifact(version, shapes_like=tmp_path / "elsewhere")
    next(version.glob("*.safetensors")).unlink()
    with pytest.raises(ArtifactError) as raised:
        verify_artifact(version, shapes_like=tmp_path / "elsewhere")
    assert not isinstance(raised.value, ComparisonError)


INDICES: dict[str, dict[str, str]] = {
    "a tensor that is not there": {"a": "m-1.safetensors", "b": "m-2.safetensors", "c": "m-2.safetensors"},
    "a tensor too few": {"a": "m-1.safetensors"},
    "a tensor in another file": {"a": "m-2.safetensors", "b": "m-1.safetensors"},
    "a file that is not there": {"a": "m-1.safetensors", "b": "m-3.safetensors"},
    "a file elsewhere": {"a": "../m-1.safetensors", "b": "m-2.safetensors"},
    "nothing": {},
}


@pytest.mark.parametrize("name", INDICES)
def test_an_index_that_is_not_that_of_the_files_is_refused(tmp_path: Path, name: str) -> None:
    """Nobody could load the version: an index that was copied with another version's files."""

    def write(index: dict[str, str]) -> Callable[[Path], None]:
        def write_files(path: Path) -> None:
            for number, tensor in enumerate("ab", start=1):
                save_file({tensor: np.ones(3, np.float32)}, path / f"m-{number}.safetensors")
            (path / INDEX_FILE).write_text(json.dumps({"weight_map": index}))

        return write_files

    right = {"a": "m-1.safetensors", "b": "m-2.safetensors"}
    verify_artifact(write_artifact(tmp_path / "right", make_manifest(), write(right))[0])
    wrong = write_artifact(tmp_path / "wrong", make_manifest(), write(INDICES[name]))[0]
    with pytest.raises(ArtifactError, match=r"index"):
        verify_artifact(wrong)
