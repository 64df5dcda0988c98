"""Turns a prompt into the tokens that the policy sees, alike for server and trainer."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import jinja2

from alignd.v1 import types_pb2

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROLES = {
    types_pb2.ROLE_SYSTEM: "system",
    types_pb2.ROLE_USER: "user",
    types_pb2.ROLE_ASSISTANT: "assistant",
}
# Unicode's characters for private use. One that occurs in no message marks text that is not a control token.
_PRIVATE_USE = range(0xE000, 0xF900)


def prompt_token_ids(tokenizer: PreTrainedTokenizerBase, prompt: types_pb2.Prompt) -> list[int]:
    """Returns the token ids of a prompt, up to where the completion begins.

    A chat is rendered by the tokenizer's own template. Text in it that looks like a special token, such as
    "<|im_end|>", is encoded as the plain text it is, so nobody can end their turn early or speak as the system. Two
    threads must not call this with the same tokenizer at once.

    Raises:
        jinja2.TemplateError: the template refuses the conversation.
    """
    if prompt.WhichOneof("content") == "text":
        return _ids(tokenizer, prompt.text, add_special_tokens=True)
    specials = {token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items() if token.special}
    # The longest first: a special token may begin with another.
    pattern = "|".join(re.escape(special) for special in sorted(specials, key=len, reverse=True))
    contents = [message.content for message in prompt.chat.messages]
    if not specials or not any(re.search(pattern, content) for content in contents):
        return _ids(tokenizer, _render(tokenizer, prompt.chat, contents), add_special_tokens=False)
    return _disarmed_ids(tokenizer, prompt.chat, contents, specials, pattern)


def _disarmed_ids(
    tokenizer: PreTrainedTokenizerBase,
    chat: types_pb2.Chat,
    contents: list[str],
    specials: dict[str, int],
    pattern: str,
) -> list[int]:
    """Returns the token ids of a chat in which a message has the text of a special token.

    A mark between the characters of that text gets it through the template without becoming a special token. All
    special tokens in the result are then the template's own; the text between them is encoded, without the marks, as
    plain text.

    Raises:
        jinja2.TemplateError: the template refuses the conversation, or no character is free for the mark.
    """
    taken = set("".join(contents)) | set(str(tokenizer.chat_template))
    mark = next((chr(code) for code in _PRIVATE_USE if chr(code) not in taken), None)
    if mark is None:
        raise jinja2.TemplateError("no character for private use is free to mark what looks like a special token")
    marked = [re.sub(pattern, lambda match: mark.join(match[0]), content) for content in contents]
    token_ids: list[int] = []
    for index, part in enumerate(re.split(f"({pattern})", _render(tokenizer, chat, marked))):
        # re.split puts the matches at the odd places.
        if index % 2:
            token_ids.append(specials[part])
        elif part:
            token_ids += _ids(tokenizer, part.replace(mark, ""), add_special_tokens=False, split_special_tokens=True)
    return token_ids


def _render(tokenizer: PreTrainedTokenizerBase, chat: types_pb2.Chat, contents: list[str]) -> str:
    messages = [
        {"role": _ROLES[message.role], "content": content}
        for message, content in zip(chat.messages, contents, strict=True)
    ]
    return str(tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


def _ids(tokenizer: PreTrainedTokenizerBase, text: str, **options: bool) -> list[int]:
    return [int(token_id) for token_id in tokenizer.encode(text, **options)]
