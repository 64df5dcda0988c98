"""Holds what serving and training will need against the memory and the disk that there are, before anything starts.

Where the recipe can compute the same with less memory, it is fitted (training.planning.fit). Otherwise the command ends
with what is missing and which settings to lower. Without this the kernel would kill whichever process asks last.
"""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from deploy.config import PREFIX, AligndConfig, ConfigError
from policies.host_memory import HostMemory, host_memory
from serving.context_length import DEFAULT_MAX_MODEL_LEN

if TYPE_CHECKING:
    from training.planning.memory import Memory
    from training.planning.model_size import ModelSize

logger = logging.getLogger(__name__)

_GIB = 1 << 30
_MIB = 1 << 20
# What processes hold besides what is planned, mostly the libraries themselves, as `make bench BENCH=memory` measured it
# with the tiny model: the server, its engine, the trainer, and all others, most of which are the users of the demo.
_SERVER, _ENGINE, _TRAINER, _OTHERS = 450 * _MIB, 480 * _MIB, 700 * _MIB, 670 * _MIB
# What is freed is not all given back: after an engine has loaded its weights, and while a run computes.
_KEPT_OF_WEIGHTS, _KEPT_OF_RUN = 0.45, 0.1
# A plan may be this much too small before the kernel kills a process.
_SPARE_SHARE = 0.1
_NUM_NAMED_FIELDS = 3
# vLLM warms up with this many tokens, and keeps the memory.
_BATCHED_TOKENS = 4096
_BF16 = 2
_NAMES = {"serve": "serving", "train": "training", "sft": "fine-tuning"}


@dataclass(frozen=True)
class Need:
    """What a machine must have, in bytes, for some of alignd's processes, and the settings that would lower it."""

    memory: float
    disk: float
    fields: tuple[str, ...]
    settings: Mapping[str, object]
    """Settings under `training.ppo` that were changed to save memory."""
    changes: tuple[str, ...]
    """The same, in words."""


def fitted_settings(config: AligndConfig, verbs: Collection[str]) -> dict[str, str]:
    """Returns the variables that make the recipe fit this machine, where these processes are to run on it together.

    Raises:
        ConfigError: they do not fit; the message says what there is and what to lower.
    """
    from deploy.cli.train_plan import find_model

    found = find_model(config)
    need = _need(config, found.folder, verbs) if found and _NAMES.keys() & set(verbs) else None
    if need is None:
        return {}
    memory = host_memory()
    check(need, memory, shutil.disk_usage(config.data_dir).free, verbs)
    for change in need.changes:
        logger.warning("to fit into the memory here, %s", change)
    if need.memory > memory.free:
        logger.warning(
            "%.1f GiB of memory will be needed, and %.1f GiB are free now; end what is not needed, or lower %s",
            need.memory / _GIB, memory.free / _GIB, ", ".join(need.fields),
        )  # fmt: skip
    return {f"{PREFIX}TRAINING__PPO__{name.upper()}": json.dumps(value) for name, value in need.settings.items()}


def check(need: Need, memory: HostMemory, free_disk: float, verbs: Collection[str]) -> None:
    """Checks that a need is met.

    Raises:
        ConfigError: it is not; the message says what there is and what to lower.
    """
    what = " and ".join(name for verb, name in _NAMES.items() if verb in verbs)
    if need.memory > memory.limit:
        alone = "; `alignd up --without train` serves alone" if {"serve", "train"} <= set(verbs) else ""
        raise ConfigError(
            f"memory: {what} will need {need.memory / _GIB:.1f} GiB, and {memory.limited_by} is "
            f"{memory.limit / _GIB:.1f} GiB; settings that would help most: {', '.join(need.fields)}{alone}; "
            "`alignd train --dry-run` shows what training takes"
        )
    if need.disk > free_disk:
        lacks = (
            f"data_dir: {what} will write {need.disk / _GIB:.1f} GiB to begin with, and {free_disk / _GIB:.1f} GiB are "
            "free there; free some, or name another folder"
        )
        if "serve" in verbs:
            raise ConfigError(lacks)
        # A run may have written a part of it already, and waits where a disk is full.
        logger.warning("%s", lacks)


