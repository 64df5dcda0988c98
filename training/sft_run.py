"""One run of supervised fine-tuning, start to end: from the store's demonstrations to a new reference policy.

The version that it registers starts a lineage: once an operator has promoted it, KL is measured from it. The trainer
never promotes it. A run that was killed resumes after its last whole epoch, with the demonstrations that it began with.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from pydantic import TypeAdapter
from torch import Tensor

from alignd.v1 import policy_service_pb2
from alignd.v1.policy_manifest_pb2 import Evaluation, PolicyManifest, TrainingLineage
from feedback.durable import replace_file
from policies.location import artifact_folder
from policies.manifest import new_manifest
from training.config import TrainingConfig
from training.context import TrainerContext, find_parents
from training.data.census import figures, sentences, write_census
from training.data.demonstrations import Asked, Chosen, Demonstration, choose
from training.data.groups import Group
from training.errors import TrainingError
from training.handover.version import hand_over, is_made, next_version, write_files
from training.models.policy import SharedLayers, load_model
from training.models.reward import RewardModel, load, score_groups
from training.models.tensor_file import load_weights
from training.phases.runner import Phase, perform
from training.ppo.rollouts import Request
from training.rewards.refresh import REWARD_MODEL_FILE, current
from training.runs.folder import NUM_SHOWN, RunFolder, SamplePair
from training.runs.policy_client import START_SECONDS
from training.sft import Epoch, Scorer, best_of, fine_tune

logger = logging.getLogger(__name__)

SCORE = "reward_model/mean_score_on_validation_prompts"
_BEGINNING = "beginning.json"
_NO_REWARDS = (
    "SFT chooses its epoch by the reward model, and there is none for this reference policy yet: "
    "the first run of `alignd train` makes it"
)


@dataclass(frozen=True)
class _Beginning:
    """What a run works with from start to end. It has users' text, and is kept in `state/` until the run has ended."""

    reference_version: int
    reward_run_id: str
    """The run that fitted the reward model."""
    demonstrations: list[Demonstration]
    asked: Asked
    """The validation prompts."""


@dataclass(frozen=True)
class _Tuned:
    """What fine-tuning made, from which policy."""

    reference: policy_service_pb2.Policy
    weights: dict[str, Tensor]
    score: float
    """Of the epoch that was kept, by the reward model."""


_FORM = TypeAdapter(_Beginning)


def run_sft(context: TrainerContext, folder: RunFolder) -> policy_service_pb2.Policy:
    """Fine-tunes the reference policy, or resumes that, and registers the result as a candidate; returns the candidate.

    Raises:
        TrainingError: there are too few demonstrations, or there is no reward model yet to choose the epoch by.
    """
    run_id = folder.path.name
    if not perform(context, run_id, Phase("look for its version", lambda: is_made(context, run_id))):
        beginning = perform(
            context,
            run_id,
            Phase("beginning", lambda: _begin(context, folder), load=lambda: _load_beginning(folder)),
        )
        tuned = perform(context, run_id, Phase("fine-tuning", lambda: _fine_tune(context, folder, beginning)))
        perform(context, run_id, Phase("version", lambda: _write(context, folder, beginning, tuned)))
    registered = perform(context, run_id, Phase("registration", lambda: hand_over(context, folder, _reason_of)))
    folder.rewind("register", 0)
    folder.log("register", 0, 1, {"version": registered.version, "promoted": 0.0})
    return registered


def _reason_of(manifest: PolicyManifest) -> str:
    (score,) = manifest.evaluations
    return f"SFT, score {score.value:.2f} by the reward model"


def _fine_tune(context: TrainerContext, folder: RunFolder, beginning: _Beginning) -> _Tuned:
    """Fine-tunes, or resumes that after its last whole epoch, and writes samples of before and after."""
    config, checkpoints = folder.config(), folder.state / "trl"
    reference = context.client.get(f"v{beginning.reference_version}", START_SECONDS)
    base = artifact_folder(reference.artifact_uri)
    score_of = _scorer(context, folder, beginning, reference)
    if not any(checkpoints.glob("*")):
        folder.rewind("sft_reference", 0)
        folder.log("sft_reference", 0, 1, {"sft/score": score_of(load_weights(base))})

    def log(epoch: Epoch) -> None:
        folder.rewind("sft", epoch.index)
        metrics = {"sft/loss": epoch.loss, "sft/score": epoch.score}
        folder.log("sft", epoch.index, config.sft.num_epochs, metrics)
        logger.info(
            "epoch %d of %d: loss %.3f  score %.2f", epoch.index + 1, config.sft.num_epochs, epoch.loss, epoch.score
        )

    weights, epochs = fine_tune(
        base,
        context.tokenizer,
        beginning.demonstrations,
        score_of,
        config.sft,
        checkpoints,
        seed=config.seed,
        log=log,
    )
    best = best_of(epochs)
    assert best, "fine_tune raises where there is none"
    _write_samples(context, folder, beginning, load_weights(base), weights)
    return _Tuned(reference, weights, best.score)


