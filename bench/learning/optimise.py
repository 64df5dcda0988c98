"""PPO and PPO-ptx in the learning benchmark, from the SFT policy, on rewards that were fitted to its completions."""

from __future__ import annotations

import gzip
import json
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from bench.learning.data import data_file
from bench.learning.experiment import Experiment
from bench.learning.lab import Asked, Lab
from bench.learning.rewards import Rankings, Rewards, add_rankings, fit_rewards, load_rewards, save_rewards
from training.config import PpoConfig, PtxConfig
from training.errors import TrainingError
from training.models.policy import SharedLayers, load_model, save_policy
from training.ppo import ptx
from training.ppo import rounds as ppo
from training.ppo.learner import load_policy, make_learner
from training.ppo.rollouts import Request, Rollout

# The metrics of a round that are worth keeping in the repository.
_SAVED_METRICS = (
    "objective/score", "objective/held_out_score", "objective/kl", "objective/entropy", "completion/length",
    "completion/eos_rate", "policy/clipfrac", "policy/kl_coef", "rollout/sampler_gap", "val/explained_variance",
    "ptx/loss", "ptx/gamma",
)  # fmt: skip
_SAVED_DIGITS = 4


def make_rewards(experiment: Experiment, train: Sequence[Asked]) -> dict[str, Any]:
    """Fits the rewards to rankings of what the SFT policy writes."""
    lab, sft = experiment.lab, experiment.folder / "sft"
    shared = SharedLayers(load_model(sft))
    lab.load(sft)
    rankings = add_rankings(lab, shared, Rankings(), train, lab.labelers(train[:32]), experiment.size.ks, salt=1000)
    rewards = fit_rewards(shared, rankings, len(rankings.examples), lab.seed)
    save_rewards(rewards, experiment.folder / "rewards.safetensors")
    comparisons = sum(len(each.ranks) * (len(each.ranks) - 1) // 2 for each in rankings.examples)
    return {"accuracy": rewards.accuracy, "num_rankings": len(rankings.examples), "num_comparisons": comparisons}


def optimise(experiment: Experiment, train: Sequence[Asked], name: str, config: PpoConfig) -> dict[str, Any]:
    """Runs PPO, with the pretraining mix if the name is `ppo-ptx`. Leaves the policy in the folder `name`."""
    folder, sft = experiment.folder, experiment.folder / "sft"
    shared = SharedLayers(load_model(sft))
    rewards = load_rewards(shared, folder / "rewards.safetensors", None)
    if name == "ppo-ptx":
        mix = PtxConfig(data=str(_write_pretraining_text(folder / "gsm8k.txt")))
        config = config.model_copy(update={"ptx": mix})
    experiment.lab.load(sft)
    rounds, reason = run_ppo(experiment, train, config, shared, sft, rewards, name)
    return {"rounds": rounds, "stopped": reason}


def run_ppo(
    experiment: Experiment,
    train: Sequence[Asked],
    config: PpoConfig,
    shared: SharedLayers,
    start: Path,
    rewards: Rewards,
    name: str,
    part: int = 0,
) -> tuple[list[dict[str, Any]], str | None]:
    """Runs one stretch of PPO, and leaves its policy in the folder `name`, and loaded.

    Returns the metrics of each round, with the true utility of its rollouts, and why PPO stopped itself, if it did.
    """
    lab = experiment.lab
    policy = load_policy(start, shared, config)
    learner = make_learner(policy, rewards.model, rewards.held_out_model, config)
    config = config.model_copy(update={"max_tokens": lab.max_tokens})
    by_tokens = {each.token_ids: each for each in train}
    utilities: list[float] = []
    rounds: list[dict[str, Any]] = []

    def draw(request: Request) -> list[list[Rollout]]:
        drawn = lab.engine.draw(request)
        worth = lab.utilities([by_tokens[tuple(prompt)] for prompt in request.prompts], drawn)
        utilities.append(sum(map(sum, worth)) / sum(map(len, worth)))
        return drawn

    def log(index: int, count: int, metrics: dict[str, Any]) -> None:
        saved = {name: round(metrics[name], _SAVED_DIGITS) for name in _SAVED_METRICS if name in metrics}
        rounds.append({**saved, "part": part, "utility": round(utilities[-1], _SAVED_DIGITS)})
        print(
            f"{experiment.folder.name}: {name}: round {index + 1} of {count}: utility {utilities[-1]:.3f}, "
            f"score {metrics['objective/score']:.2f}, KL {metrics['objective/kl']:.2f}",
            flush=True,
        )

    hooks = ppo.PpoHooks(list(by_tokens), draw, log, _pretraining(lab, config.ptx))
    target = experiment.folder / name
    try:
        reason = ppo.train(learner, config, hooks, seed=lab.seed * 101 + part)
    except TrainingError as error:
        if not rounds:
            raise
        # PPO left no policy that may be kept, so the stretch ends where it began.
        if start != target:
            shutil.copytree(start, target, dirs_exist_ok=True)
        lab.load(start)
        return rounds, str(error)
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    save_policy(target, shared, policy, lab.base)
    lab.load(target)
    return rounds, reason


def _pretraining(lab: Lab, config: PtxConfig) -> Iterator[tuple[int, ...]] | None:
    """Returns sequences of the pretraining text; None for plain PPO."""
    if not config.data:
        return None
    return ptx.sequences(ptx.pretraining_texts(config, lab.seed), lab.tokenizer, config.sequence_tokens)


def _write_pretraining_text(path: Path) -> Path:
    """Writes GSM8K's training part, a question with its answer a line: nothing that the tax is measured by."""
    with gzip.open(data_file("gsm8k/train.jsonl.gz"), "rt", encoding="utf-8") as lines:
        items = [json.loads(line) for line in lines]
    texts = [" ".join(f"{item['question']} {item['answer']}".split()) for item in items]
    random.Random(0).shuffle(texts)
    path.write_text("\n".join(texts))
    return path
