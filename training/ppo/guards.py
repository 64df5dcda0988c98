"""Decides when PPO stops itself, by pure functions of the figures of its rounds so far.

The further the policy moves from where the reward model was fitted, the less the score can be trusted (Gao et al.
2022). So PPO stops at a KL budget, or when the reward model's score goes up while that of the held-out reward model,
fitted to other labelers, goes down.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from training.config import PpoConfig

Metrics = Mapping[str, float]

_WATCHED = ("objective/kl", "objective/score", "objective/held_out_score", "objective/entropy", "rollout/sampler_gap")
_GOOD_HELD_OUT_DROP = 1.0


def stop_reason(rounds: Sequence[Metrics], config: PpoConfig) -> str | None:
    """Returns why PPO should not continue after the last of these rounds; None if it should."""
    now = rounds[-1]
    broken = [name for name in _WATCHED if not math.isfinite(now[name])]
    if broken:
        return f"not finite: {', '.join(broken)}"
    if now["objective/kl"] > config.max_kl:
        return f"KL is {now['objective/kl']:.2f} nats, over ppo.max_kl = {config.max_kl:g}"
    if now["rollout/sampler_gap"] > config.max_sampler_gap:
        return (
            f"sampler and trainer differ by {now['rollout/sampler_gap']:.3f} nats a token, "
            f"over ppo.max_sampler_gap = {config.max_sampler_gap:g}"
        )
    drop = held_out_drop(rounds)
    if drop > config.max_held_out_drop:
        return (
            f"the two rewards part: by the held-out reward model the policy is {drop:.1f} standard errors below its "
            f"best, by the reward model above it"
        )
    return None


def is_good(rounds: Sequence[Metrics]) -> bool:
    """Whether the last round's policy may be kept: its held-out score is at most a standard error below the best."""
    return _below_best(rounds[-1], _best(rounds)) <= _GOOD_HELD_OUT_DROP


def held_out_drop(rounds: Sequence[Metrics]) -> float:
    """Returns how far the last round's held-out score is below the best one, in standard errors of the difference.

    It is 0 where the reward model's score in the last round is not above that in the best one.
    """
    now, best = rounds[-1], _best(rounds)
    return _below_best(now, best) if now["objective/score"] > best["objective/score"] else 0.0


def _best(rounds: Sequence[Metrics]) -> Metrics:
    return max(rounds, key=lambda each: each["objective/held_out_score"])


def _below_best(now: Metrics, best: Metrics) -> float:
    error = math.hypot(now["objective/held_out_error"], best["objective/held_out_error"])
    return (best["objective/held_out_score"] - now["objective/held_out_score"]) / max(error, 1e-12)
