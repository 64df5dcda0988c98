"""What is learned from of a stored completion: the tokens that the policy drew, or its text where there are none."""

from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from alignd.v1 import types_pb2
from feedback.store.stored import DrawnTokens, StoredCompletion
from policies.encoding import plain_token_ids, tokenizer_digest
from training.data.tokens import completion_token_ids, sample_prompt_token_ids, text_token_ids

PROMPT = types_pb2.Prompt(text="Why?")
TEXT = "in the garden"


@pytest.fixture(scope="module")
def tokenizer(tiny_folder: Path) -> PreTrainedTokenizerBase:
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(tiny_folder)
    return loaded


def drawn(
    tokenizer: PreTrainedTokenizerBase, *token_ids: int, cut: bool = False, digest: str | None = None
) -> DrawnTokens:
    return DrawnTokens((7, 8), token_ids, cut, tokenizer_digest(tokenizer) if digest is None else digest)


def letters(tokenizer: PreTrainedTokenizerBase, text: str) -> tuple[int, ...]:
    """Returns a text letter by letter, which is not how a tokenizer writes it."""
    return tuple(token_id for letter in text for token_id in plain_token_ids(tokenizer, letter))


def test_the_tokens_that_were_drawn_are_learned_from(tokenizer: PreTrainedTokenizerBase) -> None:
    spelt = (*letters(tokenizer, TEXT), 2)
    found = drawn(tokenizer, *spelt)
    assert completion_token_ids(tokenizer, PROMPT, StoredCompletion(TEXT, True, found)) == spelt
    assert sample_prompt_token_ids(tokenizer, PROMPT, [StoredCompletion(TEXT, True, found)]) == (7, 8)


@pytest.mark.parametrize("digest", ["", "0" * 64])
def test_another_tokenizers_tokens_and_none_are_encoded_from_text(
    tokenizer: PreTrainedTokenizerBase, digest: str
) -> None:
    expected = (*plain_token_ids(tokenizer, TEXT), tokenizer.eos_token_id)
    found = drawn(tokenizer, 5, 6, 2, digest=digest)
    for tokens in (found, None):
        assert completion_token_ids(tokenizer, PROMPT, StoredCompletion(TEXT, True, tokens)) == expected
        assert completion_token_ids(tokenizer, PROMPT, StoredCompletion(TEXT, False, tokens)) == expected[:-1]
        read = [StoredCompletion(TEXT, True, tokens)]
        assert sample_prompt_token_ids(tokenizer, PROMPT, read) == tuple(plain_token_ids(tokenizer, "Why?"))


def test_a_completion_without_its_tokens_ends_as_the_policy_ended_it(tokenizer: PreTrainedTokenizerBase) -> None:
    """They are left out where a sample would be too long for the bus; which end token it was is known all the same."""
    text, ends = tuple(plain_token_ids(tokenizer, TEXT)), (tokenizer.eos_token_id, tokenizer.pad_token_id)
    for end in ends:
        found = DrawnTokens((), (), False, tokenizer_digest(tokenizer), end)
        assert completion_token_ids(tokenizer, PROMPT, StoredCompletion(TEXT, True, found)) == (*text, end)
        assert sample_prompt_token_ids(tokenizer, PROMPT, [StoredCompletion(TEXT, True, found)]) == (
            *plain_token_ids(tokenizer, "Why?"),
        )
    cut_off = DrawnTokens((), (), False, tokenizer_digest(tokenizer))
    assert completion_token_ids(tokenizer, PROMPT, StoredCompletion(TEXT, False, cut_off)) == text
    anothers = replace(found, tokenizer_digest="0" * 64)
    assert completion_token_ids(tokenizer, PROMPT, StoredCompletion(TEXT, True, anothers)) == (*text, ends[0])


@pytest.mark.parametrize("beyond", [-1, 10**6])
def test_tokens_that_are_not_in_the_vocabulary_are_encoded_from_text(
    tokenizer: PreTrainedTokenizerBase, beyond: int
) -> None:
    completion = StoredCompletion(TEXT, False, drawn(tokenizer, beyond))
    assert completion_token_ids(tokenizer, PROMPT, completion) == tuple(plain_token_ids(tokenizer, TEXT))
    end = DrawnTokens((), (), False, tokenizer_digest(tokenizer), beyond)
    assert completion_token_ids(tokenizer, PROMPT, StoredCompletion(TEXT, True, end))[-1] == tokenizer.eos_token_id


def test_tokens_count_up_to_where_a_stop_string_cut_the_text(tokenizer: PreTrainedTokenizerBase) -> None:
    spelt = letters(tokenizer, "in the garden STOP")
    completion = StoredCompletion(TEXT, False, drawn(tokenizer, *spelt, cut=True))
    assert completion_token_ids(tokenizer, PROMPT, completion) == spelt[: len(TEXT)]


def test_text_that_was_cut_inside_a_token_is_encoded_anew(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = plain_token_ids(tokenizer, " garden")
    pieces = [tokenizer.decode([each]) for each in ids]
    assert len(pieces[0]) > 2, "the tokenizer has a token of several letters"
    text = pieces[0][:-1]
    completion = StoredCompletion(text, False, drawn(tokenizer, *ids, cut=True))
    assert completion_token_ids(tokenizer, PROMPT, completion) == tuple(plain_token_ids(tokenizer, text))


def test_a_character_of_several_tokens_is_cut_whole(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = tuple(plain_token_ids(tokenizer, "aé|x"))
    assert len(ids) > 4, "é has two tokens"
    completion = StoredCompletion("aé", False, drawn(tokenizer, *ids, cut=True))
    assert completion_token_ids(tokenizer, PROMPT, completion) == ids[:3]


def test_a_text_that_names_a_control_token_is_text(tokenizer: PreTrainedTokenizerBase) -> None:
    assert tokenizer.eos_token_id not in text_token_ids(tokenizer, PROMPT, "<|im_end|>", ended=False)


def test_a_demonstration_in_a_chat_ends_as_a_turn_does(tiny_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    tokenizer.chat_template = tokenizer.chat_template.replace("<|im_end|>", "<|endoftext|>")
    message = types_pb2.Message(role=types_pb2.ROLE_USER, content="Why?")
    chat = types_pb2.Prompt(chat=types_pb2.Chat(messages=[message]))
    assert text_token_ids(tokenizer, chat, "So.", ended=True)[-1] == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert text_token_ids(tokenizer, PROMPT, "So.", ended=True)[-1] == tokenizer.eos_token_id
