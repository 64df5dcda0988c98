"""A preference over tokens to learn, rankings by it, and everything PPO needs on a tiny policy."""

import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import Tensor

from tests.training.sampling import PlainSampler
from training.config import PpoConfig, RewardModelConfig
from training.data.groups import Group, RankedExample
from training.models.parallel import ALONE, Ranks
from training.models.policy import SharedLayers
from training.models.reward import RewardModel
from training.ppo import rounds as ppo
from training.ppo.learner import Learner, load_policy, make_learner
from training.ppo.rollouts import Request
from training.rewards.fit import fit

EOS = 2
PROMPTS = [(1, 50 + i, 90, 17) for i in range(16)]
REWARD_MODEL = RewardModelConfig(num_layers=1, num_heads=2, l2=0.01)
PPO = PpoConfig(
    num_rounds=16, prompts_per_round=16, rollouts_per_prompt=4, max_tokens=8, num_minibatches=2, num_frozen_layers=0,
    learning_rate=2e-3, value_learning_rate=1e-2, kl_coef=0.02, missing_eos_penalty=0.0, num_warmup_rounds=0,
    max_sampler_gap=1.0, num_decay_rounds=0,
)  # fmt: skip


def worths(shared: SharedLayers) -> list[float]:
    """Returns what each token is worth by the preference to learn: one component of its embedding, standardized."""
    component_V = shared.head_VD[:, 0].float()
    worth_V: list[float] = (component_V / component_V.std()).tolist()
    return worth_V


def ranked_examples(shared: SharedLayers, count: int, seed: int) -> list[RankedExample]:
    """Returns rankings, by four labelers, of four random completions each, ordered by the summed worth of tokens."""
    drawn, worth = random.Random(seed), worths(shared)
    examples = []
    for index in range(count):
        completions = tuple(tuple(drawn.randrange(3, 436) for _ in range(8)) for _ in range(4))
        total = [sum(worth[token] for token in completion) for completion in completions]
        ranks = tuple(sorted(total, reverse=True).index(each) for each in total)
        examples.append(RankedExample(Group(drawn.choice(PROMPTS), completions), ranks, f"l{index % 4}", index))
    return examples


def silent(*_: Any) -> None:
    """Logs nothing."""


def fitted(shared: SharedLayers, config: RewardModelConfig = REWARD_MODEL, count: int = 240) -> RewardModel:
    """Returns a reward model that has learned the preference."""
    model = RewardModel(shared, config)
    fit(model, ranked_examples(shared, count, seed=1), config, seed=0, warm=False, log=silent)
    return model


def learner_of(
    shared: SharedLayers,
    folder: Path,
    config: PpoConfig,
    rewards: RewardModel,
    ranks: Ranks = ALONE,
    held_out_model: RewardModel | None = None,
) -> Learner:
    """Returns a learner that starts from the policy in `folder`. `rewards` is the held-out model too, unless given."""
    return make_learner(load_policy(folder, shared, config, ranks), rewards, held_out_model or rewards, config, ranks)


def hooks_of(folder: Path, config: PpoConfig, log: ppo.Log = silent, **more: Any) -> tuple[ppo.PpoHooks, PlainSampler]:
    """Returns hooks with the tiny policy's prompts and a sampler of it, and the sampler."""
    sampler = PlainSampler(folder, EOS)
    return ppo.PpoHooks(PROMPTS, sampler.draw, log, **more), sampler


def request_of(config: PpoConfig, seed: int, weights: Iterable[tuple[str, Tensor]] = ()) -> Request:
    """Returns a request for rollouts of the tiny policy's prompts."""
    return Request(weights, PROMPTS, config.rollouts_per_prompt, config.max_tokens, seed)
