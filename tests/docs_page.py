"""What a page of docs shows, for tests that run it as it stands there."""

import re
from pathlib import Path


def blocks(page: Path, heading: str, language: str) -> list[str]:
    """Returns the blocks of code of a language between a heading and the next one; "" for those that name none."""
    text = page.read_text(encoding="utf-8")
    (section,) = re.findall(rf"^##+ {re.escape(heading)}\n(.*?)(?=^##+ |\Z)", text, re.DOTALL | re.MULTILINE)
    found = re.findall(r"^```(\w*)\n(.*?)^```$", section, re.DOTALL | re.MULTILINE)
    return [code for named, code in found if named == language]
