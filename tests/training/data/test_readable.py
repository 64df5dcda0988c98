"""A completion can be read if there is anything of it to read: text, tokens or its end."""

import pytest

from alignd.v1 import types_pb2
from feedback.bus.contract import Position
from feedback.store.stored import DrawnTokens, RankedCompletion, RankedGroup
from training.data.readable import readable

WITHOUT_TOKENS = DrawnTokens((), (), False, "d")


@pytest.mark.parametrize(
    ("text", "ended", "drawn", "reads"),
    [
        ("yes", False, None, True),
        ("", True, WITHOUT_TOKENS, True),
        ("", False, DrawnTokens((7,), (5,), False, "d"), True),
        ("", False, DrawnTokens((7,), (5,), True, "d"), False),
        ("", False, WITHOUT_TOKENS, False),
        ("", False, None, False),
    ],
    ids=["text", "an end", "tokens without a text", "tokens that are cut off", "tokens not kept", "nothing"],
)
def test_what_there_is_to_read(text: str, ended: bool, drawn: DrawnTokens | None, reads: bool) -> None:
    completion = RankedCompletion("c", text, ended, 0, 1, drawn)
    prompt = types_pb2.Prompt(text="Why?")
    group = RankedGroup(1, "r", "s", "ada", prompt, (completion,), Position("rankings", 0, 1), "ada")
    assert bool(readable(group)) is reads
