"""PPO's arithmetic in pure functions: rewards, advantages and losses, in the order in which a round uses them.

Shapes: N completions, C tokens of the longest. `mask_NC` is true on real tokens, and each row has at least one; values
beyond a completion's end have no influence on any result. The functions follow Schulman et al. 2017 (PPO), Schulman et
al. 2016 (GAE) and InstructGPT, equation 2.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Loss:
    """A loss to minimise, and the share of tokens at which clipping changed it."""

    value: Tensor
    clipped_share: float


def masked_mean(values_NC: Tensor, mask_NC: Tensor) -> Tensor:
    """Returns the mean over the real tokens."""
    return torch.where(mask_NC, values_NC, 0.0).sum() / mask_NC.sum()


def standardize(values_NC: Tensor, mask_NC: Tensor, mean: Tensor, deviation: Tensor) -> Tensor:
    """Subtracts the mean and divides by the standard deviation on real tokens; 0 beyond them."""
    return torch.where(mask_NC, (values_NC - mean) / (deviation + 1e-8), 0.0)


def adapted_kl_coef(kl_coef: float, kl: float, target_kl: float, num_rollouts: int, horizon: int) -> float:
    """Returns the coefficient, moved so that KL approaches its target, by at most 20 % times num_rollouts / horizon.

    This is the controller of Ziegler et al. 2019, section 2.2. More rollouts than the horizon count as the horizon, so
    that the coefficient stays positive.
    """
    error = min(0.2, max(-0.2, kl / target_kl - 1))
    return kl_coef * (1 + error * min(1.0, num_rollouts / horizon))


def importance_weights(old_logprobs_NC: Tensor, sampler_logprobs_NC: Tensor, mask_NC: Tensor, cap: float) -> Tensor:
    """Returns min(π_old / π_sampler, cap) of each token, 0 beyond the ends.

    This is truncated importance sampling (Ionides 2008). It corrects for a sampler that computes the same policy a
    little differently.
    """
    ratio_NC = torch.where(mask_NC, old_logprobs_NC - sampler_logprobs_NC, 0.0).exp()
    return torch.where(mask_NC, ratio_NC.clamp_max(cap), 0.0)


def rewards(scores_N: Tensor, logprobs_NC: Tensor, ref_logprobs_NC: Tensor, mask_NC: Tensor, kl_coef: float) -> Tensor:
    """Returns each token's reward, [N, C]: -kl_coef (log π - log π_ref), plus the score at the last real token."""
    rewards_NC = torch.where(mask_NC, -kl_coef * (logprobs_NC - ref_logprobs_NC), 0.0)
    last_N = mask_NC.sum(-1) - 1
    return rewards_NC.scatter_add(-1, last_N[:, None], scores_N[:, None].to(rewards_NC.dtype))


def advantages(rewards_NC: Tensor, values_NC: Tensor, mask_NC: Tensor, gamma: float, gae_lambda: float) -> Tensor:
    """Returns generalised advantage estimates, [N, C], not whitened; the returns are these plus the values.

    A_t = δ_t + γ λ A_{t+1} with δ_t = r_t + γ V_{t+1} - V_t; beyond the last real token V and A are 0.
    """
    values_NC = torch.where(mask_NC, values_NC, 0.0)
    next_value_N = torch.zeros_like(values_NC[:, 0])
    next_advantage_N = torch.zeros_like(next_value_N)
    columns: list[Tensor] = []
    for t in reversed(range(values_NC.shape[1])):
        delta_N = rewards_NC[:, t] + gamma * next_value_N - values_NC[:, t]
        next_advantage_N = torch.where(mask_NC[:, t], delta_N + gamma * gae_lambda * next_advantage_N, 0.0)
        next_value_N = values_NC[:, t]
        columns.append(next_advantage_N)
    return torch.stack(columns[::-1], dim=1)


def policy_loss(
    logprobs_NC: Tensor,
    old_logprobs_NC: Tensor,
    advantages_NC: Tensor,
    mask_NC: Tensor,
    clip_range: float,
    weights_NC: Tensor | None = None,
) -> Loss:
    """Returns -E[w min(ρ A, clip(ρ, 1 ± clip_range) A)] with ρ = π / π_old (PPO, equation 7); w is 1 unless given."""
    if weights_NC is not None:
        advantages_NC = weights_NC * advantages_NC
    # Differences beyond a completion's end may be anything; exp must not overflow there.
    ratio_NC = torch.where(mask_NC, logprobs_NC - old_logprobs_NC, 0.0).exp()
    plain_NC = -advantages_NC * ratio_NC
    clipped_NC = -advantages_NC * ratio_NC.clamp(1 - clip_range, 1 + clip_range)
    return _worse_of(plain_NC, clipped_NC, mask_NC)


def value_loss(
    values_NC: Tensor, old_values_NC: Tensor, returns_NC: Tensor, mask_NC: Tensor, clip_range: float
) -> Loss:
    """Returns ½ E[max((V - R)², (clip(V, V_old ± clip_range) - R)²)]."""
    clipped_values_NC = torch.clamp(values_NC, old_values_NC - clip_range, old_values_NC + clip_range)
    plain_NC = 0.5 * (values_NC - returns_NC) ** 2
    return _worse_of(plain_NC, 0.5 * (clipped_values_NC - returns_NC) ** 2, mask_NC)


def explained_variance(values_M: Tensor, returns_M: Tensor) -> float:
    """Returns 1 - Var(returns - values) / Var(returns) over M tokens: 1 is perfect, 0 is no better than a constant."""
    residual_M = returns_M - values_M
    return float(1 - residual_M.var(unbiased=False) / returns_M.var(unbiased=False).clamp_min(1e-8))


def _worse_of(plain_NC: Tensor, clipped_NC: Tensor, mask_NC: Tensor) -> Loss:
    clipped_share = masked_mean((clipped_NC > plain_NC).float(), mask_NC)
    return Loss(masked_mean(torch.maximum(plain_NC, clipped_NC), mask_NC), float(clipped_share))


def rate_factor(round_index: int, num_rounds: int, num_warmup_rounds: int, num_decay_rounds: int) -> float:
    """Returns the learning rate's factor in a round: it rises to 1, stays, and falls to 0.1 in the last round.

    It is 1 / (num_warmup_rounds + 1) in round 0. The fall is over the last `num_decay_rounds`, and begins in no
    run before the first round of the full rate.
    """
    risen = min(1.0, (round_index + 1) / (num_warmup_rounds + 1))
    num_decay_rounds = min(num_decay_rounds, max(0, num_rounds - num_warmup_rounds - 1))
    into_decay = round_index + 1 - (num_rounds - num_decay_rounds)
    return risen if into_decay <= 0 else risen * (1 - 0.9 * into_decay / num_decay_rounds)


def moved(start: float, end: float, round_index: int, num_rounds: int) -> float:
    """Returns the value in a round of what moves linearly from the first round to the last."""
    return start + (end - start) * round_index / max(1, num_rounds - 1)
