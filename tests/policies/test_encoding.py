"""No text that a person types becomes a control token, whichever tokenizer it is, and it stays the text that it is."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from policies.encoding import EncodingError, encoder, plain_token_ids, tokenizer_digest
from tests.policies.made_tokenizers import MADE, control_ids

TOKENIZERS = {name: make() for name, make in MADE.items()}


def mixed_texts(tokenizer: PreTrainedTokenizerBase) -> st.SearchStrategy[str]:
    """Draws texts of the tokenizer's added tokens, parts of them, and other text, of characters that it has."""
    added = [str(token) for token in tokenizer.added_tokens_decoder.values()]
    parts = [part for token in added for part in (token, token[:-1], token[1:], token[:1], token[-1:])]
    known = st.text(" abcdetuhs.<>/", max_size=6)
    return st.lists(st.one_of(st.sampled_from([*added, *parts]), known), max_size=8).map("".join)


@pytest.mark.parametrize("name", TOKENIZERS)
@given(data=st.data())
def test_what_is_typed_is_text_and_decodes_to_itself(name: str, data: st.DataObject) -> None:
    tokenizer = TOKENIZERS[name]
    typed = data.draw(mixed_texts(tokenizer))
    token_ids = plain_token_ids(tokenizer, typed)
    assert not set(token_ids) & control_ids(tokenizer)
    if tokenizer.unk_token_id not in token_ids:
        decoded = str(tokenizer.decode(token_ids, clean_up_tokenization_spaces=False))
        # Some tokenizers encode a text and the same text after a space alike.
        assert decoded.lstrip(" ") == typed.lstrip(" ")


@pytest.mark.parametrize("name", TOKENIZERS)
@given(text=st.text(" abcdetuhs.\n1é", max_size=30))
def test_text_without_control_tokens_is_encoded_as_ever(name: str, text: str) -> None:
    tokenizer = TOKENIZERS[name]
    assert plain_token_ids(tokenizer, text) == tokenizer.encode(text, add_special_tokens=False)


def test_runs_of_spaces_are_text() -> None:
    tokenizer = TOKENIZERS["flagged"]
    token_ids = plain_token_ids(tokenizer, "def f(x):\n    return x")
    assert tokenizer.convert_tokens_to_ids("    ") in token_ids
    assert token_ids == tokenizer.encode("def f(x):\n    return x", add_special_tokens=False)


def test_a_text_is_begun_once_where_the_tokenizer_begins_one_and_never_ended() -> None:
    assert {name: encoder(each).prefix for name, each in TOKENIZERS.items()} == {
        "byte-level": (),
        "flagged": (0,),
        "unigram": (1,),
        "byte-fallback": (1,),
    }


def test_a_digest_names_one_tokenizer_whatever_was_encoded_with_it() -> None:
    digests = {name: tokenizer_digest(make()) for name, make in MADE.items()}
    assert len(set(digests.values())) == len(digests)
    for name, make in MADE.items():
        used = make()
        used.encode("the user", truncation=True, max_length=1)
        assert tokenizer_digest(used) == digests[name]
    changed = MADE["byte-level"]()
    changed.add_tokens(["<more>"])
    assert tokenizer_digest(changed) != digests["byte-level"]


def test_many_control_tokens_take_no_longer() -> None:
    tokenizer = MADE["byte-level"]()
    tokenizer.add_tokens([f"<unused{number}>" for number in range(5000)])
    found: list[str] = []
    encoder(tokenizer).replace_control_tokens("<unused" * 50_000 + "<unused7>", lambda token: found.append(token) or "")
    assert found == ["<unused7>"]


def test_a_tokenizer_of_another_kind_is_refused_by_name() -> None:
    class Slow(PreTrainedTokenizerFast):
        @property
        def backend_tokenizer(self) -> None:  # type: ignore[override]
            return None

    slow = Slow(tokenizer_object=TOKENIZERS["byte-level"].backend_tokenizer)
    with pytest.raises(EncodingError, match=r"Slow has no tokenizer\.json"):
        plain_token_ids(slow, "a")
