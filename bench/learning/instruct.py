"""InstructGPT in miniature: base, few-shot, SFT, PPO and PPO-ptx, evaluated by the labelers' true utility.

Every stage leaves its result in a folder, and is skipped if the result is there, so that an experiment of hours can be
resumed. The policies are evaluated on held-out prompts, from which nothing was learned, with one completion each.
"""

from __future__ import annotations

import dataclasses
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoTokenizer

from bench.learning.hh_rlhf import Message
from bench.learning.lab import Asked, Lab
from bench.learning.prompts import few_shot_prefix, held_out_prompts, train_prompts
from bench.learning.rewards import (
    REWARD_MODEL,
    Rankings,
    Rewards,
    add_rankings,
    fit_one,
    fit_rewards,
    load_rewards,
    save_rewards,
)
from bench.learning.stages import begin, once
from bench.learning.tax import hellaswag_accuracy, read_hellaswag, read_wikitext, wikitext_loss
from policies.precision import compute_dtype, short_name
from training.config import LoraConfig, PpoConfig, PtxConfig, SftConfig
from training.data.groups import Group
from training.errors import TrainingError
from training.models.device import training_device
from training.models.policy import SharedLayers, load_model, save_policy, upper_layers_of
from training.models.reward import score_groups
from training.ppo import ptx
from training.ppo import rounds as ppo
from training.ppo.learner import make_learner
from training.ppo.rollouts import Request, Rollout
from training.sft import Demonstration, fine_tune

TAX_WINDOW = 512
VARIANTS = ("ppo", "ppo-ptx", "online")
# The metrics of a round that are worth keeping in the repository.
_SAVED_METRICS = (
    "objective/score", "objective/held_out_score", "objective/kl", "objective/entropy", "completion/length",
    "completion/eos_rate", "policy/clipfrac", "policy/kl_coef", "rollout/sampler_gap", "val/explained_variance",
    "ptx/loss", "ptx/gamma",
)  # fmt: skip
_SAVED_DIGITS = 4


@dataclass(frozen=True)
class Size:
    """The size of an experiment."""

    num_rankings: int
    ks: range
    num_demonstrations: int
    best_of: int
    num_rounds: int
    num_held_out: int
    tax_tokens: int
    tax_items: int
    refreshes: int = 2
    """Refreshes of the reward model during PPO where it is online; rankings and rounds are split evenly."""
    prompts_per_round: int = PpoConfig().prompts_per_round


QUICK = Size(36, range(4, 7), 16, 4, 3, 32, 2 * TAX_WINDOW, 12, prompts_per_round=4)
FULL = Size(160, range(4, 10), 64, 4, 12, 300, 8 * TAX_WINDOW, 100)
SFT = SftConfig(num_epochs=2, min_demonstrations=8)


def _ppo_config(size: Size, num_rounds: int, text: Path | None) -> PpoConfig:
    """Returns the recipe as shipped, except for its size and its epochs; with `text`, with the pretraining mix.

    It makes two epochs over a round's rollouts, since a dozen rounds are few, and drawing rollouts is most of what a
    round costs on a CPU.
    """
    mix = PtxConfig(data=str(text)) if text else PtxConfig()
    return PpoConfig(num_rounds=num_rounds, prompts_per_round=size.prompts_per_round, num_epochs=2, ptx=mix)


