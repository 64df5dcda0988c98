"""When PPO should stop itself."""

import math

import pytest

from training.config import PpoConfig
from training.ppo.guards import held_out_drop, is_good, stop_reason

CONFIG = PpoConfig(max_kl=8.0, max_sampler_gap=0.3, max_held_out_drop=3.0)


def seen(**changed: float) -> dict[str, float]:
    fine = {"kl": 1.0, "score": 0.5, "held_out_score": 0.4, "held_out_error": 0.1, "entropy": 2.0}
    metrics = {f"objective/{name}": changed.pop(name, value) for name, value in fine.items()}
    return metrics | {"rollout/sampler_gap": changed.pop("sampler_gap", 0.05)}


def test_continues_while_all_is_well() -> None:
    assert stop_reason([seen(), seen(score=0.9, held_out_score=0.7)], CONFIG) is None


@pytest.mark.parametrize(
    ("changed", "named"),
    [
        ({"kl": 8.1}, "ppo.max_kl"),
        ({"sampler_gap": 0.31}, "ppo.max_sampler_gap"),
        ({"score": math.nan}, "objective/score"),
        ({"entropy": math.inf}, "objective/entropy"),
        ({"score": 1.0, "held_out_score": -0.1}, "rewards part"),
    ],
)
def test_stops_and_says_why(changed: dict[str, float], named: str) -> None:
    reason = stop_reason([seen(), seen(**changed)], CONFIG)
    assert reason is not None
    assert named in reason


def test_a_held_out_score_that_falls_with_the_score_is_no_reward_hacking() -> None:
    # Both go down: that is noise, or a policy that unlearns, and PPO will turn it.
    assert held_out_drop([seen(), seen(score=0.1, held_out_score=-0.5)]) == 0.0


def test_a_policy_with_a_lower_held_out_score_is_not_kept_whatever_the_reward_model_says() -> None:
    best = seen(score=1.0, held_out_score=1.0)
    assert is_good([seen()])
    assert is_good([seen(), best])
    assert is_good([seen(), best, seen(score=1.2, held_out_score=0.9)])
    for score in (0.9, 1.2):
        assert not is_good([seen(), best, seen(score=score, held_out_score=-2.0)])


def test_a_single_rollout_stops_nothing_and_keeps_nothing_from_being_kept() -> None:
    rounds = [seen(held_out_error=math.inf), seen(score=1.0, held_out_score=-9.0, held_out_error=math.inf)]
    assert stop_reason(rounds, CONFIG) is None
    assert is_good(rounds)


def test_the_drop_is_in_standard_errors_of_the_difference() -> None:
    assert held_out_drop([seen(), seen(score=0.6, held_out_score=0.1)]) == pytest.approx(0.3 / math.hypot(0.1, 0.1))
