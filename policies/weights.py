"""Reads safetensors files without a deep-learning library: which tensors they have, and whether all are finite.

A model's weights are one file, or several (shards) with an index that names the file of each tensor.
"""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
MAX_SHARD_BYTES = 5 * 10**9
"""The largest file of weights that is written; Hugging Face's save_pretrained has the same limit."""
_CHUNK = 1 << 22

# The bits of the exponent: all set in an infinity or a NaN, and in nothing else.
_EXPONENTS: Mapping[str, np.unsignedinteger[Any]] = {
    "F64": np.uint64(0x7FF0_0000_0000_0000),
    "F32": np.uint32(0x7F80_0000),
    "F16": np.uint16(0x7C00),
    "BF16": np.uint16(0x7F80),
}


class WeightsError(Exception):
    """The file is not a safetensors file, or has numbers that a policy must not have."""


@dataclass(frozen=True)
class TensorSpec:
    """The type and shape of a tensor."""

    dtype: str
    shape: tuple[int, ...]


def tensor_specs(path: Path) -> dict[str, TensorSpec]:
    """Returns each tensor's type and shape, by name, from the file's header.

    Raises:
        WeightsError: the file is not a safetensors file.
        OSError: the file cannot be read.
    """
    return {name: spec for name, (spec, _) in _read_header(path).items()}


def read_index(path: Path) -> dict[str, str]:
    """Returns the file of each tensor, by the tensor's name, from an index.

    Raises:
        WeightsError: the file cannot be read, or is no index of files beside it.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise WeightsError(f"{path.name} cannot be read: {error}") from error
    named = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(named, dict) or not named:
        raise WeightsError(f"{path.name} names no files (weight_map)")
    bad = next((name for name in named.values() if not isinstance(name, str) or Path(name).name != name), None)
    if bad is not None:
        raise WeightsError(f"{path.name} names {bad!r}, which is no file beside it")
    return named


def check_index(index: Mapping[str, str], tensors: Mapping[str, Iterable[str]]) -> None:
    """Checks that an index names exactly the tensors that there are, each with the file that it is in.

    Args:
        index: the file of each tensor.
        tensors: the names of each file's tensors.

    Raises:
        WeightsError: a file or a tensor is missing, in another file, or not in the index.
    """
    found = {name: file for file, names in tensors.items() for name in names}
    for file in sorted(set(index.values()) ^ tensors.keys()):
        raise WeightsError(f"{file} is {'not in the index' if file in tensors else 'missing, though in the index'}")
    for name in sorted(index.keys() | found.keys()):
        if index.get(name) != found.get(name):
            raise WeightsError(f"tensor {name} is in {found.get(name)}, but by the index in {index.get(name)}")


def check_finite(path: Path) -> None:
    """Checks that every number in the file is finite.

    Raises:
        WeightsError: a number is infinite or NaN, a tensor's type cannot be checked, or the file is not a safetensors
            file.
        OSError: the file cannot be read.
    """
    for name, (spec, offset) in _read_header(path).items():
        exponent = _EXPONENTS.get(spec.dtype)
        if exponent is None:
            raise WeightsError(f"{path.name}: tensor {name} is of type {spec.dtype}, which cannot be checked")
        if not math.prod(spec.shape):
            continue
        bits = np.memmap(path, dtype=exponent.dtype, mode="r", offset=offset, shape=(math.prod(spec.shape),))
        for begin in range(0, len(bits), _CHUNK):
            if np.any((bits[begin : begin + _CHUNK] & exponent) == exponent):
                raise WeightsError(f"{path.name}: tensor {name} is not finite")


def _read_header(path: Path) -> Mapping[str, tuple[TensorSpec, int]]:
    """Returns each tensor's type and shape, and where in the file its numbers begin."""
    try:
        # The library checks the header: lengths, overlaps, holes.
        with safe_open(path, framework="numpy"):
            pass
    except SafetensorError as error:
        raise WeightsError(f"{path.name}: {error}") from error
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    return {
        name: (TensorSpec(entry["dtype"], tuple(entry["shape"])), 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
    }
