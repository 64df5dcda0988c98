"""One training run, start to end: reward model, PPO, evaluation, and the new version handed to serving."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from alignd.v1 import policy_manifest_pb2
from feedback.artifact import write_artifact
from training import ppo, reward_model
from training.config import TrainingConfig
from training.dataset import Dataset, TokenizedPrompt, make_dataset
from training.errors import TrainingError
from training.evaluate import WinRate, win_rate
from training.groups import Group
from training.policy_model import (
    SharedLayers,
    UpperLayers,
    load_model,
    load_weights,
    merged_weights,
    save_policy,
    upper_layers_of,
)
from training.probes import probes_of
from training.publish import PolicyClient, artifact_folder, next_version, prompts_digest
from training.reward_model import RewardModel
from training.rollouts import Rollout, RolloutEngine
from training.run_folder import RunFolder, SamplePair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from feedback.store import Store

REWARD_MODEL_FILE = "reward_model.safetensors"
WIN_RATE = "reward_model/win_rate_over_reference"
MAX_STORED_PROMPTS = 100_000
NUM_SAMPLE_PAIRS = 20


@dataclass(frozen=True)
class Workplace:
    """What outlives a run: the configuration, the engine, and where things are read and written."""

    config: TrainingConfig
    store: Store
    engine: RolloutEngine
    client: PolicyClient
    policies_dir: Path
    tokenizer: PreTrainedTokenizerBase


@dataclass(frozen=True)
class Parents:
    """The versions that a run starts from."""

    live_version: int
    live_folder: Path
    reference_version: int
    reference_folder: Path


def find_parents(client: PolicyClient, timeout_seconds: float) -> Parents:
    """Asks serving for the live policy and for the reference policy that its lineage is measured from."""
    live = client.get("live", timeout_seconds)
    reference = client.get(f"v{live.manifest.reference_version}")
    return Parents(live.version, artifact_folder(live), reference.version, artifact_folder(reference))


def run(place: Workplace, folder: RunFolder) -> int:
    """Trains from the store's rankings and registers the result. Returns its version.

    Raises TrainingError where something is not finite or there is too little to learn from; nothing is registered then.
    """
    config = place.config
    torch.manual_seed(config.seed)
    parents = find_parents(place.client, timeout_seconds=60.0)
    shared = SharedLayers(load_model(parents.reference_folder))
    data = _read(place)
    rewards, digest = _refresh_reward_model(place, folder, shared, data)
    judged = data.held_out_prompts[: config.num_evaluation_prompts]
    place.engine.load_weights(load_weights(parents.reference_folder))
    before = _sample(place, judged, config.seed)
    _normalise(folder, rewards, shared, judged, before)
    policy = _optimise(place, folder, shared, rewards, parents, data)
    after = _sample(place, judged, config.seed + 1)
    won = _judge(place, folder, rewards, shared, judged, before, after)
    manifest = _manifest(place, folder, parents, data, digest, won)
    return _publish(place, folder, shared, policy, parents, manifest, won, judged)


def _read(place: Workplace) -> Dataset:
    config = place.config
    data = make_dataset(
        place.tokenizer,
        place.store.ranked_groups()[-config.reward_model.max_rankings :],
        place.store.prompts(MAX_STORED_PROMPTS),
        held_out_share=config.reward_model.held_out_share,
        max_prompt_tokens=config.ppo.max_prompt_tokens,
    )
    if not (data.training and data.training_prompts and data.held_out_prompts):
        raise TrainingError(
            f"too little to learn from: {len(data.training)} rankings with a comparison, "
            f"{len(data.training_prompts)} prompts to train on, {len(data.held_out_prompts)} held out"
        )
    return data


def _refresh_reward_model(
    place: Workplace, folder: RunFolder, shared: SharedLayers, data: Dataset
) -> tuple[RewardModel, str]:
    """Fits the reward model anew to all rankings, and returns it with the digest of its weights."""
    config = place.config.reward_model
    model = RewardModel(shared, config)
    reward_model.fit(
        model, shared, data.training, config,
        lambda step, num_steps, metrics: folder.log("reward_model", step, num_steps, metrics),
    )  # fmt: skip
    correct, count = reward_model.accuracy(model, shared, data.held_out, config.batch_size)
    digest = reward_model.save(model, folder.path / REWARD_MODEL_FILE)
    metrics = {"reward_model/held_out_accuracy": correct, "reward_model/held_out_comparisons": count}
    folder.log("reward_model_evaluation", 0, 1, metrics)
    return model, digest


def _sample(place: Workplace, prompts: Sequence[TokenizedPrompt], seed: int) -> list[Rollout]:
    """One completion of each prompt by what is in the engine."""
    return [rollouts[0] for rollouts in _draw(place, [prompt.token_ids for prompt in prompts], 1, seed)]


def _draw(place: Workplace, prompts: Sequence[Sequence[int]], num_completions: int, seed: int) -> list[list[Rollout]]:
    return place.engine.sample(
        prompts,
        num_completions=num_completions,
        max_tokens=place.config.ppo.max_tokens,
        seed=seed,
        eos_token_id=place.tokenizer.eos_token_id,
    )


def _groups(prompts: Sequence[TokenizedPrompt], rollouts: Sequence[Rollout]) -> list[Group]:
    return [Group(p.token_ids, (rollout.token_ids,)) for p, rollout in zip(prompts, rollouts, strict=True)]


def _normalise(
    folder: RunFolder,
    rewards: RewardModel,
    shared: SharedLayers,
    prompts: Sequence[TokenizedPrompt],
    references: Sequence[Rollout],
) -> None:
    deviation = reward_model.normalise(rewards, shared, _groups(prompts, references))
    folder.log("normalise", 0, 1, {"reward_model/reference_std": deviation})


def _optimise(
    place: Workplace, folder: RunFolder, shared: SharedLayers, rewards: RewardModel, parents: Parents, data: Dataset
) -> UpperLayers:
    """PPO, from the live policy's weights."""
    config = place.config.ppo
    policy = upper_layers_of(parents.live_folder, shared, min(config.num_frozen_layers, shared.num_layers - 1))
    place.engine.load_weights(merged_weights(shared, policy))
    ppo.train(
        ppo.make_learner(shared, policy, rewards),
        config,
        [prompt.token_ids for prompt in data.training_prompts],
        lambda prompts, seed: _draw(place, prompts, config.rollouts_per_prompt, seed),
        place.engine.load_weights,
        seed=place.config.seed,
        log=lambda step, num_steps, metrics: folder.log("ppo", step, num_steps, metrics),
    )
    return policy


