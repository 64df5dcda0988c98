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
from policies.plain_files import NotPlainError, list_plain, open_plain
from policies.weights import (
    INDEX_FILE,
    TensorSpec,
    WeightsError,
    check_finite,
    check_index,
    read_index,
    tensor_specs,
)

MANIFEST = "manifest.json"
_MAX_MANIFEST_BYTES = 64 * 1024 * 1024
_DRAFT_PREFIX = ".tmp-"
# The kinds of files that a version may have. None can hold code or pickled objects.
_SUFFIXES = frozenset({".safetensors", ".json", ".txt", ".jinja", ".model"})


class ArtifactError(Exception):
    """The folder is not a policy version that may be served. The text says why."""


class UnreadableError(ArtifactError):
    """The version cannot be read now, which says nothing about the version itself.

    A folder that is missing, a disk that fails, too many open files: all may pass. So may a file that is missing or
    short, since a folder that is being copied or mounted is seen in parts. What was read whole and is not as it was
    written is no such error.
    """


class ComparisonError(ArtifactError):
    """The folder that a version is compared with cannot be read. This says nothing about the version itself."""


def write_artifact(
    root: Path,
    manifest: PolicyManifest,
    write_files: Callable[[Path], object],
    on_file: Callable[[], object] = lambda: None,
) -> tuple[Path, PolicyManifest]:
    """Writes the folder root/v{version}, durable and complete, and returns it with its manifest.

    A crash leaves no root/v{version}. If `write_files` raises, its error is passed on.

    Args:
        root: the folder of all versions.
        manifest: the version's manifest, whose `files` and `weight_digest` are filled in from the files.
        write_files: writes the files into the folder that it is given.
        on_file: is called after each file that was read for its digest.

    Raises:
        ArtifactError: the version exists, a file is not allowed, or the manifest is not valid.
        OSError: the files cannot be written.
    """
    root.mkdir(parents=True, exist_ok=True)
    _remove_abandoned(root)
    target = root / f"v{manifest.version}"
    with draft_folder(root) as draft:
        write_files(draft)
        complete = PolicyManifest()
        complete.CopyFrom(manifest)
        del complete.files[:]
        for path in _list_files(draft):
            complete.files.append(_describe(draft, path))
            on_file()
        complete.weight_digest = weight_digest(complete.files)
        check_manifest(complete)
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
        UnreadableError: the manifest is missing, or cannot be read now.
        ArtifactError: the manifest is too long or not valid.
    """
    try:
        with open_plain(path, MANIFEST) as file:
            raw = file.read(_MAX_MANIFEST_BYTES + 1)
    except NotPlainError as error:
        raise ArtifactError(f"cannot use the manifest: {error}") from error
    except OSError as error:
        raise UnreadableError(f"cannot read the manifest: {error}") from error
    if len(raw) > _MAX_MANIFEST_BYTES:
        raise ArtifactError("the manifest is too long")
    try:
        manifest = json_format.Parse(raw, PolicyManifest())
    except (ValueError, json_format.ParseError, RecursionError) as error:
        raise ArtifactError(f"cannot use the manifest: {error}") from error
    check_manifest(manifest)
    return manifest


def verify_artifact(
    path: Path, shapes_like: Path | None = None, manifest: PolicyManifest | None = None
) -> PolicyManifest:
    """Checks every byte of a version against its manifest, and returns the manifest. All weights must be finite.

    Args:
        path: the version's folder.
        shapes_like: a folder whose weights have the names, shapes and types that the version's weights must have.
        manifest: what the version must be. Default: what the manifest in its folder says.

    Raises:
        UnreadableError: the version cannot be read now, or a file of it is missing or short.
        ArtifactError: the version was read, and fails a check.
        ComparisonError: `shapes_like` cannot be read.
    """
    manifest = manifest or read_manifest(path)
    try:
        _check_files(path, manifest)
        for file in weight_files(manifest.files):
            check_finite(path / file.path)
        specs = _all_specs(path, [file.path for file in weight_files(manifest.files)])
        if shapes_like is not None:
            _check_specs(specs, _specs_in(shapes_like))
    except OSError as error:
        raise UnreadableError(str(error)) from error
    except (NotPlainError, WeightsError) as error:
        raise ArtifactError(str(error)) from error
    return manifest


def weight_digest(files: Iterable[ArtifactFile]) -> str:
    """Returns the SHA-256 over "sha256  path\\n" of each .safetensors file, by path, in lower-case hexadecimal."""
    lines = [f"{file.sha256}  {file.path}\n" for file in weight_files(files)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def weight_files(files: Iterable[ArtifactFile]) -> list[ArtifactFile]:
    """Returns the .safetensors files among these, by path."""
    return sorted((file for file in files if file.path.endswith(".safetensors")), key=lambda file: file.path)


def changed_settings(manifest: PolicyManifest, reference: PolicyManifest) -> list[str]:
    """Returns the files besides the weights, such as tokenizer and configuration, that differ from the reference's.

    A swap in place exchanges only weights, so these files would take effect at the next start, unproved.
    """
    ours, theirs = (
        {(file.path, file.sha256) for file in each.files if not _is_of_weights(file.path)}
        for each in (manifest, reference)
    )
    return sorted({path for path, _ in ours ^ theirs})


def _is_of_weights(path: str) -> bool:
    return path.endswith(".safetensors") or path == INDEX_FILE


def _check_files(path: Path, manifest: PolicyManifest) -> None:
    listed = {file.path for file in manifest.files}
    found = set(list_plain(path)) - {MANIFEST}
    if len(listed) != len(manifest.files):
        raise ArtifactError("the manifest names a file twice")
    if listed - found:
        raise UnreadableError(f"missing files: {sorted(listed - found)}")
    _check_kinds(found)
    if found - listed:
        raise ArtifactError(f"files not in the manifest: {sorted(found - listed)}")
    short = [file.path for file in manifest.files if (path / file.path).lstat().st_size < file.size_bytes]
    if short:
        raise UnreadableError(f"files that are shorter than they were written: {short}")
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
    """Returns all tensors in some files of weights, which an index, if there is one, must name exactly."""
    specs: dict[str, TensorSpec] = {}
    tensors: dict[str, list[str]] = {}
    for file in files:
        found = tensor_specs(path / file)
        if specs.keys() & found.keys():
            raise ArtifactError(f"{file} has tensors that another file has too")
        specs |= found
        tensors[file] = list(found)
    if not specs:
        raise ArtifactError("no weights")
    if (path / INDEX_FILE).exists():
        check_index(read_index(path / INDEX_FILE), tensors)
    return specs


def _list_files(path: Path) -> list[str]:
    """Returns the paths of the files below a folder.

    Raises:
        ArtifactError: the folder has something that is neither a plain file nor a folder, or a file that is not
            allowed.
    """
    try:
        files = list_plain(path)
    except NotPlainError as error:
        raise ArtifactError(str(error)) from error
    _check_kinds(files)
    return files


def _check_kinds(files: Iterable[str]) -> None:
    for name in sorted(files):
        if Path(name).suffix not in _SUFFIXES:
            raise ArtifactError(f"{name} is of a kind that is not allowed; allowed are {sorted(_SUFFIXES)}")


def _describe(root: Path, path: str) -> ArtifactFile:
    with open_plain(root, path) as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return ArtifactFile(path=path, size_bytes=os.fstat(file.fileno()).st_size, sha256=digest)


def check_manifest(manifest: PolicyManifest) -> None:
    """Checks a manifest against the rules of its contract.

    Raises:
        ArtifactError: it breaks one; the text says which.
    """
    try:
        protovalidate.validate(manifest)
    except protovalidate.ValidationError as error:
        raise ArtifactError(f"the manifest is not valid: {error}") from error


@contextmanager
def draft_folder(root: Path) -> Iterator[Path]:
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
