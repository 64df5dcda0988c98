"""The rewards of the experiment: rankings of what a policy writes, and the models that are fitted to them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from bench.learning.lab import Asked, Lab
from deploy.simulation.labelers import Labeler
from training.config import RewardModelConfig
from training.data.groups import RankedExample
from training.models.policy import SharedLayers
from training.models.reward import RewardModel, group_features, normalise
from training.rewards.evaluation import evaluate_rewards
from training.rewards.fit import fit

REWARD_MODEL = RewardModelConfig(max_rankings=100_000, held_out_share=0.0)
# A quarter of the labelers. Their rankings only measure.
_HELD_OUT_LABELERS = frozenset(f"simulated-{index:03d}" for index in range(10))
_NORMALISED_ON = 64


@dataclass(frozen=True)
class Rankings:
    """Rankings, and what the heads read of each. This is computed once, since the layers below never change."""

    examples: tuple[RankedExample, ...] = ()
    features: tuple[Tensor, ...] = ()

    def only(self, keep: Callable[[RankedExample], bool]) -> Rankings:
        """Returns those for which `keep` is true."""
        kept = [pair for pair in zip(self.examples, self.features, strict=True) if keep(pair[0])]
        return Rankings(tuple(example for example, _ in kept), tuple(feature for _, feature in kept))


@dataclass(frozen=True)
class Rewards:
    """The reward model, the held-out reward model, and the first one's accuracy on the rankings of the second."""

    model: RewardModel
    held_out_model: RewardModel
    accuracy: dict[str, Any] | None


def add_rankings(
    lab: Lab,
    shared: SharedLayers,
    known: Rankings,
    asked: Sequence[Asked],
    labelers: Sequence[Labeler],
    ks: range,
    salt: int,
) -> Rankings:
    """Returns `known` and one more ranking of each prompt, of completions by the policy that is loaded."""
    new = lab.rank(asked, labelers, ks, salt, first_seq=len(known.examples))
    features = group_features(RewardModel(shared, REWARD_MODEL), [example.group for example in new])
    return Rankings((*known.examples, *new), (*known.features, *features))


def fit_rewards(shared: SharedLayers, rankings: Rankings, num_of_reference: int, seed: int) -> Rewards:
    """Fits the reward model to most labelers' rankings, and the held-out reward model to the other labelers'.

    The first `num_of_reference` rankings are of what the reference policy wrote.
    """
    known = rankings.only(lambda example: example.labeler not in _HELD_OUT_LABELERS)
    unknown = rankings.only(lambda example: example.labeler in _HELD_OUT_LABELERS)
    model, held_out_model = (fit_one(shared, each, num_of_reference, seed) for each in (known, unknown))
    evaluated = evaluate_rewards(model, unknown.examples, unknown.features)
    return Rewards(model, held_out_model, dataclasses.asdict(evaluated) if evaluated else None)


def fit_one(shared: SharedLayers, rankings: Rankings, num_of_reference: int, seed: int) -> RewardModel:
    """Returns a reward model of these rankings, normalised on the first ones, of the reference policy's answers."""
    model = RewardModel(shared, REWARD_MODEL)
    fit(
        model, rankings.examples, REWARD_MODEL, seed=seed, warm=False, log=lambda *_: None,
        features=rankings.features,
    )  # fmt: skip
    of_reference = rankings.only(lambda example: example.seq < num_of_reference)
    with torch.no_grad():
        normalise(model, model.score(torch.cat(of_reference.features[:_NORMALISED_ON])).cpu())
    return model


def save_rewards(rewards: Rewards, path: Path) -> None:
    """Writes both models."""
    tensors = {f"model.{name}": tensor for name, tensor in rewards.model.state_dict().items()}
    tensors |= {f"held_out_model.{name}": tensor for name, tensor in rewards.held_out_model.state_dict().items()}
    save_file(tensors, path)


def load_rewards(shared: SharedLayers, path: Path, accuracy: dict[str, Any] | None) -> Rewards:
    """Reads what `save_rewards` wrote."""
    tensors, model, held_out_model = (
        load_file(path),
        RewardModel(shared, REWARD_MODEL),
        RewardModel(shared, REWARD_MODEL),
    )
    for each, prefix in ((model, "model."), (held_out_model, "held_out_model.")):
        each.load_state_dict({n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)})
    return Rewards(model, held_out_model, accuracy)