def _judge(
    place: Workplace,
    folder: RunFolder,
    rewards: RewardModel,
    shared: SharedLayers,
    prompts: Sequence[TokenizedPrompt],
    before: Sequence[Rollout],
    after: Sequence[Rollout],
) -> WinRate:
    """The new policy against the reference on held-out prompts, by the reward model; writes samples of both."""
    scores, reference_scores = (
        torch.cat(reward_model.score_groups(rewards, shared, _groups(prompts, rollouts))).tolist()
        for rollouts in (after, before)
    )
    won = win_rate(scores, reference_scores)
    metrics = {WIN_RATE: won.value, "low": won.low, "high": won.high}
    folder.log("evaluate", 0, 1, metrics | {"wins": won.wins, "ties": won.ties, "losses": won.losses})
    rows = list(zip(prompts, before, after, strict=True))[:NUM_SAMPLE_PAIRS]
    folder.write_samples([SamplePair(prompt.text, _decode(place, b), _decode(place, a)) for prompt, b, a in rows])
    return won


def _decode(place: Workplace, rollout: Rollout) -> str:
    return str(place.tokenizer.decode(list(rollout.token_ids), skip_special_tokens=True))


def _manifest(
    place: Workplace, folder: RunFolder, parents: Parents, data: Dataset, digest: str, won: WinRate
) -> policy_manifest_pb2.PolicyManifest:
    """All of the manifest but what depends on the files."""
    manifest = policy_manifest_pb2.PolicyManifest(
        version=next_version(place.client, place.policies_dir),
        parent_version=parents.live_version,
        reference_version=parents.reference_version,
        training=policy_manifest_pb2.TrainingLineage(
            run_id=folder.path.name,
            algorithm="ppo",
            recipe_json=place.config.model_dump_json(),
            seed=place.config.seed,
            reward_model_digest=digest,
            rankings=data.rankings,
            num_rankings=len(data.training),
            num_prompts=len(data.training_prompts),
            prompts_digest=prompts_digest([prompt.sample_id for prompt in data.training_prompts]),
        ),
        evaluations=[
            policy_manifest_pb2.Evaluation(name=WIN_RATE, value=won.value, low=won.low, high=won.high, count=won.count)
        ],
        code_version=metadata.version("alignd"),
    )
    manifest.create_time.FromNanoseconds(time.time_ns())
    return manifest


def _publish(
    place: Workplace,
    folder: RunFolder,
    shared: SharedLayers,
    policy: UpperLayers,
    parents: Parents,
    manifest: policy_manifest_pb2.PolicyManifest,
    won: WinRate,
    probed: Sequence[TokenizedPrompt],
) -> int:
    """Writes and registers the version; asks for it to go live if its win rate lets it."""
    sequences = [prompt.token_ids for prompt in probed[: place.config.num_probes]]

    def write_files(draft: Path) -> None:
        save_policy(draft, shared, policy, parents.reference_folder)
        manifest.probes.extend(probes_of(draft, sequences))

    written, complete = write_artifact(place.policies_dir, manifest, write_files)
    reason = f"run {folder.path.name}: win rate {won.value:.0%} over the reference, by the reward model"
    place.client.register(complete, written, reason)
    promoted = place.config.promote and won.low > place.config.min_win_rate
    folder.log("register", 0, 1, {"version": manifest.version, "promoted": float(promoted)})
    if promoted:
        place.client.promote(manifest.version, parents.live_version, reason)
    return manifest.version
