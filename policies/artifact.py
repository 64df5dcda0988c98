"""A policy version on disk: an immutable folder that is either complete or absent, and verified before it is served."""

import fcntl
import hashlib
import os
import shutil
import uuid
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import protovalidate
from google.protobuf import json_format

from alignd.v1.policy_manifest_pb2 import ArtifactFile, PolicyManifest
from feedback.durable import rename_folder
from policies.weights import TensorSpec, WeightsError, check_finite, tensor_specs

MANIFEST = "manifest.json"
_MAX_MANIFEST_BYTES = 64 * 1024 * 1024
_DRAFT_PREFIX = ".tmp-"
# The kinds of files that a version may have. None can hold code or pickled objects.
_SUFFIXES = frozenset({".safetensors", ".json", ".txt", ".jinja", ".model"})


class ArtifactError(Exception):
    """The folder is not a policy version that may be served. The text says why."""


class ComparisonError(ArtifactError):
    """The folder that a version is compared with cannot be read. This says nothing about the version itself."""


def write_artifact(
    root: Path, manifest: PolicyManifest, write_files: Callable[[Path], object]
) -> tuple[Path, PolicyManifest]:
    """Writes the folder root/v{version}, durable and complete, and returns it with its manifest.

    A crash leaves no root/v{version}. If `write_files` raises, its error is passed on.

    Args:
        root: the folder of all versions.
        manifest: the version's manifest, whose `files` and `weight_digest` are filled in from the files.
        write_files: writes the files into the folder that it is given.

    Raises:
        ArtifactError: the version exists, a file is not allowed, or the manifest is not valid.
        OSError: the files cannot be written.
    """
    root.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(root)
    target = root / f"v{manifest.version}"
    with _draft(root) as draft:
        write_files(draft)
        complete = PolicyManifest()
        complete.CopyFrom(manifest)
        del complete.files[:]
        complete.files.extend(_describe(draft, path) for path in _list_files(draft))
        complete.weight_digest = weight_digest(complete.files)
        _validate(complete)
        (draft / MANIFEST).write_text(json_format.MessageToJson(complete, preserving_proto_field_name=True))
        try:
            rename_folder(draft, target)
        except OSError as error:
            if target.exists():
                raise ArtifactError(f"version {manifest.version} exists") from error
            raise
    return target, complete


def read_manifest(path: Path) -> PolicyManifest:
    """Reads and checks the manifest of a version's folder, but not its files.

    Raises:
        ArtifactError: the manifest is missing, too long or not valid.
    """
    try:
        if (path / MANIFEST).stat().st_size > _MAX_MANIFEST_BYTES:
            raise ArtifactError("the manifest is too long")
        manifest = json_format.Parse((path / MANIFEST).read_bytes(), PolicyManifest())
    except (OSError, ValueError, json_format.ParseError, RecursionError) as error:
        raise ArtifactError(f"cannot read the manifest: {error}") from error
    _validate(manifest)
    return manifest


def verify_artifact(path: Path, shapes_like: Path | None = None) -> PolicyManifest:
    """Checks every byte of a version against its manifest, and returns the manifest.

    All weights must be finite. With `shapes_like`, they must also have the names, shapes and types of the weights in
    that folder.

    Raises:
        ArtifactError: the version fails a check.
        ComparisonError: `shapes_like` cannot be read.
    """
    manifest = read_manifest(path)
    try:
        _check_files(path, manifest)
        for file in weight_files(manifest.files):
            check_finite(path / file.path)
        specs = _all_specs(path, (file.path for file in weight_files(manifest.files)))
        if shapes_like is not None:
            _check_specs(specs, _specs_in(shapes_like))
    except (OSError, WeightsError) as error:
        raise ArtifactError(str(error)) from error
    return manifest


