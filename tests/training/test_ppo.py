"""The whole learner on a tiny policy: a preference is learned from rankings, and PPO moves the policy towards it."""

import random
from pathlib import Path

import pytest
import torch

from tests.training.sampling import PlainSampler
from training import ppo, reward_model
from training.config import PpoConfig, RewardModelConfig
from training.errors import TrainingError
from training.groups import Group
from training.policy_model import SharedLayers, merged_weights, upper_layers_of
from training.reward_model import RankedExample, RewardModel
from training.rollouts import Rollout

EOS = 2
PROMPTS = [(1, 50 + i, 90, 17) for i in range(16)]
REWARD_MODEL = RewardModelConfig(num_layers=1, l2=0.01)
PPO = PpoConfig(
    num_steps=16, prompts_per_step=16, rollouts_per_prompt=4, max_tokens=8, num_minibatches=2, num_frozen_layers=0,
    learning_rate=2e-3, value_learning_rate=1e-2, kl_coef=0.02, missing_eos_penalty=0.0, num_warmup_steps=0,
)  # fmt: skip


def worths(shared: SharedLayers) -> list[float]:
    """The preference to learn: what each token is worth is a component of its embedding, in standard deviations."""
    component_V = shared.head_VD[:, 0].float()
    worth_V: list[float] = (component_V / component_V.std()).tolist()
    return worth_V


def mean_worth(shared: SharedLayers, rollouts: list[list[Rollout]]) -> float:
    worth = worths(shared)
    tokens = [token for group in rollouts for rollout in group for token in rollout.token_ids]
    return sum(worth[token] for token in tokens) / len(tokens)


def ranked_examples(shared: SharedLayers, count: int, seed: int) -> list[RankedExample]:
    drawn, worth = random.Random(seed), worths(shared)
    examples = []
    for _ in range(count):
        completions = tuple(tuple(drawn.randrange(3, 436) for _ in range(8)) for _ in range(4))
        total = [sum(worth[token] for token in completion) for completion in completions]
        ranks = tuple(sorted(total, reverse=True).index(each) for each in total)
        examples.append(RankedExample(Group(drawn.choice(PROMPTS), completions), ranks))
    return examples


def keep_in(seen: list[dict[str, float]]) -> ppo.Log:
    return lambda step, num_steps, metrics: seen.append(metrics)


def fitted(shared: SharedLayers) -> RewardModel:
    model = RewardModel(shared, REWARD_MODEL)
    reward_model.fit(model, shared, ranked_examples(shared, 240, seed=1), REWARD_MODEL, lambda *_: None)
    return model


def test_reward_model_learns_a_preference_and_ppo_follows_it(shared: SharedLayers, tiny_folder: Path) -> None:
    rewards = fitted(shared)
    correct, count = reward_model.accuracy(rewards, shared, ranked_examples(shared, 40, seed=2), 8)
    assert count > 150
    # The random layers drown most of the embedding: the same head finds 0.74 here, and chance is 0.5.
    assert correct > 0.65

    sampler = PlainSampler(tiny_folder, num_completions=4, max_tokens=8, eos_token_id=EOS)
    before = sampler.sample(PROMPTS, seed=7)
    references = [
        Group(prompt, tuple(rollout.token_ids for rollout in group))
        for prompt, group in zip(PROMPTS, before, strict=True)
    ]
    reward_model.normalise(rewards, shared, references)
    scores = torch.cat(reward_model.score_groups(rewards, shared, references))
    assert float(scores.mean()) == pytest.approx(0, abs=1e-4)
    assert float(scores.std()) == pytest.approx(1, abs=1e-4)

    policy = upper_layers_of(tiny_folder, shared, first=0)
    seen: list[dict[str, float]] = []
    learner = ppo.make_learner(shared, policy, rewards)
    ppo.train(learner, PPO, PROMPTS, sampler.sample, sampler.load_weights, seed=0, log=keep_in(seen))
    assert len(seen) == PPO.num_steps == sampler.num_loads
    assert seen[0]["objective/kl"] == pytest.approx(0, abs=1e-6)
    assert seen[-1]["objective/score"] > seen[0]["objective/score"] + 0.5
    assert seen[-1]["objective/kl"] > 0
    assert mean_worth(shared, sampler.sample(PROMPTS, seed=8)) > mean_worth(shared, before) + 0.2


def test_ppo_stops_at_the_kl_budget_and_keeps_the_last_good_policy(shared: SharedLayers, tiny_folder: Path) -> None:
    policy = upper_layers_of(tiny_folder, shared, first=0)
    sampler = PlainSampler(tiny_folder, num_completions=4, max_tokens=8, eos_token_id=EOS)
    config = PPO.model_copy(update={"max_kl": 0.02, "learning_rate": 1e-2})
    seen: list[dict[str, float]] = []
    learner = ppo.make_learner(shared, policy, fitted(shared))
    ppo.train(learner, config, PROMPTS, sampler.sample, sampler.load_weights, seed=0, log=keep_in(seen))
    assert 1 < len(seen) < config.num_steps
    assert seen[-1]["objective/kl"] > 0.02
    assert seen[-1]["stopped/max_kl"] == 0.02
    for name, tensor in merged_weights(shared, policy).items():
        assert torch.equal(sampler.model.state_dict()[name], tensor)


def test_what_is_not_finite_stops_the_run(shared: SharedLayers, tiny_folder: Path) -> None:
    rewards = fitted(shared)
    with torch.no_grad():
        rewards.head_F[0] = torch.nan
    sampler = PlainSampler(tiny_folder, num_completions=4, max_tokens=8, eos_token_id=EOS)
    learner = ppo.make_learner(shared, upper_layers_of(tiny_folder, shared, first=0), rewards)
    with pytest.raises(TrainingError, match="objective/score"):
        ppo.train(learner, PPO, PROMPTS, sampler.sample, sampler.load_weights, seed=0, log=lambda *_: None)
    assert sampler.num_loads == 0


def test_the_same_seed_gives_the_same_policy(shared: SharedLayers, tiny_folder: Path) -> None:
    rewards, found = fitted(shared), []
    for _ in range(2):
        policy = upper_layers_of(tiny_folder, shared, first=1)
        sampler = PlainSampler(tiny_folder, num_completions=2, max_tokens=4, eos_token_id=EOS)
        config = PPO.model_copy(update={"num_steps": 2})
        learner = ppo.make_learner(shared, policy, rewards)
        ppo.train(learner, config, PROMPTS, sampler.sample, sampler.load_weights, seed=5, log=lambda *_: None)
        found.append(merged_weights(shared, policy))
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())
