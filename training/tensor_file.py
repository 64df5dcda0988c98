"""Writes a safetensors file, whole and durable or not at all: nothing is unpickled when it is read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Replaces the file. Raises OSError, also where the library has an error of its own for a full disk."""
    draft = path.with_suffix(path.suffix + ".tmp")
    on_cpu = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    try:
        save_file(on_cpu, draft, dict(metadata))
        with draft.open("rb") as file:
            os.fsync(file.fileno())
        draft.replace(path)
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
    finally:
        draft.unlink(missing_ok=True)
