"""Makes text that came from outside safe to print: no control character of it reaches a terminal or a log."""

import unicodedata

# Control characters, the separators of lines and paragraphs, and halves of a character. Of the formatting characters
# (Cf) only those that turn the direction of writing: the others are part of words and emoji.
_UNSAFE = frozenset({"Cc", "Zl", "Zp", "Cs"})
_TURNS = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def plain(text: object, *, lines: bool = False) -> str:
    """Returns the text with each control character as its escape, such as \\x1b or \\n.

    Args:
        text: what is to be printed; anything but a string is turned into one.
        lines: whether to keep its line ends, for a text of our own that has several lines.
    """
    return "".join(_shown(each, lines) for each in str(text))


def _shown(character: str, lines: bool) -> str:
    if lines and character == "\n":
        return character
    unsafe = unicodedata.category(character) in _UNSAFE or character in _TURNS
    return character.encode("unicode_escape").decode() if unsafe else character
