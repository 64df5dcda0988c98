"""PPO's arithmetic against its definitions, written as plain loops in float64."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from training.ppo import ppo_math

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


def whiten(values_NC: Tensor, mask_NC: Tensor) -> Tensor:
    real_M = values_NC[mask_NC]
    return ppo_math.standardize(values_NC, mask_NC, real_M.mean(), real_M.std(unbiased=False))


def test_standardized_values_have_mean_zero_and_variance_one() -> None:
    batch = random_batch(1)
    found_NC = whiten(batch["a"] * 7 + 3, batch["mask"])
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
        source["whitened"] = whiten(source["advantages"], mask_NC)
        source["loss"] = ppo_math.policy_loss(source["a"], source["b"], source["whitened"], mask_NC, 0.2).value
        source["value_loss"] = ppo_math.value_loss(source["c"], source["a"], source["b"], mask_NC, 0.2).value
    for name in ("rewards", "advantages", "whitened", "loss", "value_loss"):
        torch.testing.assert_close(broken[name], batch[name], atol=0, rtol=0)


def test_explained_variance_of_perfect_and_of_constant_values() -> None:
    batch = random_batch(4)
    assert ppo_math.explained_variance(batch["a"].flatten(), batch["a"].flatten()) == pytest.approx(1.0)
    constant_NC = torch.full_like(batch["a"], 5.0)
    assert ppo_math.explained_variance(constant_NC.flatten(), batch["a"].flatten()) == pytest.approx(0.0)


def test_importance_weights_are_capped_ratios() -> None:
    batch = random_batch(5)
    found_NC = ppo_math.importance_weights(batch["a"], batch["b"], batch["mask"], cap=2.0)
    for n, length in enumerate(batch["lengths"].tolist()):
        for t in range(6):
            ratio = min(2.0, math.exp(float(batch["a"][n, t] - batch["b"][n, t]))) if t < length else 0.0
            assert float(found_NC[n, t]) == pytest.approx(ratio)
    weighted = ppo_math.policy_loss(batch["a"], batch["b"], batch["c"], batch["mask"], CLIP_RANGE, found_NC)
    by_hand = ppo_math.policy_loss(batch["a"], batch["b"], batch["c"] * found_NC, batch["mask"], CLIP_RANGE)
    assert float(weighted.value) == float(by_hand.value)


@given(kl=st.floats(0.0, 100.0), target=st.floats(0.1, 10.0), num_rollouts=st.integers(1, 4096))
def test_kl_coef_moves_towards_the_target_and_by_a_fifth_at_most(kl: float, target: float, num_rollouts: int) -> None:
    found = ppo_math.adapted_kl_coef(0.1, kl, target, num_rollouts=num_rollouts, horizon=64)
    assert 0.08 - 1e-12 <= found <= 0.12 + 1e-12
    assert (found - 0.1) * (kl - target) >= 0


def test_sampled_kl_has_the_exact_mean() -> None:
    # Over a vocabulary small enough to sum: E_π[log π - log π_ref] is the KL divergence.
    generator = torch.Generator().manual_seed(0)
    logprobs_V, reference_V = (torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(0) for _ in "ab")
    exact = float((logprobs_V.exp() * (logprobs_V - reference_V)).sum())
    drawn = torch.multinomial(logprobs_V.exp(), 200_000, replacement=True, generator=generator)
    rewards_NC = ppo_math.rewards(
        torch.zeros(len(drawn), dtype=torch.float64), logprobs_V[drawn][:, None], reference_V[drawn][:, None],
        torch.ones(len(drawn), 1, dtype=torch.bool), kl_coef=1.0,
    )  # fmt: skip
    assert -float(rewards_NC.mean()) == pytest.approx(exact, abs=0.01)


def test_a_bandit_reaches_its_known_optimum() -> None:
    # With one step, reward r(a) and KL at β, the best policy is π ∝ π_ref exp(r / β) (Ziegler et al. 2019).
    beta, generator = 0.5, torch.Generator().manual_seed(0)
    scores_V = torch.tensor([1.0, 0.3, -0.5, 0.0], dtype=torch.float64)
    reference_V = torch.tensor([0.1, -0.4, 0.8, 0.0], dtype=torch.float64).log_softmax(0)
    best_V = (reference_V + scores_V / beta).softmax(0)
    logits_V, value = reference_V.clone().requires_grad_(True), torch.zeros((), dtype=torch.float64)
    optimizer = torch.optim.Adam([logits_V], lr=0.02)
    mask_NC = torch.ones(512, 1, dtype=torch.bool)
    for step in range(300):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * (1 - step / 300)
        old_V = logits_V.detach().log_softmax(0)
        drawn = torch.multinomial(old_V.exp(), 512, replacement=True, generator=generator)
        old_NC, ref_NC = old_V[drawn][:, None], reference_V[drawn][:, None]
        rewards_NC = ppo_math.rewards(scores_V[drawn], old_NC, ref_NC, mask_NC, beta)
        advantages_NC = ppo_math.advantages(rewards_NC, value.expand(512, 1), mask_NC, 1.0, 0.95)
        value = value + 0.1 * (rewards_NC.mean() - value)
        for _ in range(2):
            logprobs_NC = logits_V.log_softmax(0)[drawn][:, None]
            loss = ppo_math.policy_loss(logprobs_NC, old_NC, advantages_NC, mask_NC, CLIP_RANGE).value
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    distance = 0.5 * float((logits_V.detach().softmax(0) - best_V).abs().sum())
    assert distance < 0.02


def test_a_warm_up_rises_evenly_and_stays() -> None:
    assert [ppo_math.rate_factor(index, 6, 3, 0) for index in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert ppo_math.rate_factor(0, 1, 0, 0) == 1.0


def test_rates_fall_to_a_tenth_in_the_last_round() -> None:
    rates = [ppo_math.rate_factor(index, 12, 0, 3) for index in range(12)]
    assert rates == pytest.approx([1.0] * 9 + [0.7, 0.4, 0.1])


def test_a_short_run_has_one_round_of_the_full_rate() -> None:
    assert [ppo_math.rate_factor(index, 4, 1, 6) for index in range(4)] == pytest.approx([0.5, 1.0, 0.55, 0.1])
    assert [ppo_math.rate_factor(index, 3, 0, 6) for index in range(3)] == pytest.approx([1.0, 0.55, 0.1])
    assert [ppo_math.rate_factor(index, 2, 1, 6) for index in range(2)] == [0.5, 1.0]
    assert ppo_math.rate_factor(0, 1, 1, 6) == 0.5


def test_what_moves_over_the_rounds_reaches_its_end_in_the_last_one() -> None:
    assert [ppo_math.moved(0.1, 0.02, index, 5) for index in range(5)] == pytest.approx([0.1, 0.08, 0.06, 0.04, 0.02])
    assert ppo_math.moved(0.1, 0.02, 0, 1) == 0.1
