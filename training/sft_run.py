"""One run of supervised fine-tuning, start to end: demonstrations of the store become a reference policy of its own.

What it registers starts a lineage: KL is measured from it once an operator has promoted it. It is never promoted by
itself.
"""

from __future__ import annotations

import logging
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from alignd.v1 import policy_manifest_pb2, policy_service_pb2
from feedback.artifact import MANIFEST, write_artifact
from feedback.rendering import prompt_token_ids
from training.config import TrainingConfig
from training.dataset import MAX_STORED_PROMPTS, completion_token_ids_of, split_demonstrations, text_of
from training.errors import TrainingError
from training.groups import Group
from training.policy_model import SharedLayers, load_model, load_weights, save_weights
from training.probes import probes_of
from training.publish import next_version
from training.refresh import REWARD_MODEL_FILE, current
from training.reward_model import RewardModel, load, score_groups
from training.run_folder import NUM_SAMPLE_PAIRS, RunFolder, SamplePair
from training.sft import Demonstration, Epoch, fine_tune
from training.workplace import Parents, Workplace

if TYPE_CHECKING:
    from feedback.store import StoredDemonstration

logger = logging.getLogger(__name__)

SCORE = "reward_model/mean_score_on_validation_prompts"


def run_sft(place: Workplace, folder: RunFolder, parents: Parents) -> policy_service_pb2.Policy:
    """Fine-tunes the reference policy and registers the result as a candidate; returns it.

    Raises TrainingError if there are too few demonstrations, or no reward model yet to choose the epoch by.
    """
    config = folder.config()
    learned, validating = split_demonstrations(
        place.store.demonstrations(),
        place.store.prompts(MAX_STORED_PROMPTS),
        held_out_share=config.reward_model.held_out_share,
        validation_share=config.sft.validation_share,
    )
    shared = SharedLayers(load_model(parents.reference_folder))
    rewards = _reward_model(config, shared, folder.path.parent, parents)
    asked = _validation_prompts(place, config, validating)
    prompts = sorted(asked)
    answers: list[list[tuple[int, ...]]] = []
    """Of the reference policy, and of each epoch."""

    def judge(weights: Mapping[str, Tensor]) -> float:
        place.between_rounds(folder.path.name)
        place.engine.load_weights(weights)
        drawn = place.engine.sample(
            prompts,
            num_completions=1,
            max_tokens=config.ppo.max_tokens,
            seed=config.seed,
            eos_token_id=place.tokenizer.eos_token_id,
        )
        answers.append([each[0].token_ids for each in drawn])
        groups = [Group(prompt, (answer,)) for prompt, answer in zip(prompts, answers[-1], strict=True)]
        return float(torch.cat(score_groups(rewards, shared, groups)).mean())

    def log(epoch: Epoch) -> None:
        metrics = {"sft/loss": epoch.loss, "sft/score": epoch.score}
        folder.log("sft", epoch.index, config.sft.num_epochs, metrics)
        logger.info(
            "epoch %d of %d: loss %.3f  score %.2f", epoch.index + 1, config.sft.num_epochs, epoch.loss, epoch.score
        )

    folder.log("sft_reference", 0, 1, {"sft/score": judge(load_weights(parents.reference_folder))})

    weights, epochs = fine_tune(
        parents.reference_folder,
        place.tokenizer,
        [_tokens(place, each) for each in learned],
        judge,
        config.sft,
        folder.state / "trl",
        seed=config.seed,
        log=log,
    )
    best = max((epoch for epoch in epochs if math.isfinite(epoch.loss)), key=lambda epoch: epoch.score)
    folder.write_samples(
        [
            SamplePair(asked[prompt], _decode(place, before), _decode(place, after))
            for prompt, before, after in zip(prompts, answers[0], answers[best.index + 1], strict=True)
        ][:NUM_SAMPLE_PAIRS]
    )
    return _register(place, folder, parents, weights, best.score, prompts)


def _validation_prompts(
    place: Workplace, config: TrainingConfig, validating: Sequence[StoredDemonstration]
) -> dict[tuple[int, ...], str]:
    """In tokens, and as text. Those that the engine has no room for are left out."""
    asked = {_prompt(place, each): text_of(each.prompt) for each in validating}
    short = {tokens: text for tokens, text in asked.items() if len(tokens) <= config.ppo.max_prompt_tokens}
    if not short:
        raise TrainingError(
            "SFT: of the users that sft.validation_share holds out there is no demonstration for a prompt of theirs of "
            f"at most ppo.max_prompt_tokens = {config.ppo.max_prompt_tokens}"
        )
    return short


def _reward_model(config: TrainingConfig, shared: SharedLayers, runs_dir: Path, parents: Parents) -> RewardModel:
    rewards, fitted = RewardModel(shared, config.reward_model), current(runs_dir)
    digest = parents.reference.manifest.weight_digest
    if fitted is None or not load(rewards, runs_dir / fitted.run_id / REWARD_MODEL_FILE, digest):
        raise TrainingError(
            "SFT chooses its epoch by the reward model, and there is none for this reference policy yet: "
            "it comes with the first run of `alignd train`"
        )
    return rewards


def _prompt(place: Workplace, each: StoredDemonstration) -> tuple[int, ...]:
    return tuple(prompt_token_ids(place.tokenizer, each.prompt))


def _decode(place: Workplace, token_ids: tuple[int, ...]) -> str:
    return str(place.tokenizer.decode(list(token_ids), skip_special_tokens=True))


def _tokens(place: Workplace, each: StoredDemonstration) -> Demonstration:
    # A demonstration is whole: it has its end.
    return Demonstration(_prompt(place, each), completion_token_ids_of(place.tokenizer, each.text, ended=True))


def _register(
    place: Workplace,
    folder: RunFolder,
    parents: Parents,
    weights: dict[str, Tensor],
    score: float,
    prompts: Sequence[tuple[int, ...]],
) -> policy_service_pb2.Policy:
    config = folder.config()
    version = next_version(place.client, place.policies_dir)
    manifest = policy_manifest_pb2.PolicyManifest(
        version=version,
        parent_version=parents.reference.version,
        reference_version=version,
        training=policy_manifest_pb2.TrainingLineage(
            run_id=folder.path.name, algorithm="sft", recipe_json=config.model_dump_json(), seed=config.seed
        ),
        evaluations=[policy_manifest_pb2.Evaluation(name=SCORE, value=score, count=len(prompts))],
        code_version=metadata.version("alignd"),
    )
    manifest.create_time.FromNanoseconds(time.time_ns())

    def write_files(draft: Path) -> None:
        save_weights(draft, weights, parents.reference_folder)
        manifest.probes.extend(probes_of(draft, prompts, config.num_probes))

    written, complete = write_artifact(place.policies_dir, manifest, write_files)
    shutil.copyfile(written / MANIFEST, folder.path / MANIFEST)
    reason = f"run {folder.path.name}: SFT, score {score:.2f} by the reward model"
    registered = place.client.register(complete, written, reason)
    folder.log("register", 0, 1, {"version": version, "promoted": 0.0})
    return registered
