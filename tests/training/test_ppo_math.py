"""PPO's arithmetic against its definitions, written as plain loops in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from training import ppo_math

CLIP_RANGE = 0.2


def random_batch(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths_N = torch.randint(1, 7, (5,), generator=generator)
    mask_NC = torch.arange(6)[None, :] < lengths_N[:, None]
    names = ("a", "b", "c", "d")
    drawn = {name: torch.randn(5, 6, generator=generator, dtype=torch.float64) for name in names}
    return drawn | {"mask": mask_NC, "lengths": lengths_N}


@given(seed=st.integers(0, 10_000), gamma=st.floats(0.5, 1.0), gae_lambda=st.floats(0.0, 1.0))
@settings(max_examples=40, deadline=None)
def test_advantages_are_the_weighted_sum_of_temporal_differences(seed: int, gamma: float, gae_lambda: float) -> None:
    batch = random_batch(seed)
    rewards_NC, values_NC, mask_NC = torch.where(batch["mask"], batch["a"], 0.0), batch["b"], batch["mask"]
    found_NC = ppo_math.advantages(rewards_NC, values_NC, mask_NC, gamma, gae_lambda)
    for n, length in enumerate(batch["lengths"].tolist()):
        deltas = [
            float(rewards_NC[n, t])
            + gamma * (float(values_NC[n, t + 1]) if t + 1 < length else 0.0)
            - float(values_NC[n, t])
            for t in range(length)
        ]
        for t in range(6):
            expected = sum((gamma * gae_lambda) ** (k - t) * deltas[k] for k in range(t, length))
            assert float(found_NC[n, t]) == pytest.approx(expected, abs=1e-12)


def test_advantages_with_lambda_one_are_the_return_less_the_value() -> None:
    batch = random_batch(3)
    rewards_NC, mask_NC = torch.where(batch["mask"], batch["a"], 0.0), batch["mask"]
    found_NC = ppo_math.advantages(rewards_NC, batch["b"], mask_NC, 1.0, 1.0)
    to_go_NC = rewards_NC.flip(-1).cumsum(-1).flip(-1)
    torch.testing.assert_close(found_NC[mask_NC], (to_go_NC - batch["b"])[mask_NC])


@given(seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_rewards_are_kl_at_each_token_and_the_score_at_the_last(seed: int) -> None:
    batch = random_batch(seed)
    scores_N = batch["c"][:, 0]
    found_NC = ppo_math.rewards(scores_N, batch["a"], batch["b"], batch["mask"], 0.3)
    for n, length in enumerate(batch["lengths"].tolist()):
        for t in range(6):
            kl = float(batch["a"][n, t] - batch["b"][n, t])
            expected = (-0.3 * kl if t < length else 0.0) + (float(scores_N[n]) if t == length - 1 else 0.0)
            assert float(found_NC[n, t]) == pytest.approx(expected, abs=1e-12)


@given(seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_policy_loss_equals_a_loop(seed: int) -> None:
    batch = random_batch(seed)
    loss = ppo_math.policy_loss(batch["a"], batch["b"], batch["c"], batch["mask"], CLIP_RANGE)
    terms, clipped = [], 0
    for n, length in enumerate(batch["lengths"].tolist()):
        for t in range(length):
            ratio, advantage = math.exp(float(batch["a"][n, t] - batch["b"][n, t])), float(batch["c"][n, t])
            bounded = min(max(ratio, 1 - CLIP_RANGE), 1 + CLIP_RANGE)
            terms.append(-min(ratio * advantage, bounded * advantage))
            clipped += bounded * advantage < ratio * advantage
    assert float(loss.value) == pytest.approx(sum(terms) / len(terms))
    assert loss.clipped_share == pytest.approx(clipped / len(terms))


@given(seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_value_loss_equals_a_loop(seed: int) -> None:
    batch = random_batch(seed)
    loss = ppo_math.value_loss(batch["a"], batch["b"], batch["c"], batch["mask"], CLIP_RANGE)
    terms = []
    for n, length in enumerate(batch["lengths"].tolist()):
        for t in range(length):
            value, old, goal = (float(batch[name][n, t]) for name in "abc")
            bounded = min(max(value, old - CLIP_RANGE), old + CLIP_RANGE)
            terms.append(0.5 * max((value - goal) ** 2, (bounded - goal) ** 2))
    assert float(loss.value) == pytest.approx(sum(terms) / len(terms))


def test_whitened_values_have_mean_zero_and_variance_one() -> None:
    batch = random_batch(1)
    found_NC = ppo_math.whiten(batch["a"] * 7 + 3, batch["mask"])
    real_M = found_NC[batch["mask"]]
    assert float(real_M.mean()) == pytest.approx(0, abs=1e-7)
    assert float(real_M.var(unbiased=False)) == pytest.approx(1, abs=1e-6)
    assert not found_NC[~batch["mask"]].any()


def test_what_stands_beyond_the_end_changes_nothing() -> None:
    batch = random_batch(2)
    mask_NC = batch["mask"]
    broken = {name: torch.where(mask_NC, batch[name], torch.nan) for name in "abc"}
    for source in (batch, broken):
        source["rewards"] = ppo_math.rewards(batch["d"][:, 0], source["a"], source["b"], mask_NC, 0.1)
        source["advantages"] = ppo_math.advantages(source["rewards"], source["c"], mask_NC, 1.0, 0.95)
        source["whitened"] = ppo_math.whiten(source["advantages"], mask_NC)
        source["loss"] = ppo_math.policy_loss(source["a"], source["b"], source["whitened"], mask_NC, 0.2).value
        source["value_loss"] = ppo_math.value_loss(source["c"], source["a"], source["b"], mask_NC, 0.2).value
    for name in ("rewards", "advantages", "whitened", "loss", "value_loss"):
        torch.testing.assert_close(broken[name], batch[name], atol=0, rtol=0)


def test_explained_variance_of_perfect_and_of_constant_values() -> None:
    batch = random_batch(4)
    assert ppo_math.explained_variance(batch["a"], batch["a"], batch["mask"]) == pytest.approx(1.0)
    constant_NC = torch.full_like(batch["a"], 5.0)
    assert ppo_math.explained_variance(constant_NC, batch["a"], batch["mask"]) == pytest.approx(0.0)