@dataclass(frozen=True)
class Experiment:
    """One seed of one utility: its laboratory, its size, and the folder of its stages' results."""

    lab: Lab
    size: Size
    folder: Path

    def once(self, name: str, stage: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Returns the result of `stage`, from now or from an earlier attempt."""
        return once(self.folder, name, stage)


def run_experiment(experiment: Experiment, variants: Sequence[str] = VARIANTS) -> dict[str, Any]:
    """Runs all stages and returns their results, by name. Each policy is evaluated as soon as it is there."""
    lab, size, folder = experiment.lab, experiment.size, experiment.folder
    train = lab.ask(train_prompts(size.num_rankings))
    held_out = held_out_prompts(size.num_held_out)
    measures_tax = "ppo" in variants
    begin(folder, _how(size))
    found = {"sft": experiment.once("sft", lambda: make_sft(experiment, train))}
    found |= _evaluate(experiment, "base", lab.base, held_out, measures_tax)
    found |= _evaluate(experiment, "few-shot", lab.base, held_out, False, few_shot_prefix())
    found |= _evaluate(experiment, "sft", folder / "sft", held_out, measures_tax)
    found["rewards"] = experiment.once("rewards", lambda: make_rewards(experiment, train))
    for name in variants:
        variant = optimise_online if name == "online" else optimise
        found[name] = experiment.once(name, lambda: variant(experiment, train, name))  # noqa: B023
        found |= _evaluate(experiment, name, folder / name, held_out, measures_tax and name != "online")
    return found


def _how(size: Size) -> str:
    """Returns the size and the settings, on which every stage depends besides the code, the name and the seed."""
    computes_in = short_name(compute_dtype(training_device()))
    return "\n".join(map(repr, (size, _ppo_config(size, size.num_rounds, None), SFT, REWARD_MODEL, computes_in)))


def _evaluate(
    experiment: Experiment,
    name: str,
    policy: Path,
    held_out: Sequence[str],
    measures_tax: bool,
    shots: Sequence[Message] = (),
) -> dict[str, Any]:
    """Returns what the policy in this folder is worth, and what it has lost of the language model."""
    lab, size = experiment.lab, experiment.size
    stages = {f"answers-{name}": lambda: answer(lab, policy, held_out, shots)}
    if measures_tax:
        stages[f"tax-{name}"] = lambda: tax(policy, size)
    return {stage: experiment.once(stage, run) for stage, run in stages.items()}


def answer(lab: Lab, folder: Path, prompts: Sequence[str], shots: Sequence[Message]) -> dict[str, Any]:
    """Returns the utility of one completion of each held-out prompt, and the first few texts."""
    lab.load(folder)
    asked = lab.ask(prompts, shots)
    drawn = lab.draw(asked, 1, salt=400)
    worth = [values[0] for values in lab.utilities(asked, drawn)]
    return {"utilities": worth, "texts": [lab.text(each[0]) for each in drawn[:6]], "prompts": list(prompts[:6])}


def tax(folder: Path, size: Size) -> dict[str, Any]:
    """Returns the WikiText-2 loss, window by window, and the HellaSwag hits, item by item."""
    model, tokenizer = load_model(folder), AutoTokenizer.from_pretrained(folder)
    loss = wikitext_loss(model, tokenizer, read_wikitext("test"), size.tax_tokens, TAX_WINDOW)
    hits = hellaswag_accuracy(model, tokenizer, read_hellaswag()[: size.tax_items])
    return {"wikitext": list(loss.values), "hellaswag": list(hits.values)}


def make_sft(experiment: Experiment, train: Sequence[Asked]) -> dict[str, Any]:
    """Lets labelers demonstrate each prompt's best completion of several, by the utility; then runs SFT on these."""
    lab, size = experiment.lab, experiment.size
    lab.load(lab.base)
    shown = train[: size.num_demonstrations]
    drawn = lab.draw(shown, size.best_of, salt=100)
    worth = lab.utilities(shown, drawn)
    best = [rollouts[values.index(max(values))] for rollouts, values in zip(drawn, worth, strict=True)]
    demonstrations = [
        Demonstration(each.token_ids, rollout.token_ids) for each, rollout in zip(shown, best, strict=True)
    ]
    labelers = lab.labelers(train[-32:])
    shared = SharedLayers(load_model(lab.base))
    rankings = add_rankings(lab, shared, Rankings(), train[-64:], labelers, size.ks, salt=200)
    rewards = fit_one(shared, rankings, len(rankings.examples), lab.seed)
    validation = train[-32:]

    def score_of(weights: dict[str, torch.Tensor]) -> float:
        lab.weights = weights
        drawn = [each[0] for each in lab.draw(validation, 1, salt=300)]
        return float(torch.cat(score_groups(rewards, _as_groups(validation, drawn))).mean())

    scratch = experiment.folder / "scratch"
    weights, epochs = fine_tune(
        lab.base, lab.tokenizer, demonstrations, score_of, SFT, scratch, seed=lab.seed, log=lambda epoch: None
    )
    shutil.rmtree(scratch, ignore_errors=True)
    target = experiment.folder / "sft"
    shutil.copytree(lab.base, target, dirs_exist_ok=True)
    save_file({n: t.contiguous() for n, t in weights.items()}, target / "model.safetensors", {"format": "pt"})
    return {"epochs": [dataclasses.asdict(epoch) for epoch in epochs]}


def _as_groups(asked: Sequence[Asked], drawn: Sequence[Rollout]) -> list[Group]:
    """Returns one completion of each prompt, in the form that the reward model reads."""
    return [Group(each.token_ids, (rollout.token_ids,)) for each, rollout in zip(asked, drawn, strict=True)]


def make_rewards(experiment: Experiment, train: Sequence[Asked]) -> dict[str, Any]:
    """Fits what PPO and PPO-ptx learn from: rankings of what the SFT policy writes, one of each prompt."""
    lab, size, sft = experiment.lab, experiment.size, experiment.folder / "sft"
    shared = SharedLayers(load_model(sft))
    lab.load(sft)
    rankings = add_rankings(lab, shared, Rankings(), train, lab.labelers(train[:32]), size.ks, salt=1000)
    rewards = fit_rewards(shared, rankings, len(rankings.examples), lab.seed)
    save_rewards(rewards, experiment.folder / "rewards.safetensors")
    comparisons = sum(len(each.ranks) * (len(each.ranks) - 1) // 2 for each in rankings.examples)
    return {"accuracy": rewards.accuracy, "num_rankings": len(rankings.examples), "num_comparisons": comparisons}


def optimise(experiment: Experiment, train: Sequence[Asked], name: str) -> dict[str, Any]:
    """Runs PPO or PPO-ptx from the SFT policy, on rewards that stay as they are."""
    folder, sft = experiment.folder, experiment.folder / "sft"
    shared = SharedLayers(load_model(sft))
    rewards = load_rewards(shared, folder / "rewards.safetensors", None)
    text = _write_pretraining_text(folder / "wikitext.txt") if name == "ppo-ptx" else None
    config = _ppo_config(experiment.size, experiment.size.num_rounds, text)
    experiment.lab.load(sft)
    rounds, reason = _run_ppo(experiment, train, config, shared, sft, rewards, name)
    return {"rounds": rounds, "stopped": reason}


def optimise_online(experiment: Experiment, train: Sequence[Asked], name: str) -> dict[str, Any]:
    """Runs PPO on rankings that come in parts, each of the current policy; each part fits new rewards to all."""
    lab, size, sft = experiment.lab, experiment.size, experiment.folder / "sft"
    parts = size.refreshes + 1
    config = _ppo_config(size, size.num_rounds // parts, None)
    shared, start, rankings = SharedLayers(load_model(sft)), sft, Rankings()
    lab.load(sft)
    labelers = lab.labelers(train[:32])
    rounds: list[dict[str, Any]] = []
    reasons, accuracy = [], []
    for part in range(parts):
        asked = train[part * len(train) // parts : (part + 1) * len(train) // parts]
        rankings = add_rankings(lab, shared, rankings, asked, labelers, size.ks, salt=1000 * (part + 1))
        rewards = fit_rewards(shared, rankings, len(train) // parts, lab.seed)
        accuracy.append(rewards.accuracy)
        more, reason = _run_ppo(experiment, train, config, shared, start, rewards, name, part)
        rounds += more
        reasons += [f"part {part + 1}: {reason}"] if reason else []
        start = experiment.folder / name
    return {"rounds": rounds, "stopped": "; ".join(reasons) or None, "accuracy": accuracy}


def _run_ppo(
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
    policy = upper_layers_of(start, shared, min(config.num_frozen_layers, shared.num_layers - 1), LoraConfig())
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
        rounds.append({**saved, "part": part, "utility": utilities[-1]})
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
    """Writes WikiText-2's validation part, a paragraph a line; the test part measures."""
    paragraphs = [line for line in read_wikitext("valid").splitlines() if line.strip()]
    random.Random(0).shuffle(paragraphs)
    path.write_text("\n".join(paragraphs))
    return path
