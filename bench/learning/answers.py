"""What policies answer to held-out prompts, what that is truly worth, and what the reward model thinks of it."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.learning.experiment import Experiment, Size
from bench.learning.hh_rlhf import Message
from bench.learning.lab import Asked, Lab
from bench.learning.prompts import few_shot_prefix, held_out_prompts
from bench.learning.rewards import load_rewards
from bench.learning.stages import once
from deploy.simulation.utility import measure
from training.data.groups import Group
from training.models.policy import SharedLayers, load_model
from training.models.reward import score_groups

_DIGITS = 4
# Above all other salts, and as many as keep apart from the next experiment's seeds.
_FIRST_SALT, _NUM_SALTS = 10_000, 80_000
_NUM_SHOWN = 6


def evaluate(experiment: Experiment, name: str) -> dict[str, Any]:
    """Returns the utility of a policy's completions of the held-out prompts, and the first few texts."""
    lab, prompts, drawn = experiment.lab, held_out_prompts(experiment.size.num_held_out), _drawn(experiment, name)
    texts = [[lab.text(tokens) for tokens in each] for each in drawn["token_ids"]]
    worth = [measure(lab.utility, prompt, each) for prompt, each in zip(prompts, texts, strict=True)]
    return {
        "utilities": [[round(value, _DIGITS) for value in values] for values in worth],
        "texts": [each[0] for each in texts[:_NUM_SHOWN]],
        "prompts": prompts[:_NUM_SHOWN],
        "seconds": drawn["seconds"],
    }


def score_answers(experiment: Experiment) -> dict[str, Any]:
    """Returns the reward model's score of each completion that the SFT policy is evaluated by, in the same order."""
    folder, size = experiment.folder, experiment.size
    asked = experiment.lab.ask(held_out_prompts(size.num_held_out))
    rewards = load_rewards(SharedLayers(load_model(folder / "sft")), folder / "rewards.safetensors", None)
    scores = score_groups(rewards.model, as_groups(asked, _drawn(experiment, "sft")["token_ids"]))
    return {"scores": [[round(score, _DIGITS) for score in each.tolist()] for each in scores]}


def _drawn(experiment: Experiment, name: str) -> dict[str, Any]:
    """Returns a policy's completions of the held-out prompts, in tokens, from now or from an earlier attempt.

    The base and the few-shot policy are the same in every experiment, so their completions are drawn once.
    """
    lab, size = experiment.lab, experiment.size
    count = size.num_scored if name == "sft" else size.num_samples
    if name not in ("base", "few-shot"):
        return experiment.once(f"drawn-{name}", lambda: _answer(lab, name, experiment.folder / name, size, count))
    shots = few_shot_prefix() if name == "few-shot" else ()
    always = dataclasses.replace(lab, seed=0)
    return once(experiment.shared, f"drawn-{name}", lambda: _answer(always, name, lab.base, size, count, shots))


def _answer(lab: Lab, name: str, policy: Path, size: Size, count: int, shots: Sequence[Message] = ()) -> dict[str, Any]:
    """Draws a policy's completions with seeds of its own: pairs of completions with one seed are not independent."""
    lab.load(policy)
    salt = _FIRST_SALT + zlib.crc32(name.encode()) % _NUM_SALTS
    drawn = lab.draw(lab.ask(held_out_prompts(size.num_held_out), shots), count, salt)
    return {"token_ids": [[list(each.token_ids) for each in rollouts] for rollouts in drawn]}


def as_groups(asked: Sequence[Asked], completions: Sequence[Sequence[Sequence[int]]]) -> list[Group]:
    """Returns prompts and their completions in the form that the reward model reads."""
    return [
        Group(each.token_ids, tuple(tuple(tokens) for tokens in drawn))
        for each, drawn in zip(asked, completions, strict=True)
    ]
