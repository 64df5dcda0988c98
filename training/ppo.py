"""PPO from the live policy with KL from the reference, in the order of Huang et al., "The N+ Implementation Details".

The value model is the reward model with a head of its own that starts as the reward model's: the value of an unfinished
completion starts as its score were it to end there, and costs no second pass. Shapes: see training.groups.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from training import ppo_math
from training.config import PpoConfig
from training.errors import TrainingError
from training.groups import Group, PackedGroups, pack
from training.policy_model import SharedLayers, UpperLayers, completion_logprobs, merged_weights
from training.reward_model import RewardModel, last_features, running_features
from training.rollouts import Rollout

Log = Callable[[int, int, dict[str, float]], None]
Sample = Callable[[Sequence[Sequence[int]], int], list[list[Rollout]]]
LoadWeights = Callable[[dict[str, Tensor]], None]


@dataclass(frozen=True)
class Learner:
    """All models of a run. `policy` and `value_head_F` are trained, the others are not."""

    shared: SharedLayers
    reference: UpperLayers
    policy: UpperLayers
    reward_model: RewardModel
    value_head_F: nn.Parameter


@dataclass(frozen=True)
class Batch:
    """Rollouts of some prompts, and all that was found out about them before the update."""

    packed: PackedGroups
    angles: tuple[Tensor, Tensor]
    policy_input_GTD: Tensor
    value_input_NCF: Tensor
    old_logprobs_NC: Tensor
    old_values_NC: Tensor
    ref_logprobs_NC: Tensor
    entropy_NC: Tensor
    sampler_gap_NC: Tensor
    scores_N: Tensor
    finished_N: Tensor
    advantages_NC: Tensor
    returns_NC: Tensor


def make_learner(shared: SharedLayers, policy: UpperLayers, reward_model: RewardModel) -> Learner:
    """Puts the models together; the value head starts as the reward model's head."""
    reference = UpperLayers(shared.model, policy.first, shared.num_layers)
    head_F = nn.Parameter((reward_model.head_F * reward_model.scale).detach().clone())
    return Learner(shared, reference, policy, reward_model.requires_grad_(False), head_F)


def train(
    learner: Learner,
    config: PpoConfig,
    prompts: Sequence[tuple[int, ...]],
    sample: Sample,
    load_weights: LoadWeights,
    *,
    seed: int,
    log: Log,
) -> None:
    """Runs `num_steps` rounds; where KL passes `max_kl` it stops, and leaves the policy as the last good round had it.

    Leaves the trained weights in `learner.policy` and in the engine. Raises TrainingError if something is not finite.
    """
    optimizer = _optimizer(learner, config)
    turns = _turns(prompts, config.prompts_per_step, seed)
    good = _snapshot(learner.policy)
    for step in range(config.num_steps):
        started = time.perf_counter()
        drawn = next(turns)
        rollouts = sample(drawn, seed * 100_003 + step * 1_009)
        sampled = time.perf_counter()
        batches = _prepare(learner, config, drawn, rollouts)
        metrics = _observe(batches)
        if metrics["objective/kl"] > config.max_kl:
            learner.policy.load_state_dict(good)
            load_weights(merged_weights(learner.shared, learner.policy))
            log(step, config.num_steps, metrics | {"stopped/max_kl": config.max_kl})
            return
        good = _snapshot(learner.policy)
        prepared = time.perf_counter()
        metrics |= _update(learner, config, optimizer, batches, min(1.0, (step + 1) / (config.num_warmup_steps + 1)))
        load_weights(merged_weights(learner.shared, learner.policy))
        metrics |= {
            "seconds/rollouts": sampled - started,
            "seconds/scoring": prepared - sampled,
            "seconds/update": time.perf_counter() - prepared,
        }
        log(step, config.num_steps, metrics)


def _prepare(
    learner: Learner, config: PpoConfig, prompts: Sequence[tuple[int, ...]], rollouts: list[list[Rollout]]
) -> list[Batch]:
    """Scores rollouts and spreads the scores over tokens: one batch for each optimizer step, of rows of like length."""
    rows = sorted(
        zip(prompts, rollouts, strict=True), key=lambda row: len(row[0]) + sum(len(r.token_ids) for r in row[1])
    )
    size = len(rows) // config.num_minibatches
    batches = [_encode(learner, config, rows[start : start + size]) for start in range(0, len(rows), size)]
    return [_with_advantages(batch, config) for batch in batches]


