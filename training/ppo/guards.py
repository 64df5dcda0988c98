"""When PPO stops itself: pure functions of what its rounds have shown so far.

A reward model is believed less and less the further the policy goes from where it was fitted (Gao et al. 2022), so a
run ends at a KL budget, or when its score goes up while the held-out reward model, fitted to other labelers, goes down.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from training.config import PpoConfig

Metrics = Mapping[str, float]

WATCHED = ("objective/kl", "objective/score", "objective/held_out_score", "objective/entropy", "rollout/sampler_gap")
GOOD_HELD_OUT_DROP = 1.0


def stop_reason(rounds: Sequence[Metrics], config: PpoConfig) -> str | None:
    """Why PPO should not go on from the last of these rounds; None if it should."""
    now = rounds[-1]
    broken = [name for name in WATCHED if not math.isfinite(now[name])]
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
    """Whether the last round's policy may be kept: by the held-out model at most a standard error below its best."""
    return _below_best(rounds[-1], _best(rounds)) <= GOOD_HELD_OUT_DROP


def held_out_drop(rounds: Sequence[Metrics]) -> float:
    """How far the last round's score by the held-out model is below its best, in standard errors of the difference.

    0 where the reward model does not hold the last round for better than the best one.
    """
    now, best = rounds[-1], _best(rounds)
    return _below_best(now, best) if now["objective/score"] > best["objective/score"] else 0.0


def _best(rounds: Sequence[Metrics]) -> Metrics:
    return max(rounds, key=lambda each: each["objective/held_out_score"])


def _below_best(now: Metrics, best: Metrics) -> float:
    error = math.hypot(now["objective/held_out_error"], best["objective/held_out_error"])
    return (best["objective/held_out_score"] - now["objective/held_out_score"]) / max(error, 1e-12)
