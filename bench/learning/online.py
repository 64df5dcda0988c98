"""What being online is worth at equal rankings: PPO on few rankings, all of the SFT policy's answers or of its own.

There are three arms, from one SFT policy. `offline` learns from rankings of what the SFT policy writes. `online` has
them in parts, each of what the policy writes by then, and fits its rewards anew to all. `online-chosen` also chooses
what is ranked: the samples whose order the heads disagree about most, among several times as many, as the trainer does
(training.rewards.label_next). The first part is the same in all arms.

PPO runs in as many stretches as there are parts, in every arm alike, with the learning rates of one schedule: they fall
in the last stretch alone. A refresh begins the value model and Adam's moments anew, as in the service, so that each
stretch warms up.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from bench.learning.answers import evaluate
from bench.learning.demonstrate import make_sft
from bench.learning.experiment import Experiment
from bench.learning.instruct import how_made
from bench.learning.lab import Asked, Lab
from bench.learning.optimise import run_ppo
from bench.learning.prompts import train_prompts
from bench.learning.rewards import REWARD_MODEL, Rankings, Rewards, fit_rewards
from bench.learning.stages import begin
from deploy.simulation.labelers import Labeler
from training.config import PpoConfig
from training.models.policy import SharedLayers, load_model
from training.models.reward import RewardModel, group_features
from training.rewards.evaluation import evaluate_rewards
from training.rewards.label_next import uncertainty

OFFLINE, ONLINE, CHOSEN = ARMS = ("offline", "online", "online-chosen")


@dataclass(frozen=True)
class OnlineSize:
    """How many rankings an arm has, and in how many parts."""

    num_rankings: int
    num_parts: int = 3
    num_candidates: int = 3
    """Samples for each ranking, of which `online-chosen` takes one."""

    @property
    def part_size(self) -> int:
        """Rankings in one part."""
        return self.num_rankings // self.num_parts


ONLINE_QUICK, ONLINE_FULL = OnlineSize(32, num_parts=2, num_candidates=2), OnlineSize(96)


def run_online(experiment: Experiment, chat: Experiment, size: OnlineSize) -> dict[str, Any]:
    """Runs the arms from the SFT policy of `chat`, which is made there unless it is there, and returns all results.

    So it must not run while `chat` itself does.
    """
    for each in (chat.folder, chat.shared):
        begin(each, how_made(chat.size))
    train = chat.lab.ask(train_prompts(chat.size.num_rankings))
    chat.once("sft", lambda: make_sft(chat, train))
    begin(experiment.folder, f"{size}\n{how_made(experiment.size)}")
    found = {"answers-sft": evaluate(chat, "sft")}
    for arm in ARMS:
        found[arm] = experiment.once(arm, lambda: _run_arm(experiment, chat, size, train, arm))  # noqa: B023
        found[f"answers-{arm}"] = evaluate(experiment, arm)
    return found


@dataclass(frozen=True)
class _Arm:
    """One arm: what it stands on, and whom and what it asks."""

    name: str
    lab: Lab
    shared: SharedLayers
    train: Sequence[Asked]
    labelers: Sequence[Labeler]
    ks: range
    size: OnlineSize

    @property
    def ranked_before(self) -> list[list[int]]:
        """For each stretch, the parts of the rankings that are given before it. The SFT policy's are all first."""
        parts = list(range(self.size.num_parts))
        return [parts, *([] for _ in parts[1:])] if self.name == OFFLINE else [[part] for part in parts]


def _run_arm(
    experiment: Experiment, chat: Experiment, size: OnlineSize, train: Sequence[Asked], name: str
) -> dict[str, Any]:
    """Returns the rounds of all stretches, why PPO stopped itself, and how well the rewards knew what was ranked."""
    lab, policy = experiment.lab, chat.folder / "sft"
    lab.load(policy)
    shared = SharedLayers(load_model(policy))
    arm = _Arm(name, lab, shared, train, lab.labelers(train[:32]), experiment.size.ks, size)
    num_of_sft = size.part_size * len(arm.ranked_before[0])
    rankings = Rankings()
    rewards: Rewards | None = None
    rounds, reasons, told = [], [], []
    configs = stretches(experiment.size.ppo, size.num_parts)
    for stretch, (config, parts) in enumerate(zip(configs, arm.ranked_before, strict=True)):
        for part in parts:
            rankings, about = _add_part(arm, rankings, rewards, part)
            told.append(about)
        if parts or not rewards:
            rewards = fit_rewards(shared, rankings, num_of_sft, lab.seed)
        more, reason = run_ppo(experiment, train, config, shared, policy, rewards, name, stretch)
        policy = experiment.folder / name
        rounds += more
        reasons += [f"stretch {stretch + 1}: {reason}"] if reason else []
    return {"rounds": rounds, "stopped": "; ".join(reasons) or None, "parts": told}


def _add_part(arm: _Arm, known: Rankings, rewards: Rewards | None, part: int) -> tuple[Rankings, dict[str, Any]]:
    """Returns `known` and a part more, of answers by the policy that is loaded, and what the rewards knew of these."""
    ranked, size = {example.group.prompt for example in known.examples}, arm.size
    unranked = [each for each in arm.train if each.token_ids not in ranked]
    chooses = arm.name == CHOSEN and rewards is not None
    candidates = unranked[: size.part_size * (size.num_candidates if chooses else 1)]
    samples = arm.lab.sample(candidates, arm.ks, salt=1000 * (part + 1))
    features = group_features(RewardModel(arm.shared, REWARD_MODEL), [each.group for each in samples])
    about: dict[str, Any] = {}
    chosen = list(range(len(samples)))
    if rewards:
        with torch.no_grad():
            doubts = [uncertainty(rewards.model.standardized(each) @ rewards.model.heads_FE) for each in features]
        chosen = sorted(sorted(chosen, key=lambda index: -doubts[index])[: size.part_size])
        about["doubt"] = {
            "candidates": statistics.fmean(doubts),
            "chosen": statistics.fmean(doubts[index] for index in chosen),
        }
    new = arm.lab.judge([samples[index] for index in chosen], arm.labelers, first_seq=len(known.examples))
    of_new = [features[index] for index in chosen]
    before = evaluate_rewards(rewards.model, new, of_new) if rewards else None
    if before:
        about["accuracy before"] = [before.accuracy, before.low, before.high]
    about["prompts"] = [arm.train.index(candidates[index]) for index in chosen]
    return Rankings((*known.examples, *new), (*known.features, *of_new)), about


def stretches(config: PpoConfig, count: int) -> list[PpoConfig]:
    """Divides PPO's rounds into stretches, which together have the schedule of one run except that each warms up.

    Raises:
        ValueError: the rounds cannot be divided, or the last stretch is shorter than the fall of the learning rates.
    """
    num_rounds, rest = divmod(config.num_rounds, count)
    if rest or config.num_decay_rounds > num_rounds:
        raise ValueError(f"{config.num_rounds} rounds, {config.num_decay_rounds} of decay, are not {count} stretches")
    last = config.model_copy(update={"num_rounds": num_rounds})
    return [last.model_copy(update={"num_decay_rounds": 0})] * (count - 1) + [last]