@torch.no_grad()
def _encode(learner: Learner, config: PpoConfig, rows: Sequence[tuple[tuple[int, ...], list[Rollout]]]) -> Batch:
    groups = [Group(prompt, tuple(r.token_ids for r in rollouts)) for prompt, rollouts in rows]
    drawn = [rollout for _, rollouts in rows for rollout in rollouts]
    packed, shared, reward_model = pack(groups), learner.shared, learner.reward_model
    angles = shared.angles(packed)
    # 1. What all models share is run once.
    encoded = shared.encode(packed, [learner.policy.first, reward_model.level])
    policy_input_GTD = encoded[learner.policy.first]
    with torch.autocast("cpu", torch.bfloat16):
        # 2. Log-probabilities under the policy that drew them, by the trainer's own reckoning, and under the reference.
        policy_hidden_GTD = learner.policy(policy_input_GTD, packed, angles)
        reference_hidden_GTD = learner.reference(policy_input_GTD, packed, angles)
    logprobs_NC, entropy_NC = completion_logprobs(policy_hidden_GTD, shared.head_VD, packed)
    ref_logprobs_NC, _ = completion_logprobs(reference_hidden_GTD, shared.head_VD, packed)
    # 3. Score at the last real token, clipped; a rollout without an end is marked down.
    finished_N = torch.tensor([rollout.finished for rollout in drawn])
    reward_hidden_GTD = encoded[reward_model.level]
    scores_N = reward_model.score(last_features(reward_hidden_GTD, packed)).clamp(-config.score_clip, config.score_clip)
    # 4. Values of the states before each token.
    value_input_NCF = reward_model.standardized(running_features(reward_hidden_GTD, packed))
    sampler_NC = nn.utils.rnn.pad_sequence([torch.tensor(r.logprobs) for r in drawn], batch_first=True)
    blank_NC = torch.zeros_like(logprobs_NC)
    return Batch(
        packed=packed, angles=angles, policy_input_GTD=policy_input_GTD, value_input_NCF=value_input_NCF,
        old_logprobs_NC=logprobs_NC, old_values_NC=_values(learner, value_input_NCF),
        ref_logprobs_NC=ref_logprobs_NC, entropy_NC=entropy_NC, sampler_gap_NC=sampler_NC - logprobs_NC,
        scores_N=scores_N, finished_N=finished_N, advantages_NC=blank_NC, returns_NC=blank_NC,
    )  # fmt: skip


def _with_advantages(batch: Batch, config: PpoConfig) -> Batch:
    mask_NC = batch.packed.mask_NC
    # 5. Missing-end penalty, KL at each token, score at the last: the rewards.
    scores_N = batch.scores_N - config.missing_eos_penalty * (~batch.finished_N).float()
    rewards_NC = ppo_math.rewards(scores_N, batch.old_logprobs_NC, batch.ref_logprobs_NC, mask_NC, config.kl_coef)
    # 6. GAE, returns, and whitening of the advantages last, since the returns need them as they are.
    advantages_NC = ppo_math.advantages(rewards_NC, batch.old_values_NC, mask_NC, config.gamma, config.gae_lambda)
    returns_NC = advantages_NC + batch.old_values_NC
    return replace(batch, advantages_NC=ppo_math.whiten(advantages_NC, mask_NC), returns_NC=returns_NC)


def _update(
    learner: Learner, config: PpoConfig, optimizer: torch.optim.Optimizer, batches: Sequence[Batch], warmup: float
) -> dict[str, float]:
    """Takes one optimizer step a batch, `num_epochs` times over; returns the means of what was seen."""
    for group in optimizer.param_groups:
        group["lr"] = group["peak_lr"] * warmup
    seen: list[dict[str, float]] = []
    for _ in range(config.num_epochs):
        for batch in batches:
            loss, metrics = _loss(learner, config, batch)
            optimizer.zero_grad()
            loss.backward()
            norm = float(nn.utils.clip_grad_norm_(learner.policy.parameters(), config.max_grad_norm))
            if not (math.isfinite(loss.item()) and math.isfinite(norm)):
                raise TrainingError(f"PPO: loss {loss.item()} and gradient norm {norm} must be finite")
            optimizer.step()
            seen.append(metrics | {"policy/grad_norm": norm})
    return {name: sum(metrics[name] for metrics in seen) / len(seen) for name in seen[0]}