def _need(config: AligndConfig, folder: Path, verbs: Collection[str]) -> Need | None:
    """Returns what these processes need of the host; None where it cannot be planned."""
    from policies.precision import compute_dtype
    from training.models.device import training_device
    from training.planning.fit import fit
    from training.planning.memory import plan_memory
    from training.planning.model_size import UnknownModelError, read_model
    from training.planning.sft import plan_sft_memory, sft_disk_bytes
    from training.planning.workload import assume

    try:
        model = read_model(folder)
    except UnknownModelError:
        return None
    device, ranks = training_device(), config.training.num_processes
    if device.type != "cpu":
        return _beside_gpus(config, model, verbs)
    number, free = compute_dtype(device).itemsize, host_memory().free
    others = _OTHERS + (_serving_bytes(config, model, number) if "serve" in verbs else 0.0)
    if "sft" in verbs:
        memory = plan_sft_memory(config.training, model, number)
        needed = _with_spare(others + _TRAINER + (1 + _KEPT_OF_RUN) * memory.peak)
        return Need(needed, sft_disk_bytes(model), _fields(memory, verbs), {}, ())
    if "train" not in verbs:
        return Need(others, float(_BF16 * model.total), ("serving.kv_cache_mib",), {}, ())
    room = ((free * (1 - _SPARE_SHARE) - others) / ranks - _TRAINER) / (1 + _KEPT_OF_RUN)
    fitted = fit(config.training, model, number, room)
    memory = plan_memory(assume(fitted.config, model, number_bytes=number), ranks)
    return Need(
        memory=_with_spare(others + ranks * (_TRAINER + (1 + _KEPT_OF_RUN) * fitted.peak)),
        disk=_disk_bytes(model, memory),
        fields=_fields(memory, verbs),
        settings=fitted.settings,
        changes=fitted.changes,
    )


def _beside_gpus(config: AligndConfig, model: ModelSize, verbs: Collection[str]) -> Need:
    """Returns what processes need of the host where models are on GPUs: each loads the model there first.

    The first rank also gathers a checkpoint there. Fine-tuning's goes to disk from the GPU.
    """
    from training.planning.memory import plan_memory
    from training.planning.workload import assume

    ranks, loaded = config.training.num_processes, float(_BF16 * model.total)
    memory = plan_memory(assume(config.training, model))
    need, disk = float(_OTHERS), loaded
    if "serve" in verbs:
        need += _SERVER + _ENGINE + loaded
    if "train" in verbs:
        need += ranks * (_TRAINER + loaded) + _checkpoint_bytes(memory)
        disk = _disk_bytes(model, memory)
    if "sft" in verbs:
        need += _TRAINER + 2 * loaded  # TRL loads it in fp32.
    return Need(_with_spare(need), disk, ("training.ppo.num_frozen_layers", "training.ppo.lora.rank"), {}, ())


def _with_spare(needed: float) -> float:
    return needed / (1 - _SPARE_SHARE)


def _serving_bytes(config: AligndConfig, model: ModelSize, number: int) -> float:
    """Returns what the server and its engine hold: libraries, weights, cache, and one batch's activations."""
    tokens = max(_BATCHED_TOKENS, config.serving.max_model_len or DEFAULT_MAX_MODEL_LEN)
    batch = tokens * number * (6 * model.hidden + 4 * model.intermediate)
    logits = 2 * 4 * config.serving.max_inflight_completions * model.vocabulary
    weights = (1 + _KEPT_OF_WEIGHTS) * number * model.total
    return _SERVER + _ENGINE + weights + (config.serving.kv_cache_mib << 20) + batch + logits


def _disk_bytes(model: ModelSize, memory: Memory) -> float:
    """Returns what a first run writes: two versions, and the checkpoint beside the one that it replaces."""
    return 2 * _BF16 * model.total + 2 * _checkpoint_bytes(memory)


def _checkpoint_bytes(memory: Memory) -> float:
    kept = ("policy: trained", "policy: Adam", "policy: last good", "policy: average", "value model:")
    return sum(part.bytes for part in memory.parts if part.name.startswith(kept))


def _fields(memory: Memory, verbs: Collection[str]) -> tuple[str, ...]:
    found = dict.fromkeys(part.field for part in memory.at(memory.fullest) if part.field)
    named = [f"training.{each}" for field in list(found)[:_NUM_NAMED_FIELDS] for each in field.split(" or ")]
    return tuple(dict.fromkeys([*named, *(["serving.kv_cache_mib"] if "serve" in verbs else [])]))
