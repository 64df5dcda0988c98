"""Data is read as it is, and split by prompt."""

import math
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from bench.learning.data import DataMissingError, data_file
from bench.learning.hh_rlhf import Comparison, Message, as_group, is_held_out, read_comparisons, split
from deploy.models import make_tiny_llama
from tests.bench.learning.data import ASKED, comparison, write_hh


def test_missing_data_is_named_with_the_variable_that_says_where_it_is(data: Path) -> None:
    with pytest.raises(DataMissingError, match=r"no hh-rlhf/x\.gz in .*set ALIGND_TEST_DATA"):
        data_file("hh-rlhf/x.gz")
    with pytest.raises(DataMissingError, match="helpful-base"):
        read_comparisons()


def test_a_comparison_is_the_shared_turns_and_two_last_answers(data: Path) -> None:
    talk = "\n\nHuman: Hi\n\nAssistant: Hello!\n\nHuman: Is honey\n\nsweet?\n\nAssistant: "
    write_hh(data, "helpful-base", [(talk + "It is.", talk + "No. ")])
    (found,) = read_comparisons(["helpful-base"]).comparisons
    turns = (Message("user", "Hi"), Message("assistant", "Hello!"), Message("user", "Is honey\n\nsweet?"))
    assert found == Comparison(turns, "It is.", "No.", "helpful-base")


def test_malformed_records_are_dropped_and_counted(data: Path) -> None:
    other = "\n\nHuman: Is salt sweet?\n\nAssistant: No."
    twice = "\n\nHuman: Is honey sweet?\n\nHuman: Well?\n\nAssistant: Yes."
    records = [
        (ASKED + " Yes.", ASKED + " No."),
        (ASKED + " Yes.", other),
        (ASKED + " Yes.", ASKED + " "),
        (ASKED + " Yes.", ASKED + "  Yes."),
        (twice, twice),
        ("Honey is sweet.", ASKED + " No."),
    ]
    write_hh(data, "harmless-base", records)
    found = read_comparisons(["harmless-base"])
    assert len(found.comparisons) == 1
    assert found.dropped == {
        "no shared prompt": 1,
        "empty completion": 1,
        "equal completions": 1,
        "turns do not alternate, or one is empty": 2,
    }


def test_split_is_by_first_turn_the_same_in_every_run_and_of_the_share_asked_for() -> None:
    comparisons = [comparison("a", "b", f"Prompt {i // 2}") for i in range(4000)]
    train, held_out = split(comparisons, share=0.25)
    assert (train, held_out) == split(comparisons, share=0.25)
    assert len(train) + len(held_out) == len(comparisons)
    assert {c.prompt for c in train}.isdisjoint(c.prompt for c in held_out)
    # 2000 prompts: three standard errors of a share of a quarter.
    assert abs(len(held_out) / 4000 - 0.25) < 3 * math.sqrt(0.25 * 0.75 / 2000)
    assert is_held_out(" Is  HONEY sweet? ") == is_held_out("is honey sweet?")
    again, _ = split(train, share=0.25, salt="validation")
    assert 0 < len(again) < len(train)


def test_what_people_wrote_is_encoded_as_the_service_encodes_it(tmp_path: Path) -> None:
    """A template may close a turn with another token than the tokenizer's own end, and nobody can type either."""
    tokenizer = AutoTokenizer.from_pretrained(make_tiny_llama(tmp_path / "tiny"))
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|endoftext|>")
    turn_end = tokenizer.convert_tokens_to_ids("<|endoftext|>")
    turns = (Message("user", "Is <|endoftext|> sweet?"), Message("assistant", "Yes."), Message("user", "Why?"))
    group = as_group(tokenizer, turns, ["<|endoftext|>", "So " * 40], max_prompt_tokens=99, max_completion_tokens=16)
    assert group.prompt.count(turn_end) == 3
    assert [each.count(turn_end) for each in group.completions] == [1, 1]
    assert [each[-1] for each in group.completions] == [turn_end] * 2
    assert len(group.completions[1]) == 17
    cut = as_group(tokenizer, turns, ["No."], max_prompt_tokens=5, max_completion_tokens=16)
    assert cut.prompt == group.prompt[-5:]