def _loss(learner: Learner, config: PpoConfig, batch: Batch) -> tuple[Tensor, dict[str, float]]:
    """7. Clipped policy loss and clipped value loss."""
    packed, mask_NC = batch.packed, batch.packed.mask_NC
    with torch.autocast("cpu", torch.bfloat16):
        hidden_GTD = learner.policy(batch.policy_input_GTD, packed, batch.angles)
    logprobs_NC, _ = completion_logprobs(hidden_GTD, learner.shared.head_VD, packed)
    policy = ppo_math.policy_loss(logprobs_NC, batch.old_logprobs_NC, batch.advantages_NC, mask_NC, config.clip_range)
    values_NC = _values(learner, batch.value_input_NCF)
    value = ppo_math.value_loss(values_NC, batch.old_values_NC, batch.returns_NC, mask_NC, config.value_clip_range)
    log_ratio_NC = (logprobs_NC - batch.old_logprobs_NC).detach()
    return policy.value + config.value_coef * value.value, {
        "policy/loss": policy.value.item(),
        "policy/clipfrac": policy.clipped_share,
        "policy/approx_kl": float(0.5 * ppo_math.masked_mean(log_ratio_NC**2, mask_NC)),
        "val/loss": value.value.item(),
        "val/clipfrac": value.clipped_share,
        "val/explained_variance": ppo_math.explained_variance(batch.old_values_NC, batch.returns_NC, mask_NC),
    }


def _values(learner: Learner, input_NCF: Tensor) -> Tensor:
    reward_model = learner.reward_model
    return input_NCF @ learner.value_head_F - reward_model.shift * reward_model.scale


def _observe(batches: Sequence[Batch]) -> dict[str, float]:
    """What the rollouts say of the policy that drew them, as means over completions. Raises TrainingError on NaN."""
    lengths_N = torch.cat([batch.packed.mask_NC.sum(-1).float() for batch in batches])
    kl_N = torch.cat([(batch.old_logprobs_NC - batch.ref_logprobs_NC).sum(-1) for batch in batches])
    scores_N = torch.cat([batch.scores_N for batch in batches])
    tokens = lengths_N.sum()
    metrics = {
        "objective/kl": float(kl_N.mean()),
        "objective/score": float(scores_N.mean()),
        "objective/entropy": float(sum(batch.entropy_NC.sum() for batch in batches) / tokens),
        "completion/length": float(lengths_N.mean()),
        "completion/eos_rate": float(torch.cat([batch.finished_N for batch in batches]).float().mean()),
        "rollout/sampler_gap": float(sum(batch.sampler_gap_NC.abs().sum() for batch in batches) / tokens),
    }
    broken = [name for name, value in metrics.items() if not math.isfinite(value)]
    if broken:
        raise TrainingError(f"PPO: not finite in the rollouts: {', '.join(broken)}")
    return metrics


def _optimizer(learner: Learner, config: PpoConfig) -> torch.optim.Optimizer:
    return torch.optim.AdamW(
        [
            {"params": list(learner.policy.parameters()), "peak_lr": config.learning_rate},
            {"params": [learner.value_head_F], "peak_lr": config.value_learning_rate},
        ],
        betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0, foreach=True,
    )  # fmt: skip


def _turns(prompts: Sequence[tuple[int, ...]], size: int, seed: int) -> Iterator[list[tuple[int, ...]]]:
    """Prompts for each round, all of them once in random order before any comes again."""
    drawn = random.Random(seed)
    waiting: list[tuple[int, ...]] = []
    while True:
        while len(waiting) < size:
            waiting += drawn.sample(list(prompts), len(prompts))
        yield waiting[:size]
        waiting = waiting[size:]


def _snapshot(policy: UpperLayers) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in policy.state_dict().items()}
