"""Writes a model anew as every policy version is written: bf16 safetensors, with the tensors that training writes.

Weights of any precision, in any number of files, are loaded as transformers loads them and written under the names that
the loaded model has for them. So whatever a checkpoint has besides (an output embedding that is tied, buffers of old
releases) is left out, and what it lacks is an error instead of random numbers.
"""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from deploy.importing.files import ModelFiles, read_json
from deploy.models import ModelError
from policies.weights import INDEX_FILE, MAX_SHARD_BYTES, WEIGHTS_FILE, tensor_specs
from training.models.policy import SharedLayers, UpperLayers, merged_weights
from training.models.tensor_file import save_model_tensors
from training.models.trial import cannot_run

_DTYPE = "bfloat16"
_MOST_NAMED = 3


def write_settings(files: ModelFiles, target: Path) -> None:
    """Copies configuration, tokenizer and chat template, and makes the configuration say what is beside it."""
    for name in files.settings:
        shutil.copyfile(files.folder / name, target / name)
    config = read_json(target / "config.json")
    # Code of the model's own is never run: without this, transformers would ask on the terminal whether it may be.
    config.pop("auto_map", None)
    config.pop("torch_dtype", None)
    _write(target / "config.json", {**config, "dtype": _DTYPE})
    if (target / "tokenizer_config.json").exists():
        tokenizer = read_json(target / "tokenizer_config.json")
        tokenizer.pop("auto_map", None)
        _write(target / "tokenizer_config.json", tokenizer)
    _write_template(target)


def _write_template(target: Path) -> None:
    """Makes a template in chat_template.json, which only processors read, one that tokenizers read."""
    legacy = target / "chat_template.json"
    if not legacy.exists():
        return
    template = read_json(legacy).get("chat_template")
    if isinstance(template, str) and not (target / "chat_template.jinja").exists():
        (target / "chat_template.jinja").write_text(template, encoding="utf-8")
    legacy.unlink()


def _write(path: Path, value: dict[str, object]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_weights(files: ModelFiles, target: Path, max_shard_bytes: int = MAX_SHARD_BYTES) -> None:
    """Writes the weights in bf16 to `target`, which has the settings already.

    Pickled weights are read by torch's restricted unpickler, which runs no code of theirs.

    Raises:
        ModelError: the weights are not those of the model that config.json describes.
    """
    with tempfile.TemporaryDirectory() as folder:
        linked = Path(folder)
        _link(files, target, linked)
        model = _load(files, linked)
    weights = _as_training_writes(model)
    save_model_tensors(target, weights, max_shard_bytes)


def _as_training_writes(model: PreTrainedModel) -> dict[str, Tensor]:
    """Returns the weights in bf16, by the names and without the tied tensors that a version has that is trained.

    Raises:
        ModelError: training does not know how the model is built.
    """
    try:
        shared = SharedLayers(model)
        return merged_weights(shared, UpperLayers(model, shared.num_layers, shared.num_layers))
    except (AttributeError, NotImplementedError) as error:
        raise ModelError(str(cannot_run(model.config, error))) from error


def _link(files: ModelFiles, settings: Path, linked: Path) -> None:
    """Makes links to the model's files, and to them alone, by the names under which transformers looks for weights."""
    for path in settings.iterdir():
        (linked / path.name).symlink_to(path.absolute())
    for name in files.weights:
        (linked / name).symlink_to((files.folder / name).absolute())
    pickled_index = files.folder / "pytorch_model.bin.index.json"
    if files.pickled:
        if len(files.weights) > 1 or pickled_index.exists():
            (linked / pickled_index.name).symlink_to(pickled_index.absolute())
        return
    if len(files.weights) == 1:
        if files.weights[0] != WEIGHTS_FILE:
            (linked / files.weights[0]).rename(linked / WEIGHTS_FILE)
        return
    index = {name: file for file in files.weights for name in tensor_specs(linked / file)}
    _write(linked / INDEX_FILE, {"metadata": {}, "weight_map": index})


def _load(files: ModelFiles, linked: Path) -> PreTrainedModel:
    """Loads the model in bf16, on the host, with every weight from its files.

    Raises:
        ModelError: it cannot be loaded, or its files lack a weight, or have one that it has no place for.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            linked,
            dtype=torch.bfloat16,
            local_files_only=True,
            use_safetensors=not files.pickled,
            weights_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except Exception as error:
        # Any error: it depends on the contents of the user's files which one transformers raises.
        if "ignore_mismatched_sizes" in str(error):
            # It points to a table that it has logged, and names a setting of its own.
            raise ModelError(
                "its weights have other shapes than those that config.json describes (hidden_size, vocab_size and "
                "others): one of them is of another model"
            ) from error
        raise ModelError(f"transformers cannot load it: {_first_line(error)}") from error
    model, found = loaded
    _check_keys("its files of weights lack", found["missing_keys"])
    _check_keys(f"{type(model).__name__} has no place for", found["unexpected_keys"])
    if model.config.tie_word_embeddings and not _shares_embedding(model):
        raise ModelError(
            "config.json says that the output embedding is the token embedding, but the saved ones differ: set "
            "tie_word_embeddings to false there, or leave lm_head.weight out"
        )
    return model  # type: ignore[no-any-return]


def _check_keys(what: str, keys: Collection[str]) -> None:
    if keys:
        named = ", ".join(sorted(keys)[:_MOST_NAMED])
        raise ModelError(f"{what} {len(keys)} tensors, such as {named}: they are not those of the model in config.json")


def _shares_embedding(model: PreTrainedModel) -> bool:
    head: Any = model.get_output_embeddings()
    tokens: Any = model.get_input_embeddings()
    return head is not None and head.weight is tokens.weight


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
