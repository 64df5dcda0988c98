"""Generates the Python code of the contracts into protos/gen, and lints them.

buf.validate is generated too. Its source is a copy of protovalidate's, so that a compiler of any language finds all
that the contracts import; it is held against the installed protovalidate, so that both have one version.

    python protos/generate.py            writes protos/gen
    python protos/generate.py --check    writes nothing; fails if protos/gen differs, or if buf complains
"""

import argparse
import filecmp
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from importlib import metadata
from pathlib import Path

import grpc_tools
from google.protobuf import descriptor_pb2
from grpc_tools import protoc
from protovalidate._gen.buf.validate import validate_pb

_PROTOS = Path(__file__).parent
_GENERATED = _PROTOS / "gen"
_VALIDATE = "buf/validate/validate.proto"


def _check_validate(image: Path) -> None:
    """Checks that our copy of buf.validate is that of the installed protovalidate."""
    files = descriptor_pb2.FileDescriptorSet.FromString(image.read_bytes()).file
    (ours,) = (each for each in files if each.name == _VALIDATE)
    # Where things stand in the source is in ours alone, and theirs has options that buf has added for compilers.
    theirs = descriptor_pb2.FileDescriptorProto.FromString(validate_pb.desc().proto.to_binary())
    for each in (ours, theirs):
        each.ClearField("source_code_info")
        each.ClearField("options")
    if ours != theirs:
        version = metadata.version("protovalidate")
        sys.exit(f"protos/{_VALIDATE} is not that of protovalidate {version}: copy it from its source package on PyPI")


def _run_protoc(*arguments: str) -> None:
    if protoc.main(["protoc", *arguments]) != 0:
        sys.exit("protoc failed; its messages are above")


def _generate(target: Path) -> None:
    """Writes messages, type stubs and gRPC stubs of every contract to `target`."""
    names = sorted(str(path.relative_to(_PROTOS)) for path in (_PROTOS / "alignd").rglob("*.proto"))
    with tempfile.TemporaryDirectory() as folder:
        image = Path(folder, "image.binpb")
        _run_protoc(f"-I{_PROTOS}", f"-I{Path(grpc_tools.__file__).parent / '_proto'}", "--include_imports",
                   "--include_source_info", f"--descriptor_set_out={image}", *names)  # fmt: skip
        _check_validate(image)
        _run_protoc(f"--descriptor_set_in={image}", f"--python_out={target}", f"--pyi_out={target}", _VALIDATE, *names)
        _run_protoc(f"--descriptor_set_in={image}", f"--grpc_python_out={target}",
                   *(name for name in names if name.endswith("_service.proto")))  # fmt: skip
        _lint(image)
    for package in ("alignd/v1", "buf/validate"):
        # So that type checkers read the stubs of an installed package.
        Path(target, package, "py.typed").touch()


def _lint(image: Path) -> None:
    """Checks the contracts against buf's STANDARD and COMMENTS rules."""
    buf = Path(sysconfig.get_path("scripts"), "buf")
    command = [str(buf), "lint", str(image), "--config", str(_PROTOS / "buf.yaml")]
    for path in sorted((_PROTOS / "alignd").rglob("*.proto")):
        command += ["--path", str(path.relative_to(_PROTOS))]
    if subprocess.run(command, check=False).returncode != 0:
        sys.exit("the contracts break buf's rules; its messages are above")


def _files(folder: Path) -> set[str]:
    found = (path for path in folder.rglob("*") if path.is_file() and path.suffix in {".py", ".pyi", ".typed"})
    return {str(path.relative_to(folder)) for path in found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail on a difference")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        fresh = Path(folder)
        _generate(fresh)
        if arguments.check:
            names = _files(fresh) | _files(_GENERATED)
            _, different, missing = filecmp.cmpfiles(fresh, _GENERATED, sorted(names), shallow=False)
            if different or missing:
                sys.exit(f"protos/gen is stale: run `make proto`. Differs: {', '.join(different + missing)}")
        else:
            shutil.rmtree(_GENERATED, ignore_errors=True)
            shutil.copytree(fresh, _GENERATED)


if __name__ == "__main__":
    main()
