"""Real people's preferences: what reward models of three kinds learn from more and more comparisons of HH-RLHF.

Rivals are the length of a completion and a bag of its words. All are measured on the same held-out comparisons. Every
fit leaves its result in a folder, and is skipped if the result is there. So do the features that heads alone read: they
are the same for all splits, and computing them costs more than all fits of heads.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from bench.learning.baselines import bag_of_words_baseline, length_baseline, right
from bench.learning.hh_rlhf import Comparison, as_group, beginning, is_held_out, read_comparisons
from bench.learning.low_rank import adapt
from bench.learning.stages import begin, once
from feedback.durable import replace_file_by
from policies.precision import compute_dtype, short_name
from training.config import LoraConfig, RewardModelConfig
from training.data.groups import RankedExample
from training.models.device import training_device
from training.models.policy import SharedLayers, load_model
from training.models.reward import RewardModel, group_features
from training.rewards.fit import fit

HEADS, LAYERS, LORA = "heads alone", "4 trained layers", "LoRA"
LENGTH, WORDS = "length", "bag of words"
_HELD_OUT_SHARE = 0.2
_MAX_PROMPT_TOKENS, _MAX_COMPLETION_TOKENS = 256, 160
_COMPARISONS_A_FILE = 64
_CONFIG = RewardModelConfig(max_labeler_share=1.0)
_CONFIGS = {
    HEADS: _CONFIG,
    LAYERS: _CONFIG.model_copy(update={"num_trained_layers": 4}),
    # On all layers below the heads, with ten times the learning rate of full weights.
    LORA: _CONFIG.model_copy(update={"num_trained_layers": _CONFIG.num_layers, "learning_rate": 2e-4}),
}
_ADAPTERS = LoraConfig(rank=8)


@dataclass(frozen=True)
class HumanSize:
    """How much is compared. Each kind is fitted to each of its numbers of comparisons."""

    num_comparisons: int | None
    """Comparisons, train and held out together; None for all that are usable."""
    numbers: dict[str, tuple[int, ...]]
    """Training comparisons, by kind. Rivals have the numbers of heads alone, among which those of all kinds are."""


HUMAN_QUICK = HumanSize(112, {HEADS: (32, 72), LAYERS: (32,), LORA: (32,)})
HUMAN_FULL = HumanSize(None, dict.fromkeys(_CONFIGS, (250, 500, 1000, 2000, 4500)))


@dataclass(frozen=True)
class _People:
    """The comparisons, in the same random order always, in tokens, and what heads alone read of them."""

    shared: SharedLayers
    comparisons: Sequence[Comparison]
    examples: Sequence[RankedExample]
    features: Sequence[Tensor]


def human_preferences(model: Path, size: HumanSize, num_seeds: int, folder: Path, features: Path) -> dict[str, Any]:
    """Returns what each kind gets right on splits of the same comparisons, one split a seed.

    Dialogues that begin alike are on one side of a split, and have one number in `prompts`. The training comparisons of
    a smaller number are among those of a greater one. `folder` has the fits' results, and `features` what heads read.

    Raises:
        MadeOtherwiseError: `folder` or `features` was made with other settings.
    """
    read = (_MAX_PROMPT_TOKENS, _MAX_COMPLETION_TOKENS, short_name(compute_dtype(training_device())))
    begin(features, repr((_CONFIG.num_layers, *read)))
    begin(folder, repr((size, _HELD_OUT_SHARE, _CONFIGS, _ADAPTERS, *read)))
    people = _people(model, size, features)
    return {"seeds": [_one_split(people, size, seed, folder) for seed in range(num_seeds)]}


def _people(model: Path, size: HumanSize, folder: Path) -> _People:
    """Reads the comparisons, and reads or computes their features."""
    usable = read_comparisons().comparisons
    # Shuffled before it is cut, so that a smaller size has the first comparisons of a greater one.
    drawn = random.Random(0).sample(usable, len(usable))[: size.num_comparisons]
    tokenizer = AutoTokenizer.from_pretrained(model)
    shared = SharedLayers(load_model(model))
    examples = [_as_example(tokenizer, each, index) for index, each in enumerate(drawn)]
    heads = RewardModel(shared, _CONFIG)
    features: list[Tensor] = []
    for first in range(0, len(examples), _COMPARISONS_A_FILE):
        part = examples[first : first + _COMPARISONS_A_FILE]
        path = folder / f"{first:05}-{len(part)}.safetensors"
        if not path.exists():
            found = torch.stack(group_features(heads, [example.group for example in part])).cpu()
            replace_file_by(path, lambda draft: save_file({"features": found}, draft))  # noqa: B023
        features += load_file(path)["features"].to(shared.device)
    return _People(shared, drawn, examples, features)


def _as_example(tokenizer: PreTrainedTokenizerBase, each: Comparison, seq: int) -> RankedExample:
    """Returns a comparison as a ranking of two. Of a long conversation only the end is kept."""
    group = as_group(
        tokenizer, each.prompt, (each.chosen, each.rejected),
        max_prompt_tokens=_MAX_PROMPT_TOKENS, max_completion_tokens=_MAX_COMPLETION_TOKENS,
    )  # fmt: skip
    return RankedExample(group, (0, 1), each.source, seq)


def _one_split(people: _People, size: HumanSize, seed: int, folder: Path) -> dict[str, Any]:
    """Fits and evaluates every kind by every number on the split of this seed."""
    begins = [beginning(each.prompt[0].text) for each in people.comparisons]
    is_out = [is_held_out(text, _HELD_OUT_SHARE, salt=str(seed)) for text in begins]
    held_out = [index for index, out in enumerate(is_out) if out]
    train = [index for index, out in enumerate(is_out) if not out]
    random.Random(seed).shuffle(train)
    found: dict[str, dict[str, list[float]]] = {}
    for kind in (LENGTH, WORDS, *size.numbers):
        for number in size.numbers.get(kind, size.numbers[HEADS]):
            if number > len(train):
                raise ValueError(f"split {seed} has {len(train)} comparisons to train with, not {number}")
            stage = once(
                folder,
                f"{kind.replace(' ', '-')}-{number}-{seed}",
                lambda: {"right": _right(people, kind, train[:number], held_out, seed)},  # noqa: B023
            )
            found.setdefault(kind, {})[str(number)] = stage["right"]
    return {
        "held_out": held_out,
        "prompts": [begins.index(begins[i]) for i in held_out],
        "sources": [people.comparisons[i].source for i in held_out],
        "right": found,
    }


def _right(people: _People, kind: str, train: Sequence[int], held_out: Sequence[int], seed: int) -> list[float]:
    """Returns 1 for each held-out comparison that this kind orders correctly, else 0; 0.5 where scores are equal."""
    sides = [people.comparisons[i] for i in train], [people.comparisons[i] for i in held_out]
    if kind == LENGTH:
        return list(length_baseline(*sides).right)
    if kind == WORDS:
        return list(bag_of_words_baseline(*sides).right)
    config = _CONFIGS[kind]
    rewards = RewardModel(people.shared, config)
    if kind == LORA:
        adapt(rewards, _ADAPTERS.rank, _ADAPTERS.alpha, seed)
    fit(
        rewards, [people.examples[i] for i in train], config, seed=seed, warm=False, log=lambda *_: None,
        features=[people.features[i] for i in train],
    )  # fmt: skip
    if kind == HEADS:
        features = [people.features[i] for i in held_out]
    else:
        features = group_features(rewards, [people.examples[i].group for i in held_out])
    return list(right(chosen - rejected for chosen, rejected in (rewards.score(each).tolist() for each in features)))