def _begin(context: TrainerContext, folder: RunFolder) -> _Beginning:
    """Chooses what the run works with, and keeps it."""
    config, fitted = folder.config(), current(folder.path.parent)
    if fitted is None:
        raise TrainingError(_NO_REWARDS)
    chosen = _choose(context, config)
    folder.rewind("data", 0)
    write_census(folder, [chosen.census])
    if not chosen.asked:
        raise TrainingError(
            "SFT: the users that sft.validation_share holds out have demonstrated no prompt of their own with at most "
            f"ppo.max_prompt_tokens = {config.ppo.max_prompt_tokens} tokens. Of what was read: "
            + "; ".join(sentences(figures([chosen.census])))
        )
    beginning = _Beginning(
        find_parents(context.client, START_SECONDS).reference.version, fitted.run_id, chosen.learned, chosen.asked
    )
    replace_file(folder.state / _BEGINNING, _FORM.dump_json(beginning).decode())
    return beginning


def _choose(context: TrainerContext, config: TrainingConfig) -> Chosen:
    tally = context.store.tally_demonstrations()
    chosen = choose(
        context.tokenizer, context.store.demonstrations(),
        held_out_share=config.reward_model.held_out_share,
        validation_share=config.sft.validation_share,
        max_tokens=config.sft.max_tokens,
        max_prompt_tokens=config.ppo.max_prompt_tokens,
    )  # fmt: skip
    whole = chosen.census.with_unread(no_sample=tally.no_sample, superseded=tally.superseded)
    return replace(chosen, census=whole)


def _load_beginning(folder: RunFolder) -> _Beginning | None:
    """Reads back what `_begin` kept; None if it has not come so far."""
    kept = folder.state / _BEGINNING
    return _FORM.validate_json(kept.read_bytes()) if kept.exists() else None


def _scorer(
    context: TrainerContext, folder: RunFolder, beginning: _Beginning, reference: policy_service_pb2.Policy
) -> Scorer:
    """Returns what scores weights by their answers to the validation prompts."""
    config, runs_dir = folder.config(), folder.path.parent
    shared = SharedLayers(load_model(artifact_folder(reference.artifact_uri)))
    rewards = RewardModel(shared, config.reward_model)
    if not load(rewards, runs_dir / beginning.reward_run_id / REWARD_MODEL_FILE, reference.manifest.weight_digest):
        raise TrainingError(_NO_REWARDS)

    def score_of(weights: Mapping[str, Tensor]) -> float:
        context.between_rounds(folder.path.name)
        answers = _answers(context, config, beginning.asked, weights)
        groups = [Group(prompt, (answer,)) for (prompt, _), answer in zip(beginning.asked, answers, strict=True)]
        return float(torch.cat(score_groups(rewards, groups)).mean())

    return score_of


def _answers(
    context: TrainerContext, config: TrainingConfig, asked: Asked, weights: Mapping[str, Tensor]
) -> list[tuple[int, ...]]:
    """Returns the answers of a policy of these weights to these prompts, the same each time."""
    prompts = [tokens for tokens, _ in asked]
    drawn = context.draw(Request(weights.items(), prompts, 1, config.ppo.max_tokens, config.seed))
    return [each[0].token_ids for each in drawn]


def _write_samples(
    context: TrainerContext,
    folder: RunFolder,
    beginning: _Beginning,
    before: Mapping[str, Tensor],
    after: Mapping[str, Tensor],
) -> None:
    """Writes how policies of these weights answer the first few validation prompts."""
    shown = beginning.asked[:NUM_SHOWN]
    old, new = (_answers(context, folder.config(), shown, weights) for weights in (before, after))
    folder.write_samples(
        [
            SamplePair(text, _decode(context, one), _decode(context, other))
            for (_, text), one, other in zip(shown, old, new, strict=True)
        ]
    )


def _decode(context: TrainerContext, token_ids: tuple[int, ...]) -> str:
    return str(context.tokenizer.decode(list(token_ids), skip_special_tokens=True))


def _write(context: TrainerContext, folder: RunFolder, beginning: _Beginning, tuned: _Tuned) -> Path:
    """Writes the version, and returns its folder."""
    config, version = folder.config(), next_version(context)
    prompts = [tokens for tokens, _ in beginning.asked]
    manifest = new_manifest(
        version,
        parent_version=tuned.reference.version,
        # It starts its own lineage.
        reference_version=version,
        training=TrainingLineage(
            run_id=folder.path.name, algorithm="sft", recipe_json=config.model_dump_json(), seed=config.seed
        ),
        evaluations=[Evaluation(name=SCORE, value=tuned.score, count=len(prompts))],
    )
    settings_from = artifact_folder(tuned.reference.artifact_uri)
    return write_files(context, manifest, tuned.weights, settings_from, prompts, config.num_probes)
