"""Which rankings and demonstrations are learned from, and which only measure."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from alignd.v1 import types_pb2
from feedback.bus.contract import Position
from feedback.store.stored import RankedCompletion, RankedGroup, StoredDemonstration, StoredPrompt
from training.data.dataset import Dataset, log_ranges, make_dataset
from training.data.split import Side, demonstration_sides, is_held_out

SHARE = 0.3
LEARNED = next(f"u{i}" for i in range(100) if not is_held_out(f"u{i}", SHARE))
HELD_OUT = next(f"u{i}" for i in range(100) if is_held_out(f"u{i}", SHARE))


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny_folder)
    return loaded


def completion(text: str, rank: int, *, ended: bool = True) -> RankedCompletion:
    return RankedCompletion(f"c-{text}", text, ended, rank, 1)


def group(seq: int, user: str, text: str, *completions: RankedCompletion, first: str = "") -> RankedGroup:
    """Returns a ranking of a prompt that `first` was the first to send: the same user, unless given."""
    ranked = completions or (completion("yes", 0), completion("no", 1))
    position = Position("rankings", seq % 2, seq)
    return RankedGroup(seq, f"r{seq}", f"s{seq}", user, types_pb2.Prompt(text=text), ranked, position, first or user)


def dataset(tokenizer: PreTrainedTokenizerBase, *groups: RankedGroup, max_group_tokens: int = 256) -> Dataset:
    """Returns the dataset of these rankings, and of their prompts as the store lists them."""
    senders = {each.prompt.text: each.first_user_id for each in groups}
    prompts = [StoredPrompt(f"s-{text}", user, types_pb2.Prompt(text=text)) for text, user in senders.items()]
    return make_dataset(
        tokenizer, groups, prompts,
        held_out_share=SHARE, max_prompt_tokens=64, max_group_tokens=max_group_tokens,
    )  # fmt: skip


def test_users_are_held_out_by_about_their_share() -> None:
    held_out = [user for user in (f"user {i}" for i in range(2000)) if is_held_out(user, SHARE)]
    assert 540 < len(held_out) < 660
    assert not any(is_held_out(f"user {i}", 0.0) for i in range(100))


def test_what_held_out_users_sent_is_never_trained_on(tokenizer: PreTrainedTokenizerBase) -> None:
    mixed = group(3, LEARNED, "both", first=HELD_OUT)
    data = dataset(tokenizer, group(1, LEARNED, "only learned"), group(2, HELD_OUT, "both"), mixed)
    assert [len(data.training), len(data.held_out)] == [1, 1]
    assert [prompt.text for prompt in data.training_prompts] == ["only learned"]
    assert [prompt.text for prompt in data.held_out_prompts] == ["both"]
    assert [(each.first_offset, each.last_offset) for each in data.rankings] == [(1, 1)]


def test_a_prompt_stays_on_its_side_whoever_sends_it_later(tokenizer: PreTrainedTokenizerBase) -> None:
    first = [group(1, HELD_OUT, "theirs"), group(2, LEARNED, "ours")]
    later = [group(3, LEARNED, "theirs", first=HELD_OUT), group(4, HELD_OUT, "ours", first=LEARNED)]
    for data in (dataset(tokenizer, *first), dataset(tokenizer, *first, *later)):
        assert [prompt.text for prompt in data.held_out_prompts] == ["theirs"]
        assert [prompt.text for prompt in data.training_prompts] == ["ours"]
        assert [example.seq for example in data.held_out] == [1]
        assert [example.seq for example in data.training] == [2]


def test_the_first_sender_decides_though_the_prompt_is_no_longer_listed(tokenizer: PreTrainedTokenizerBase) -> None:
    groups = [group(2, LEARNED, "both", first=HELD_OUT), group(3, LEARNED, "only learned")]
    data = make_dataset(tokenizer, groups, [], held_out_share=SHARE, max_prompt_tokens=64, max_group_tokens=256)
    assert [example.seq for example in data.training] == [3]


@pytest.mark.parametrize("validation_share", [0.1, SHARE, 0.6])
def test_sft_learns_from_nothing_that_measures(validation_share: float) -> None:
    users = [f"u{i}" for i in range(100)]
    stored = [
        StoredDemonstration(seq, f"d{seq}", f"s{first}", user, types_pb2.Prompt(text=f"What of {first}?"), user, first)
        for seq, (user, first) in enumerate((user, first) for user in users for first in users)
    ]
    sides = demonstration_sides(stored, held_out_share=SHARE, validation_share=validation_share)
    by_side = {side: [each for each, found in zip(stored, sides, strict=True) if found is side] for side in Side}
    assert by_side[Side.LEARNED]
    for each in by_side[Side.LEARNED]:
        assert not any(is_held_out(user, max(SHARE, validation_share)) for user in (each.user_id, each.first_user_id))
    assert by_side[Side.MEASURED]
    for each in by_side[Side.MEASURED]:
        assert is_held_out(each.user_id, validation_share)
        assert is_held_out(each.first_user_id, max(SHARE, validation_share))


def test_the_longest_completions_are_left_out_until_a_ranking_has_room(tokenizer: PreTrainedTokenizerBase) -> None:
    ranked = [completion("short", 1), completion("word " * 50, 0), completion("middling " * 3, 2)]
    fits, cut, alone = (
        dataset(tokenizer, group(1, LEARNED, "why", *ranked), max_group_tokens=room).training for room in (256, 40, 4)
    )
    assert [example.ranks for example in fits] == [(1, 0, 2)]
    assert [example.ranks for example in cut] == [(1, 2)]
    assert len(cut[0].group) <= 40
    assert alone == ()


def test_rankings_without_a_comparison_and_long_prompts_are_left_out(tokenizer: PreTrainedTokenizerBase) -> None:
    ties = group(1, LEARNED, "ties", completion("a", 0), completion("b", 0))
    empty = group(2, LEARNED, "empty", completion("a", 0), completion("", 1, ended=False))
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
