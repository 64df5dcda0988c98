"""Real people's preferences: the reward model on HH-RLHF against chance, length alone and a bag of words."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from bench.learning.baselines import bag_of_words_baseline, length_baseline
from bench.learning.hh_rlhf import Comparison, read_comparisons, split
from training.config import RewardModelConfig
from training.groups import Group, RankedExample
from training.policy_model import SharedLayers, load_model
from training.reward_evaluation import evaluate_rewards
from training.reward_fit import fit
from training.reward_model import RewardModel

SOURCE = "helpful-base"
MAX_PROMPT_TOKENS, MAX_COMPLETION_TOKENS = 256, 160
CONFIG = RewardModelConfig(max_labeler_share=1.0)


def human_preferences(model: Path, seed: int, num_train: int, num_held_out: int) -> dict[str, Any]:
    """Held-out accuracies on one split of the data, all learned from the same comparisons."""
    train, held_out = split(read_comparisons((SOURCE,)).comparisons, salt=str(seed))
    train, held_out = train[:num_train], held_out[:num_held_out]
    tokenizer = AutoTokenizer.from_pretrained(model)
    shared = SharedLayers(load_model(model))
    rewards = RewardModel(shared, CONFIG)
    examples = [as_example(tokenizer, each, index) for index, each in enumerate(train)]
    fit(rewards, shared, examples, CONFIG, seed=seed, warm=False, log=lambda *_: None)
    judged = evaluate_rewards(rewards, shared, [as_example(tokenizer, each, 0) for each in held_out])
    assert judged is not None
    length, words = length_baseline(train, held_out), bag_of_words_baseline(train, held_out)
    return {
        "reward model": [judged.accuracy, judged.low, judged.high],
        "length": [length.learnt.value, length.learnt.low, length.learnt.high],
        "bag of words": [words.accuracy.value, words.accuracy.low, words.accuracy.high],
        "num_train": len(train),
        "num_held_out": len(held_out),
        "evaluation": asdict(judged),
    }


def as_example(tokenizer: PreTrainedTokenizerBase, each: Comparison, seq: int) -> RankedExample:
    """A comparison as a ranking of two. Of a long conversation the end is read."""
    messages = [{"role": message.role, "content": message.text} for message in each.prompt]
    prompt: Any = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    completions = tuple(
        (*tokenizer.encode(text, add_special_tokens=False)[:MAX_COMPLETION_TOKENS], int(tokenizer.eos_token_id))
        for text in (each.chosen, each.rejected)
    )
    return RankedExample(Group(tuple(prompt[-MAX_PROMPT_TOKENS:]), completions), (0, 1), each.source, seq)
