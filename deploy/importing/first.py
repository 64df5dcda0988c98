"""Makes a user's model version 1, before anything serves: whole and tried on both sides, or not at all."""

from __future__ import annotations

import time
from pathlib import Path

import typer

from deploy.apart import DiedError, apart
from deploy.cli.plain import plain
from deploy.config import AligndConfig, ConfigError
from deploy.importing.files import find_files
from deploy.importing.origin import is_left, policies_here, put_aside, write_origin
from deploy.importing.trial import Tried, write_and_try
from deploy.models import ModelError
from policies.artifact import ArtifactError, write_artifact
from policies.location import version_folders
from policies.manifest import new_manifest
from policies.weights import MAX_SHARD_BYTES

_NO_TEMPLATE = (
    "it has no chat template, so it serves plain text alone (Prompt.text): a request with messages is refused until "
    "chat_template.jinja lies beside its tokenizer"
)


def import_configured(config: AligndConfig) -> bool:
    """Makes serving.initial_model version 1, unless there is a version already. Returns whether it was imported.

    Raises:
        ConfigError: the model cannot be served or trained.
        BusError: the bus does not answer, so nobody knows whether there are versions.
    """
    model = config.serving.initial_model
    if model is None:
        return False
    try:
        if version_folders(config.policies_dir).keys() - {1} or policies_here(config).policies:
            return False
        if is_left(model, config):
            return False
        import_model(model, config)
    except ModelError as error:
        raise ConfigError(f"serving.initial_model: {plain(model)}: {error}") from error
    except OSError as error:
        raise ConfigError(f"the folder of versions cannot be read: {error}") from error
    return True


def is_wanted(config: AligndConfig) -> bool:
    """Whether v1 on disk, which no log has yet, was made from serving.initial_model, or none is set.

    Raises:
        ConfigError: v1 cannot be read now.
    """
    try:
        return config.serving.initial_model is None or is_left(config.serving.initial_model, config)
    except ModelError as error:
        raise ConfigError(str(error)) from error


def import_model(folder: Path, config: AligndConfig, max_shard_bytes: int = MAX_SHARD_BYTES) -> Path:
    """Writes the model in a folder as version 1, and returns the version's folder.

    The caller knows that no log has a version 1. If there is one on disk, of another model, it is put aside.

    Raises:
        ModelError: the model cannot be served or trained. Nothing is left of it.
    """
    if not folder.is_dir():
        raise ModelError("it is a file; name its folder" if folder.exists() else "there is no such folder")
    files = find_files(folder)
    aside = put_aside(config.policies_dir)
    if aside:
        _say(f"v1 was made from another model, and was never served: it is now {aside}, and may be removed")
    began = time.monotonic()
    _say(f"importing {folder} as v1: its weights are written in bf16, and tried in vLLM and in training")
    manifest = new_manifest(1, reference_version=1)
    tried: list[Tried] = []

    def write(draft: Path) -> None:
        tried.append(apart(write_and_try, files, draft, config.policies_dir, config.serving, max_shard_bytes))
        write_origin(files, draft)
        manifest.probes.extend(tried[0].probes)

    try:
        version, _ = write_artifact(config.policies_dir, manifest, write)
    except DiedError as error:
        raise ModelError(str(error)) from error
    except (ArtifactError, OSError) as error:
        if (config.policies_dir / "v1").exists():
            # Another replica, on the same folder, was faster.
            return config.policies_dir / "v1"
        raise ModelError(f"it cannot be written as a version: {error}") from error
    _warn(folder, tried[0], config)
    _say(f"v1 is written and tried, in {time.monotonic() - began:.0f} s")
    return version


def _warn(folder: Path, tried: Tried, config: AligndConfig) -> None:
    """Says what of a model that can be served and trained will be missed."""
    if not tried.has_chat_template:
        _say(f"{folder}: {_NO_TEMPLATE}")
    if tried.template_refusal:
        _say(
            f"{folder}: its chat template refuses a plain turn of a user ({tried.template_refusal}), and so will every "
            "request with such messages be: mend the template, or serve plain text alone (Prompt.text)"
        )
    needed = config.training.ppo.max_prompt_tokens + config.training.ppo.max_tokens
    if tried.max_positions is not None and tried.max_positions < needed:
        _say(
            f"{folder}: it takes {tried.max_positions} tokens, and training is set for {needed}: lower "
            "training.ppo.max_prompt_tokens and training.ppo.max_tokens, or every run will fail"
        )


def _say(what: str) -> None:
    typer.echo(plain(what), err=True)
