"""What is learned from and what only measures."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from alignd.v1 import types_pb2
from feedback.bus import Position
from feedback.store import RankedCompletion, RankedGroup, StoredPrompt
from training.dataset import Dataset, completion_token_ids, is_held_out, log_ranges, make_dataset

STOP, LENGTH = types_pb2.FINISH_REASON_STOP, types_pb2.FINISH_REASON_LENGTH
SHARE = 0.3
LEARNED = next(f"u{i}" for i in range(100) if not is_held_out(f"u{i}", SHARE))
HELD_OUT = next(f"u{i}" for i in range(100) if is_held_out(f"u{i}", SHARE))


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny_folder)
    return loaded


def completion(text: str, rank: int, finish_reason: types_pb2.FinishReason = STOP) -> RankedCompletion:
    return RankedCompletion(f"c-{text}", text, finish_reason, rank, 1)


def group(seq: int, user: str, text: str, *completions: RankedCompletion) -> RankedGroup:
    ranked = completions or (completion("yes", 0), completion("no", 1))
    position = Position("rankings", seq % 2, seq)
    return RankedGroup(seq, f"r{seq}", f"s{seq}", user, types_pb2.Prompt(text=text), ranked, position)


def dataset(tokenizer: PreTrainedTokenizerBase, *groups: RankedGroup, max_prompt_tokens: int = 64) -> Dataset:
    prompts = [StoredPrompt(each.sample_id, each.user_id, each.prompt) for each in groups]
    return make_dataset(tokenizer, groups, prompts, held_out_share=SHARE, max_prompt_tokens=max_prompt_tokens)


def test_users_are_held_out_by_about_their_share() -> None:
    held_out = [user for user in (f"user {i}" for i in range(2000)) if is_held_out(user, SHARE)]
    assert 540 < len(held_out) < 660
    assert not any(is_held_out(f"user {i}", 0.0) for i in range(100))


def test_what_held_out_users_sent_is_never_trained_on(tokenizer: PreTrainedTokenizerBase) -> None:
    data = dataset(tokenizer, group(1, LEARNED, "only learned"), group(2, HELD_OUT, "both"), group(3, LEARNED, "both"))
    assert [len(data.training), len(data.held_out)] == [1, 1]
    assert [prompt.text for prompt in data.training_prompts] == ["only learned"]
    assert [prompt.text for prompt in data.held_out_prompts] == ["both"]
    assert [(each.first_offset, each.last_offset) for each in data.rankings] == [(1, 1)]


def test_the_end_token_stands_only_where_the_policy_ended(tokenizer: PreTrainedTokenizerBase) -> None:
    plain = tuple(tokenizer.encode("in the garden", add_special_tokens=False))
    assert completion_token_ids(tokenizer, completion("in the garden", 0)) == (*plain, tokenizer.eos_token_id)
    assert completion_token_ids(tokenizer, completion("in the garden", 0, LENGTH)) == plain
    spelt = completion_token_ids(tokenizer, completion("<|im_end|>", 0, LENGTH))
    assert tokenizer.eos_token_id not in spelt


def test_rankings_without_a_comparison_and_long_prompts_are_left_out(tokenizer: PreTrainedTokenizerBase) -> None:
    ties = group(1, LEARNED, "ties", completion("a", 0), completion("b", 0))
    empty = group(2, LEARNED, "empty", completion("a", 0), completion("", 1, LENGTH))
    long = group(3, LEARNED, "word " * 100)
    good = group(4, LEARNED, "good", completion("a", 1), completion("b", 0), completion("c", 1))
    data = dataset(tokenizer, ties, empty, long, good)
    (example,) = data.training
    assert example.ranks == (1, 0, 1)
    assert [len(each) for each in example.group.completions] == [2, 2, 2]
    assert [prompt.text for prompt in data.training_prompts] == ["ties", "empty", "good"]


def test_ranges_span_each_partition() -> None:
    ranges = log_ranges([group(seq, LEARNED, "x") for seq in (4, 2, 7, 9)])
    assert [(each.partition, each.first_offset, each.last_offset) for each in ranges] == [(0, 2, 4), (1, 7, 9)]
