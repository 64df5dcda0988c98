"""Decides which prompts count as the same one."""

import hashlib
import json
import unicodedata

from alignd.v1 import types_pb2


def prompt_identity(prompt: types_pb2.Prompt) -> bytes:
    """Returns a SHA-256 that is the same for prompts that count as the same one.

    These say the same turns in the same roles, except for how white space is written and how Unicode composes
    characters (NFC). Case counts: "us" and "US" may ask for different things. A text is never the same as a chat.
    """
    if prompt.WhichOneof("content") == "chat":
        turns: object = [[message.role, _normalised(message.content)] for message in prompt.chat.messages]
    else:
        turns = _normalised(prompt.text)
    return hashlib.sha256(json.dumps(turns).encode()).digest()


def _normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())
