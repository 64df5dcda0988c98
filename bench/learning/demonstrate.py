"""SFT in the learning benchmark: labelers demonstrate the best of many completions of the base, and it learns these."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Sequence
from typing import Any

import torch
from safetensors.torch import save_file

from bench.learning.answers import as_groups
from bench.learning.experiment import Experiment
from bench.learning.lab import Asked
from bench.learning.rewards import Rankings, add_rankings, fit_one
from bench.learning.stages import once
from deploy.simulation.utility import measure
from training.data.demonstrations import Demonstration
from training.models.policy import SharedLayers, load_model
from training.models.reward import score_groups
from training.sft import fine_tune

_NUM_VALIDATION, _NUM_VALIDATION_RANKINGS = 32, 64


def make_sft(experiment: Experiment, train: Sequence[Asked]) -> dict[str, Any]:
    """Fine-tunes the base on demonstrations, into the folder `sft`. As shipped, the reward model chooses the epoch."""
    lab, size = experiment.lab, experiment.size
    shown, worth = _demonstrations(experiment, train[: size.num_demonstrations])
    lab.load(lab.base)
    labelers = lab.labelers(train[-_NUM_VALIDATION:])
    shared = SharedLayers(load_model(lab.base))
    ranked = train[-_NUM_VALIDATION_RANKINGS:]
    rankings = add_rankings(lab, shared, Rankings(), ranked, labelers, size.ks, salt=200)
    rewards = fit_one(shared, rankings, len(rankings.examples), lab.seed)
    validation = train[-_NUM_VALIDATION:]

    def score_of(weights: dict[str, torch.Tensor]) -> float:
        lab.weights = weights
        drawn = [[rollout.token_ids for rollout in each] for each in lab.draw(validation, 1, salt=300)]
        return float(torch.cat(score_groups(rewards, as_groups(validation, drawn))).mean())

    scratch = experiment.folder / "scratch"
    weights, epochs = fine_tune(
        lab.base, lab.tokenizer, shown, score_of, size.sft, scratch, seed=lab.seed, log=lambda epoch: None
    )
    shutil.rmtree(scratch, ignore_errors=True)
    target = experiment.folder / "sft"
    shutil.copytree(lab.base, target, dirs_exist_ok=True)
    save_file({n: t.contiguous() for n, t in weights.items()}, target / "model.safetensors", {"format": "pt"})
    return {"epochs": [dataclasses.asdict(epoch) for epoch in epochs], "demonstrations": worth}


def _demonstrations(experiment: Experiment, asked: Sequence[Asked]) -> tuple[list[Demonstration], dict[str, float]]:
    """Returns the truly best of `best_of` completions of each prompt by the base, and the mean utility of these.

    The completions are the same for all utilities.
    """
    lab, size = experiment.lab, experiment.size

    def draw() -> dict[str, Any]:
        lab.load(lab.base)
        drawn = lab.draw(asked, size.best_of, salt=100)
        return {"token_ids": [[list(each.token_ids) for each in rollouts] for rollouts in drawn]}

    drawn = once(experiment.shared, f"demonstrable-{lab.seed}", draw)["token_ids"]
    shown, best, every = [], [], []
    for each, completions in zip(asked, drawn, strict=True):
        values = measure(lab.utility, each.text, [lab.text(tokens) for tokens in completions])
        chosen = values.index(max(values))
        shown.append(Demonstration(each.token_ids, tuple(completions[chosen])))
        best.append(values[chosen])
        every.extend(values)
    return shown, {"utility": sum(best) / len(best), "utility of the base": sum(every) / len(every)}
