"""Real people's preferences: the reward model on HH-RLHF against chance, length alone and a bag of words."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from bench.learning.baselines import bag_of_words_baseline, length_baseline, right
from bench.learning.hh_rlhf import Comparison, beginning, is_held_out, read_comparisons
from training.config import RewardModelConfig
from training.data.groups import Group, RankedExample
from training.models.policy import SharedLayers, load_model
from training.models.reward import RewardModel, group_features
from training.rewards.evaluation import evaluate_rewards
from training.rewards.fit import fit

_SOURCE = "helpful-base"
_MAX_PROMPT_TOKENS, _MAX_COMPLETION_TOKENS = 256, 160
_CONFIG = RewardModelConfig(max_labeler_share=1.0)


def human_preferences(model: Path, num_seeds: int, num_comparisons: int) -> dict[str, Any]:
    """Returns what is right and what is wrong on splits of the same comparisons, one split a seed.

    Dialogues that begin alike are on one side of a split, and have one number in `prompts`.
    """
    drawn = random.Random(0).sample(read_comparisons((_SOURCE,)).comparisons, num_comparisons)
    tokenizer = AutoTokenizer.from_pretrained(model)
    shared = SharedLayers(load_model(model))
    examples = [_as_example(tokenizer, each, index) for index, each in enumerate(drawn)]
    # What the heads read does not depend on the split.
    features = group_features(RewardModel(shared, _CONFIG), [example.group for example in examples])
    return {"seeds": [_one_split(shared, drawn, examples, features, seed) for seed in range(num_seeds)]}


def _one_split(
    shared: SharedLayers,
    drawn: Sequence[Comparison],
    examples: Sequence[RankedExample],
    features: Sequence[Tensor],
    seed: int,
) -> dict[str, Any]:
    """Fits and evaluates on the split of this seed."""
    begins = [beginning(each.prompt[0].text) for each in drawn]
    is_out = [is_held_out(text, salt=str(seed)) for text in begins]
    train, held_out = ([index for index, out in enumerate(is_out) if out == side] for side in (False, True))
    rewards = RewardModel(shared, _CONFIG)
    fit(
        rewards, [examples[i] for i in train], _CONFIG, seed=seed, warm=False, log=lambda *_: None,
        features=[features[i] for i in train],
    )  # fmt: skip
    evaluation = evaluate_rewards(rewards, [examples[i] for i in held_out], [features[i] for i in held_out])
    assert evaluation is not None
    margins = [chosen - rejected for chosen, rejected in (rewards.score(features[i]).tolist() for i in held_out)]
    sides = [drawn[i] for i in train], [drawn[i] for i in held_out]
    return {
        "reward model": right(margins),
        "bag of words": bag_of_words_baseline(*sides).right,
        "length": length_baseline(*sides).right,
        "held_out": held_out,
        "prompts": [begins.index(begins[i]) for i in held_out],
        "num_train": len(train),
        "evaluation": asdict(evaluation),
    }


def _as_example(tokenizer: PreTrainedTokenizerBase, each: Comparison, seq: int) -> RankedExample:
    """Returns a comparison as a ranking of two. Of a long conversation only the end is kept."""
    messages = [{"role": message.role, "content": message.text} for message in each.prompt]
    prompt: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    completions = tuple(
        (*tokenizer.encode(text, add_special_tokens=False)[:_MAX_COMPLETION_TOKENS], int(tokenizer.eos_token_id))
        for text in (each.chosen, each.rejected)
    )
    return RankedExample(Group(tuple(prompt[-_MAX_PROMPT_TOKENS:]), completions), (0, 1), each.source, seq)
