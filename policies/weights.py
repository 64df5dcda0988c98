"""Reads safetensors files without a deep-learning library: which tensors they have, and whether all are finite."""

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

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
