"""Adds up the gradients of PPO's clipped losses over a minibatch: the part of a step that depends on rollouts.

Shapes: see training.data.groups.
"""

from __future__ import annotations

from torch import Tensor

from feedback import heartbeat
from training.config import PpoConfig
from training.models.device import autocast
from training.models.parallel import summed
from training.models.policy import completion_logprobs
from training.ppo import ppo_math
from training.ppo.experience import Experience, Minibatch, Outputs
from training.ppo.learner import Learner


def accumulate_gradients(
    learner: Learner, config: PpoConfig, minibatch: Minibatch, outputs: Outputs | None = None
) -> dict[str, float]:
    """Adds a minibatch's gradients, part by part, over all ranks, as if it were one part; returns its figures.

    `outputs` are those of the present weights, if the minibatch is one part and they are there already.
    """
    tokens = [int(each.packed.mask_NC.sum()) for each in minibatch]
    num_tokens = summed(learner.ranks, {"tokens": sum(tokens)})["tokens"]
    totals: dict[str, float] = {}
    for experience, count in zip(minibatch, tokens, strict=True):
        heartbeat.beat()
        loss, metrics = _loss(config, experience, outputs or _outputs(learner, experience))
        share = count / num_tokens
        (loss * share).backward()
        for name, value in metrics.items():
            totals[name] = totals.get(name, 0.0) + value * share
    return summed(learner.ranks, totals)


def _outputs(learner: Learner, experience: Experience) -> Outputs:
    packed = experience.packed
    with autocast(packed.mask_NC.device):
        hidden_GTD = learner.policy(experience.policy_input_GTD, packed, experience.angles)
    logprobs_NC = completion_logprobs(hidden_GTD, learner.shared.head, packed)
    return Outputs(logprobs_NC, learner.value(experience.value_input_GTD, packed, experience.angles))


def _loss(config: PpoConfig, experience: Experience, outputs: Outputs) -> tuple[Tensor, dict[str, float]]:
    """Returns the clipped policy loss plus the weighted, clipped value loss, and the figures of both."""
    mask_NC, old_NC = experience.packed.mask_NC, experience.old_logprobs_NC
    weights_NC = ppo_math.importance_weights(old_NC, experience.sampler_logprobs_NC, mask_NC, config.importance_cap)
    policy = ppo_math.policy_loss(
        outputs.logprobs_NC, old_NC, experience.advantages_NC, mask_NC, config.clip_range, weights_NC
    )
    value = ppo_math.value_loss(
        outputs.values_NC, experience.old_values_NC, experience.returns_NC, mask_NC, config.value_clip_range
    )
    log_ratio_NC = (outputs.logprobs_NC - old_NC).detach()
    return policy.value + config.value_coef * value.value, {
        "policy/loss": policy.value.item(),
        "policy/clipfrac": policy.clipped_share,
        "policy/approx_kl": float(0.5 * ppo_math.masked_mean(log_ratio_NC**2, mask_NC)),
        "val/loss": value.value.item(),
        "val/clipfrac": value.clipped_share,
    }
