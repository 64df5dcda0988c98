"""Writes a safetensors file, whole and durable or not at all; unlike a pickle, reading it runs no code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from feedback.durable import replace_file_by


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Replaces the file.

    Raises:
        OSError: such as for a full disk, for which the library has its own error.
    """
    on_cpu = {name: tensor.detach().contiguous().cpu() for name, tensor in tensors.items()}
    try:
        replace_file_by(path, lambda draft: save_file(on_cpu, draft, dict(metadata)))
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error
