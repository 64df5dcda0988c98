"""Turns a round's rollouts into what PPO learns from: log-probabilities, scores, values and advantages.

The order is that of Huang et al. 2024, "The N+ Implementation Details": a rollout ends at its end token and is scored
there, a rollout without one has a penalty, every token has a KL penalty, and GAE computes the advantages.
Shapes: see training.data.groups.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from training.config import PpoConfig
from training.data.groups import Group, PackedGroups, pack
from training.models.anatomy import Angles
from training.models.device import autocast
from training.models.parallel import ALONE, Ranks, gathered_tensor, micro_batches_in_step
from training.models.policy import completion_logprobs, completion_logprobs_and_entropy
from training.models.reward import last_features
from training.ppo import ppo_math
from training.ppo.learner import Learner
from training.ppo.rollouts import Rollout

Row = tuple[tuple[int, ...], list[Rollout]]
"""A prompt and the rollouts drawn for it."""


@dataclass(frozen=True)
class Experience:
    """Rollouts of some prompts that fit into one forward pass, and all figures computed for them."""

    packed: PackedGroups
    angles: Angles
    policy_input_GTD: Tensor
    value_input_GTD: Tensor
    old_logprobs_NC: Tensor
    old_values_NC: Tensor
    ref_logprobs_NC: Tensor
    entropy_NC: Tensor
    sampler_logprobs_NC: Tensor
    scores_N: Tensor
    held_out_scores_N: Tensor
    finished_N: Tensor
    advantages_NC: Tensor
    returns_NC: Tensor


Minibatch = list[Experience]


@dataclass(frozen=True)
class Outputs:
    """What policy and value model say of rollouts, [N, C] each, with the graph by which gradients reach weights."""

    logprobs_NC: Tensor
    values_NC: Tensor


def gather(
    learner: Learner, config: PpoConfig, rows: Sequence[Row], kl_coef: float, seed: int
) -> tuple[list[Minibatch], Outputs | None]:
    """Turns the rollouts that all ranks drew in a round into minibatches, one for each optimizer step of an epoch.

    Rows are dealt at random. Inside a minibatch they are sorted by length, divided among the ranks, and split into
    parts that fit into one forward pass. Returns this rank's part.

    The first step is taken with the weights that score here. So if the first minibatch is one part, its outputs are
    returned with their graph, and it needs no other forward pass. It comes last, so that while its activations are
    kept there is no more in memory than in a step. With gradient checkpointing there would be little to keep.
    """
    order = random.Random(seed).sample(range(len(rows)), len(rows))
    size = len(rows) // config.num_minibatches
    minibatches: list[Minibatch] = []
    outputs = None
    for start in reversed(range(0, len(rows), size)):
        dealt = [rows[index] for index in order[start : start + size]]
        lengths = [len(prompt) + sum(len(each.token_ids) for each in drawn) for prompt, drawn in dealt]
        parts = micro_batches_in_step(learner.ranks, lengths, config.micro_batch_tokens)
        learns = start == 0 and len(parts) == 1 and not config.gradient_checkpointing
        encoded = [encode(learner, config, [dealt[index] for index in part], learns=learns) for part in parts]
        minibatches.insert(0, [experience for experience, _ in encoded])
        outputs = encoded[0][1] if learns else None
    return with_advantages(minibatches, config, kl_coef, learner.ranks), outputs


@torch.no_grad()
def encode(
    learner: Learner, config: PpoConfig, rows: Sequence[Row], *, learns: bool = False
) -> tuple[Experience, Outputs]:
    """Computes log-probabilities, scores and values of rollouts. Advantages and returns are still 0.

    The outputs of policy and value model have gradients only if the policy `learns` from this pass.
    """
    shared, reward_model, held_out_model = learner.shared, learner.reward_model, learner.held_out_model
    drawn = [rollout for _, rollouts in rows for rollout in rollouts]
    packed = pack([Group(prompt, tuple(r.token_ids for r in rollouts)) for prompt, rollouts in rows])
    packed = packed.to(shared.device)
    angles = shared.angles(packed)
    # 1. The layers that all models share run once.
    encoded = shared.encode(packed, [learner.policy.first, reward_model.first, held_out_model.first])
    policy_input_GTD, value_input_GTD = encoded[learner.policy.first], encoded[learner.value.first]
    # 2. Score at the last real token, clipped; and the held-out reward model's, which does not enter the reward.
    scores_N, held_out_scores_N = (
        model.score(last_features(model.hidden(encoded[model.first], packed, angles), packed))
        for model in (reward_model, held_out_model)
    )
    # 3. Log-probabilities, computed by the trainer, under the reference and under the policy that drew the rollouts.
    with autocast(shared.device):
        reference_hidden_GTD = learner.reference(policy_input_GTD, packed, angles)
    ref_logprobs_NC = completion_logprobs(reference_hidden_GTD, shared.head, packed)
    del reference_hidden_GTD, encoded
    with torch.set_grad_enabled(learns):
        with autocast(shared.device):
            policy_hidden_GTD = learner.policy(policy_input_GTD, packed, angles)
        logprobs_NC, entropy_NC = completion_logprobs_and_entropy(policy_hidden_GTD, shared.head, packed)
        # 4. Values of the states before each token.
        values_NC = learner.value(value_input_GTD, packed, angles)
    sampled = [torch.tensor(rollout.logprobs) for rollout in drawn]
    sampler_NC = nn.utils.rnn.pad_sequence(sampled, batch_first=True).to(shared.device)
    blank_NC = torch.zeros_like(ref_logprobs_NC)
    experience = Experience(
        packed=packed, angles=angles, policy_input_GTD=policy_input_GTD, value_input_GTD=value_input_GTD,
        old_logprobs_NC=logprobs_NC.detach(), old_values_NC=values_NC.detach(),
        ref_logprobs_NC=ref_logprobs_NC, entropy_NC=entropy_NC, sampler_logprobs_NC=sampler_NC,
        scores_N=scores_N.clamp(-config.score_clip, config.score_clip), held_out_scores_N=held_out_scores_N,
        finished_N=torch.tensor([rollout.finished for rollout in drawn], device=shared.device),
        advantages_NC=blank_NC, returns_NC=blank_NC,
    )  # fmt: skip
    return experience, Outputs(logprobs_NC, values_NC)


def with_advantages(
    minibatches: list[Minibatch], config: PpoConfig, kl_coef: float, ranks: Ranks = ALONE
) -> list[Minibatch]:
    """Adds returns, and advantages whitened over the rollouts of all ranks."""
    valued = [[_value(each, config, kl_coef) for each in minibatch] for minibatch in minibatches]
    # 7. Whitening over the whole round comes last, because the returns need the advantages before it.
    own = torch.cat([each.advantages_NC[each.packed.mask_NC] for minibatch in valued for each in minibatch])
    every = gathered_tensor(ranks, own)
    mean, deviation = every.mean(), every.std(unbiased=False)
    return [
        [
            replace(each, advantages_NC=ppo_math.standardize(each.advantages_NC, each.packed.mask_NC, mean, deviation))
            for each in minibatch
        ]
        for minibatch in valued
    ]


def _value(experience: Experience, config: PpoConfig, kl_coef: float) -> Experience:
    mask_NC = experience.packed.mask_NC
    # 5. Rewards: missing-end penalty, KL penalty at each token, score at the last.
    scores_N = experience.scores_N - config.missing_eos_penalty * (~experience.finished_N).float()
    rewards_NC = ppo_math.rewards(scores_N, experience.old_logprobs_NC, experience.ref_logprobs_NC, mask_NC, kl_coef)
    # 6. GAE, and returns.
    advantages_NC = ppo_math.advantages(rewards_NC, experience.old_values_NC, mask_NC, config.gamma, config.gae_lambda)
    return replace(experience, advantages_NC=advantages_NC, returns_NC=advantages_NC + experience.old_values_NC)


def observe(minibatches: Sequence[Minibatch], ranks: Ranks = ALONE) -> dict[str, float]:
    """Returns a round's figures of the policy that drew it, by name: means over the rollouts or tokens of all ranks.

    `objective/held_out_error` is the standard error of the held-out reward model's mean score. Rollouts of a prompt are
    alike, so it is prompts that count as independent. With a single prompt it is infinite, and no guard reacts to it.
    """
    every = [each for minibatch in minibatches for each in minibatch]

    def of_all(values: Iterable[Tensor]) -> Tensor:
        return gathered_tensor(ranks, torch.cat(list(values)))

    lengths_N = of_all(each.packed.mask_NC.sum(-1).float() for each in every)
    kl_N = of_all((each.old_logprobs_NC - each.ref_logprobs_NC).sum(-1) for each in every)
    scores_N, held_out_N = of_all(each.scores_N for each in every), of_all(each.held_out_scores_N for each in every)
    gaps = sum(of_all((each.sampler_logprobs_NC - each.old_logprobs_NC).abs().sum()[None] for each in every))
    values_M = of_all(each.old_values_NC[each.packed.mask_NC] for each in every)
    returns_M = of_all(each.returns_NC[each.packed.mask_NC] for each in every)
    entropies = sum(of_all(each.entropy_NC.sum()[None] for each in every))
    tokens = lengths_N.sum()
    return {
        "objective/kl": float(kl_N.mean()),
        "objective/score": float(scores_N.mean()),
        "objective/held_out_score": float(held_out_N.mean()),
        "objective/held_out_error": _standard_error(of_all(_means_of_groups(each) for each in every)),
        "objective/entropy": float(entropies / tokens),
        "completion/length": float(lengths_N.mean()),
        "completion/eos_rate": float(of_all(each.finished_N for each in every).float().mean()),
        "rollout/sampler_gap": float(gaps / tokens),
        "val/explained_variance": ppo_math.explained_variance(values_M, returns_M),
    }


def _means_of_groups(experience: Experience) -> Tensor:
    """Returns the mean score of each prompt's rollouts by the held-out reward model, [G]."""
    return torch.stack([each.mean() for each in experience.held_out_scores_N.split(experience.packed.group_sizes)])


def _standard_error(values_G: Tensor) -> float:
    return float(values_G.std() / len(values_G) ** 0.5) if len(values_G) > 1 else math.inf
