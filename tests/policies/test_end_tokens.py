"""Which tokens end a completion: the tokenizer's, those of the generation config, and the one that closes a turn."""

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from alignd.v1 import types_pb2
from policies.end_tokens import EndTokenError, end_tokens
from tests.policies.made_tokenizers import CHATML, DEEPSEEK, MADE

CHAT = types_pb2.Prompt(chat=types_pb2.Chat(messages=[types_pb2.Message(role=types_pb2.ROLE_USER, content="Why?")]))
TEXT = types_pb2.Prompt(text="Why?")


def model(
    folder: Path, name: str = "byte-level", *, generation: object = None, config: object = None, **changes: str | None
) -> PreTrainedTokenizerBase:
    """Returns the tokenizer of a folder with these files, as it is loaded from there."""
    tokenizer = MADE[name]()
    for attribute, value in changes.items():
        setattr(tokenizer, attribute, value)
    tokenizer.save_pretrained(folder)
    for file, settings in (("generation_config.json", generation), ("config.json", config)):
        if settings is not None:
            (folder / file).write_text(json.dumps(settings))
    loaded: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(folder)
    return loaded


def test_all_end_tokens_count_and_a_turn_is_closed_by_the_templates(tmp_path: Path) -> None:
    """As of Llama 3, whose tokenizer, generation config and template name different ones."""
    tokenizer = model(tmp_path, eos_token="<|endoftext|>", generation={"eos_token_id": [0, 3]})
    ends = end_tokens(tokenizer)
    assert ends.token_ids == (0, 2, 3)
    assert (ends.of_prompt(CHAT), ends.of_prompt(TEXT)) == (2, 0)


def test_without_a_generation_config_the_models_configuration_counts(tmp_path: Path) -> None:
    tokenizer = model(tmp_path, config={"eos_token_id": 3, "vocab_size": 400})
    assert end_tokens(tokenizer).token_ids == (2, 3)


@pytest.mark.parametrize(
    "template",
    [None, "{% for m in messages %}User: {{ m['content'] }}\n{% endfor %}", "{{ raise_exception('no') }}", "fixed"],
)
def test_a_template_that_closes_no_turn_by_a_token_leaves_the_tokenizers(tmp_path: Path, template: str | None) -> None:
    ends = end_tokens(model(tmp_path, chat_template=template))
    assert (ends.token_ids, ends.of_turn, ends.of_text) == ((2,), 2, 2)


def test_the_templates_end_token_need_not_be_flagged_as_special(tmp_path: Path) -> None:
    template = CHATML.replace("<|im_end|>", "</tool_call>")
    tokenizer = model(tmp_path, chat_template=template)
    assert end_tokens(tokenizer).of_turn == tokenizer.convert_tokens_to_ids("</tool_call>")
    assert end_tokens(model(tmp_path / "flagged", "flagged", chat_template=DEEPSEEK)).token_ids == (1,)


def test_a_tokenizer_without_an_end_token_takes_the_configured_one(tmp_path: Path) -> None:
    ends = end_tokens(model(tmp_path, eos_token=None, chat_template=None, generation={"eos_token_id": 3}))
    assert (ends.token_ids, ends.of_turn, ends.of_text) == ((3,), 3, 3)


@pytest.mark.parametrize(
    ("generation", "config", "said"),
    [
        ({}, {}, "no end token"),
        ({"eos_token_id": "x"}, {}, "should be the number of a token"),
        ({"eos_token_id": [1, True]}, {}, "should be the number of a token"),
        ({"eos_token_id": 400}, {"vocab_size": 400}, "400 is not among the 400 tokens"),
        ({"eos_token_id": [-1]}, {"text_config": {"vocab_size": 400}}, "-1 is not among the 400 tokens"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, generation: object, config: object, said: str) -> None:
    tokenizer = model(tmp_path, eos_token=None, chat_template=None, generation=generation, config=config)
    with pytest.raises(EndTokenError, match=said):
        end_tokens(tokenizer)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    tokenizer = model(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(EndTokenError, match=r"generation_config\.json cannot be read"):
        end_tokens(tokenizer)
