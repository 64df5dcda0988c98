"""What else pays: the recipe with one factor changed, from the same SFT policy and rewards, at equal rollout tokens."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from bench.learning.answers import evaluate
from bench.learning.experiment import Experiment
from bench.learning.instruct import how_made
from bench.learning.optimise import optimise
from bench.learning.prompts import train_prompts
from bench.learning.stages import begin
from training.config import PpoConfig

FACTOR = "factor-"
"""How the names of these experiments begin."""

FACTORS: dict[str, Mapping[str, Any]] = {
    "rate-1e-4": {"learning_rate": 1e-4},
    "rate-4e-4": {"learning_rate": 4e-4},
    "minibatches-2": {"num_minibatches": 2},
    "minibatches-8": {"num_minibatches": 8},
    "epochs-2": {"num_epochs": 2},
    "rounds-12-of-32": {"num_rounds": 12, "num_decay_rounds": 3, "prompts_per_round": 32},
    "kl-0.02": {"kl_coef": 0.02},
    "kl-0.1": {"kl_coef": 0.1},
    "no-decay": {"num_decay_rounds": 0},
    "half-trained": {"num_frozen_layers": 15},
    "all-trained": {"num_frozen_layers": 0},
    "lora-all": {"num_frozen_layers": 0, "lora": {"rank": 16}},
    "value-rate-3e-3": {"value_learning_rate": 3e-3},
    "ema": {"ema_decay": 0.9},
}
"""The settings of `ppo` that differ from the shipped recipe, by the factor's name."""


def changed(config: PpoConfig, factor: str) -> PpoConfig:
    """Returns the recipe with this factor changed. It draws as many rollouts as the recipe does.

    Raises:
        ValueError: it would draw more or fewer.
    """
    other = PpoConfig.model_validate(config.model_dump() | dict(FACTORS[factor]))
    if other.num_rounds * other.prompts_per_round != config.num_rounds * config.prompts_per_round:
        raise ValueError(f"{factor}: draws rollouts of another number of prompts than the recipe")
    return other


def try_factor(experiment: Experiment, factor: str) -> dict[str, Any]:
    """Runs PPO with this factor changed, and returns its rounds, and what this policy and the recipe's are worth.

    Raises:
        MadeOtherwiseError: the experiment was made with other settings.
        ValueError: it has not come to PPO yet, whose SFT policy, rewards and result are needed.
    """
    begin(experiment.folder, how_made(experiment.size))
    if not (experiment.folder / "ppo.json").exists():
        raise ValueError(f"{experiment.folder.name} has run no PPO yet: run it first")
    config = changed(experiment.size.ppo, factor)
    train = experiment.lab.ask(train_prompts(experiment.size.num_rankings))
    run = experiment.once(factor, lambda: optimise(experiment, train, factor, config))
    return {"run": run, "answers": evaluate(experiment, factor), "answers-ppo": evaluate(experiment, "ppo")}