def weight_digest(files: Iterable[ArtifactFile]) -> str:
    """Returns the SHA-256 over "sha256  path\\n" of each .safetensors file, by path, in lower-case hexadecimal."""
    lines = [f"{file.sha256}  {file.path}\n" for file in weight_files(files)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def weight_files(files: Iterable[ArtifactFile]) -> list[ArtifactFile]:
    """Returns the .safetensors files among these, by path."""
    return sorted((file for file in files if file.path.endswith(".safetensors")), key=lambda file: file.path)


def _check_files(path: Path, manifest: PolicyManifest) -> None:
    listed = {file.path for file in manifest.files}
    found = {each for each in _list_files(path) if each != MANIFEST}
    if len(listed) != len(manifest.files):
        raise ArtifactError("the manifest names a file twice")
    if listed != found:
        raise ArtifactError(
            f"missing files: {sorted(listed - found)}; files not in the manifest: {sorted(found - listed)}"
        )
    for file in manifest.files:
        if _describe(path, file.path) != file:
            raise ArtifactError(f"{file.path} is not what was written")
    if weight_digest(manifest.files) != manifest.weight_digest:
        raise ArtifactError("the weight digest is wrong")


def _check_specs(specs: dict[str, TensorSpec], like: dict[str, TensorSpec]) -> None:
    for name in sorted(specs.keys() | like.keys()):
        if specs.get(name) != like.get(name):
            raise ArtifactError(f"tensor {name}: is {specs.get(name)}, should be {like.get(name)}")


def _specs_in(path: Path) -> dict[str, TensorSpec]:
    try:
        return _all_specs(path, (each for each in _list_files(path) if each.endswith(".safetensors")))
    except (OSError, WeightsError, ArtifactError) as error:
        raise ComparisonError(f"cannot read {path} to compare with: {error}") from error


def _all_specs(path: Path, files: Iterable[str]) -> dict[str, TensorSpec]:
    specs: dict[str, TensorSpec] = {}
    for file in files:
        found = tensor_specs(path / file)
        if specs.keys() & found.keys():
            raise ArtifactError(f"{file} has tensors that another file has too")
        specs |= found
    if not specs:
        raise ArtifactError("no weights")
    return specs


def _list_files(path: Path) -> list[str]:
    """Returns the paths of the files below a folder.

    Raises:
        ArtifactError: the folder has something that is neither a plain file nor a folder, or a file that is not
            allowed.
    """
    files = []
    for each in sorted(path.rglob("*")):
        name = each.relative_to(path).as_posix()
        if each.is_symlink() or not (each.is_file() or each.is_dir()):
            raise ArtifactError(f"{name} is not a plain file")
        if each.is_file():
            if each.suffix not in _SUFFIXES:
                raise ArtifactError(f"{name} is of a kind that is not allowed; allowed are {sorted(_SUFFIXES)}")
            files.append(name)
    return files


def _describe(root: Path, path: str) -> ArtifactFile:
    with (root / path).open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return ArtifactFile(path=path, size_bytes=os.fstat(file.fileno()).st_size, sha256=digest)


def _validate(manifest: PolicyManifest) -> None:
    try:
        protovalidate.validate(manifest)
    except protovalidate.ValidationError as error:
        raise ArtifactError(f"the manifest is not valid: {error}") from error


@contextmanager
def _draft(root: Path) -> Iterator[Path]:
    """Makes a new folder, locked while its writer lives, and removes it at the end if it is still there."""
    draft = root / f"{_DRAFT_PREFIX}{uuid.uuid4().hex}"
    draft.mkdir()
    lock = os.open(draft, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield draft
    finally:
        shutil.rmtree(draft, ignore_errors=True)
        os.close(lock)


def _remove_abandoned(root: Path) -> None:
    """Removes the drafts of writers that were killed: their locks ended with them."""
    for draft in root.glob(f"{_DRAFT_PREFIX}*"):
        lock = os.open(draft, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(draft, ignore_errors=True)
        except BlockingIOError:
            pass
        finally:
            os.close(lock)
