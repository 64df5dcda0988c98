"""Turns a prompt into the tokens that the policy sees, alike for server and trainer."""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from typing import TYPE_CHECKING

import jinja2

from alignd.v1 import types_pb2
from policies.encoding import Encoder, EncodingError, encoder

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROLES = {
    types_pb2.ROLE_SYSTEM: "system",
    types_pb2.ROLE_USER: "user",
    types_pb2.ROLE_ASSISTANT: "assistant",
}
# Unicode's characters for private use, which templates leave as they are. Several, drawn at random, mark a hidden one.
_PRIVATE_USE, _MARK_LENGTH = range(0xE000, 0xF000), 6
_DIGIT_0 = 0xF000


def prompt_token_ids(tokenizer: PreTrainedTokenizerBase, prompt: types_pb2.Prompt) -> list[int]:
    """Returns the token ids of a prompt, up to where the completion begins; there is at least one.

    A chat is rendered by the tokenizer's own template. If its last turn is the assistant's, the completion continues
    that turn, otherwise it begins a new one. Text that looks like a control token, such as "<|im_end|>", is encoded as
    the plain text it is, so nobody can end their turn early or speak as the system. A raw text gets the token with
    which the tokenizer begins a text, if it has one, and none that ends it.

    Raises:
        jinja2.TemplateError: the prompt cannot be rendered: the template refuses the conversation, or there is nothing
            to render.
    """
    try:
        names = encoder(tokenizer)
    except EncodingError as error:
        raise jinja2.TemplateError(str(error)) from error
    if prompt.WhichOneof("content") == "chat":
        token_ids = names.encode(_render(tokenizer, names, prompt.chat))
    else:
        token_ids = [*names.prefix, *names.encode(prompt.text)] if prompt.text else []
    if not token_ids:
        raise jinja2.TemplateError("the prompt has no token")
    return token_ids


def continues_last_turn(chat: types_pb2.Chat) -> bool:
    """Whether the last turn is the assistant's, so that a completion continues it."""
    return bool(chat.messages) and chat.messages[-1].role == types_pb2.ROLE_ASSISTANT


def render_conversation(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[dict[str, str]], *, ending: str = "generation prompt"
) -> str:
    """Returns what the template makes of these messages, of role and content.

    It ends with the `ending`: "generation prompt", which begins a new turn; "continued", where the last message's
    text ends; or "closed", with the end of the last turn.

    Raises:
        jinja2.TemplateError: the template refuses them.
    """
    try:
        return str(
            tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=ending == "generation prompt",
                continue_final_message=ending == "continued",
            )
        )
    except jinja2.TemplateError:
        raise
    except Exception as error:
        # A template is a program that came with the model, and can fail in any way.
        raise jinja2.TemplateError(
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error


def _render(tokenizer: PreTrainedTokenizerBase, names: Encoder, chat: types_pb2.Chat) -> str:
    """Returns a rendered chat in which the template's own control tokens have their secret names.

    Characters of the turns are hidden from the search for them: all of what looks like a control token, and the first
    and the last of each turn, which could make one with the template's text beside them. If hiding the latter changes
    what the template does, for instance because it looks for how a turn begins, they stay.

    Raises:
        jinja2.TemplateError: the chat cannot be rendered.
    """
    if unknown := {message.role for message in chat.messages} - _ROLES.keys():
        raise jinja2.TemplateError(f"there is no role {min(unknown)}")
    if not chat.messages:
        raise jinja2.TemplateError("the conversation has no turn")
    contents = [message.content for message in chat.messages]
    hidden = _Hidden()

    def rendered(contents: Sequence[str]) -> str:
        turns = zip(chat.messages, contents, strict=True)
        messages = [{"role": _ROLES[message.role], "content": content} for message, content in turns]
        return render_conversation(
            tokenizer, messages, ending="continued" if continues_last_turn(chat) else "generation prompt"
        )

    text = rendered([names.replace_control_tokens(each, hidden.hide) for each in contents])
    safer = rendered([names.replace_control_tokens(_with_hidden_ends(each, hidden), hidden.hide) for each in contents])
    if hidden.show(safer) == hidden.show(text):
        text = safer
    return hidden.show(names.replace_control_tokens(text, names.secret_names.__getitem__))


class _Hidden:
    """Pieces of text that stand aside while a template renders the rest."""

    def __init__(self) -> None:
        self._pieces: list[str] = []
        self._mark = "".join(chr(secrets.choice(_PRIVATE_USE)) for _ in range(_MARK_LENGTH))

    def hide(self, piece: str) -> str:
        """Returns what stands for a piece: a mark that nobody knows, and the piece's number."""
        self._pieces.append(piece)
        return self._mark + "".join(chr(_DIGIT_0 + int(digit, 16)) for digit in f"{len(self._pieces) - 1:08x}")

    def show(self, text: str) -> str:
        """Returns `text` with the pieces in their places."""
        before, *parts = text.split(self._mark)
        return before + "".join(map(self._shown, parts))

    def _shown(self, part: str) -> str:
        digits = [ord(character) - _DIGIT_0 for character in part[:8]]
        if len(digits) < 8 or not all(0 <= digit < 16 for digit in digits):
            # The template cuts turns, and did so here.
            return part
        return self._pieces[int("".join(f"{digit:x}" for digit in digits), 16)] + part[8:]


def _with_hidden_ends(content: str, hidden: _Hidden) -> str:
    """Hides the first and the last character inside the white space around them, which a template may remove."""
    text = content.strip()
    if not text:
        return content
    start = content.index(text)
    last = start + len(text) - 1
    end = hidden.hide(content[last]) if last > start else ""
    return content[:start] + hidden.hide(content[start]) + content[start + 1 : last] + end + content[last + 1 :]
