"""Tries a model on both sides before it becomes version 1: what vLLM takes, what training computes, and what it writes.

It runs in a process of its own (deploy.apart): what the model takes of memory is given back, and a crash
there is an error in words.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2

from alignd.v1 import types_pb2
from alignd.v1.policy_manifest_pb2 import Probe
from deploy.importing.files import ModelFiles
from deploy.models import ModelError
from policies.artifact import ArtifactError, draft_folder, verify_artifact, write_artifact
from policies.encoding import EncodingError
from policies.end_tokens import EndTokenError, end_tokens
from policies.manifest import new_manifest
from policies.rendering import prompt_token_ids
from policies.weights import WeightsError, check_finite
from serving.config import ServingConfig
from serving.context_length import max_positions
from serving.vllm_engine import EngineError
from serving.vllm_trial import try_model

# What probes are made of: enough tokens for a mean, and text as users write it.
_PROBED = (
    "How can I sleep better at night? Go to bed at the same time every day, and keep the room dark and cool.",
    "The capital of France is Paris, which lies on the Seine; that of Italy is Rome, and that of Spain is Madrid.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "Water boils at 100 °C at sea level, and at about 90 °C on a mountain of 3,000 m.",
)


@dataclass(frozen=True)
class Tried:
    """What a trial has found out about a model that can be served and trained."""

    probes: tuple[Probe, ...]
    has_chat_template: bool
    template_refusal: str
    """Why its chat template refuses what every application sends; empty if it does not, or if there is none."""
    max_positions: int | None
    """The most tokens that the model takes, if its configuration says."""


def write_and_try(files: ModelFiles, draft: Path, root: Path, serving: ServingConfig, max_shard_bytes: int) -> Tried:
    """Writes a model to `draft` as a version is written, and tries it there: in vLLM first, which is soon said.

    Args:
        files: the model.
        draft: an empty folder.
        root: the folder of all versions, in which there must be room for a second copy for a while.
        serving: settings of the engine.
        max_shard_bytes: the largest file of weights.

    Raises:
        ModelError: it cannot be served or trained; the message says why.
    """
    from deploy.importing.normalise import write_settings

    with _said_of_the_disk(root):
        write_settings(files, draft)
    try:
        try_model(draft, serving)
    except EngineError as error:
        raise ModelError(str(error)) from error
    return write_and_train(files, draft, root, max_shard_bytes)


def write_and_train(files: ModelFiles, draft: Path, root: Path, max_shard_bytes: int) -> Tried:
    """Does the same without vLLM.

    Raises:
        ModelError: it cannot be trained; the message says why.
    """
    from deploy.importing.normalise import write_settings, write_weights

    with _said_of_the_disk(root):
        write_settings(files, draft)
        write_weights(files, draft, max_shard_bytes)
    tokenizer = _check_training(draft, root, max_shard_bytes)
    return Tried(
        _probes(draft, tokenizer), bool(tokenizer.chat_template), _template_refusal(tokenizer), max_positions(draft)
    )


@contextmanager
def _said_of_the_disk(root: Path) -> Iterator[None]:
    """Raises ModelError in place of an error of the disk, such as that it is full."""
    try:
        yield
    except OSError as error:
        free = shutil.disk_usage(root).free / (1 << 20)
        raise ModelError(
            f"it cannot be written as a version: {error}. In {root} {free:,.0f} MiB are free, and for a while its "
            "weights lie there twice, in bf16"
        ) from error


def _template_refusal(tokenizer: Any) -> str:
    if not tokenizer.chat_template:
        return ""
    turn = types_pb2.Message(role=types_pb2.ROLE_USER, content="Hello!")
    try:
        prompt_token_ids(tokenizer, types_pb2.Prompt(chat=types_pb2.Chat(messages=[turn])))
    except jinja2.TemplateError as error:
        return str(error)
    return ""


def _check_training(draft: Path, root: Path, max_shard_bytes: int) -> Any:
    """Checks that training computes the model as the model itself does, and writes versions that can take its place.

    Returns its tokenizer.

    Raises:
        ModelError: it does not.
    """
    from training.errors import TrainingError
    from training.models.policy import load_model
    from training.models.trial import check_forward

    try:
        for file in draft.glob("*.safetensors"):
            check_finite(file)
    except WeightsError as error:
        raise ModelError(f"its weights are damaged, or overflow bf16: {error}") from error
    try:
        check_forward(draft)
    except TrainingError as error:
        raise ModelError(str(error)) from error
    tokenizer = _check_tokens(draft)
    with draft_folder(root) as trial:
        try:
            with _said_of_the_disk(root):
                version = _write_trained(draft, trial, max_shard_bytes)
            verify_artifact(version, shapes_like=draft)
        except ArtifactError as error:
            raise ModelError(f"a version that is trained from it could not take its place: {error}") from error
        load_model(version)
    return tokenizer


def _write_trained(draft: Path, root: Path, max_shard_bytes: int) -> Path:
    """Writes a version as training would, with the last layer in the place of the trained ones; returns its folder."""
    from training.models.policy import SharedLayers, UpperLayers, load_model, save_policy

    shared = SharedLayers(load_model(draft))
    upper = UpperLayers(shared.model, shared.num_layers - 1, shared.num_layers)
    manifest = new_manifest(2, parent_version=1, reference_version=1)
    version, _ = write_artifact(
        root, manifest, lambda folder: save_policy(folder, shared, upper, draft, max_shard_bytes)
    )
    return version


def _check_tokens(draft: Path) -> Any:
    """Checks that every token has an embedding, and that there is a token that ends a completion.

    Returns the tokenizer.

    Raises:
        ModelError: one has none, or there is none.
    """
    from transformers import AutoTokenizer

    from training.models.policy import load_model

    model: Any = load_model(draft)
    tokenizer = AutoTokenizer.from_pretrained(draft, local_files_only=True)
    rows = min(len(each.weight) for each in (model.get_input_embeddings(), model.get_output_embeddings()))
    vocabulary = tokenizer.get_vocab()
    beyond = sorted((token_id, token) for token, token_id in vocabulary.items() if token_id >= rows)
    if beyond:
        token_id, token = beyond[0]
        raise ModelError(
            f"its tokenizer has {len(beyond)} tokens without an embedding, such as {token!r} ({token_id}; the model "
            f"has {rows}): resize the model's embedding (resize_token_embeddings), or remove the tokens"
        )
    try:
        end_tokens(tokenizer)
    except (EndTokenError, EncodingError) as error:
        raise ModelError(str(error)) from error
    return tokenizer


def _probes(draft: Path, tokenizer: Any) -> tuple[Probe, ...]:
    """Returns probes with the trainer's log-probabilities, by which a server proves that it serves this model."""
    from training.handover.probes import probes_of

    sequences: Sequence[list[int]] = [prompt_token_ids(tokenizer, types_pb2.Prompt(text=text)) for text in _PROBED]
    return tuple(probes_of(draft, sequences, len(sequences)))
