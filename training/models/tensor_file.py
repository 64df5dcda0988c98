"""Reads and writes safetensors files, which are whole and durable or absent; reading them runs no code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from feedback import heartbeat
from feedback.durable import replace_file_by, write_json
from policies.weights import INDEX_FILE, MAX_SHARD_BYTES, WEIGHTS_FILE, read_index

_METADATA = {"format": "pt"}


def load_tensors(path: Path) -> dict[str, Tensor]:
    """Returns the tensors of a file, on the CPU."""
    with safe_open(path, framework="pt") as file:
        return {name: file.get_tensor(name) for name in heartbeat.each(file.offset_keys())}


def load_weights(path: Path) -> dict[str, Tensor]:
    """Loads what `save_model_tensors` has written: what the index names, else model.safetensors, else all files.

    A version or a checkpoint of an earlier release may hold other files of weights besides, or by other names.
    """
    if (path / INDEX_FILE).exists():
        files = sorted({path / name for name in read_index(path / INDEX_FILE).values()})
    elif (path / WEIGHTS_FILE).exists():
        files = [path / WEIGHTS_FILE]
    else:
        files = sorted(path.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_tensors(file).items()}


def save_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Replaces the file.

    Raises:
        OSError: such as for a full disk, for which the library has its own error.
    """
    on_cpu = {name: tensor.detach().contiguous().cpu() for name, tensor in heartbeat.each(tensors.items())}
    try:
        replace_file_by(path, lambda draft: save_file(on_cpu, draft, dict(metadata)))
    except SafetensorError as error:
        raise OSError(f"{path}: {error}") from error


def save_model_tensors(folder: Path, tensors: Mapping[str, Tensor], max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Writes a model's weights: one file, or several and an index where they are larger than `max_shard_bytes`.

    Raises:
        OSError: the files cannot be written.
    """
    shards: list[dict[str, Tensor]] = [{}]
    filled = 0
    for name, tensor in sorted(tensors.items()):
        if shards[-1] and filled + tensor.nbytes > max_shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
    if len(shards) == 1:
        save_tensors(folder / WEIGHTS_FILE, shards[0], _METADATA)
        return
    stem = WEIGHTS_FILE.removesuffix(".safetensors")
    index: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file = f"{stem}-{number:05}-of-{len(shards):05}.safetensors"
        save_tensors(folder / file, shard, _METADATA)
        index |= dict.fromkeys(shard, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / INDEX_FILE, {"metadata": {"total_size": size}, "weight_map": index})
