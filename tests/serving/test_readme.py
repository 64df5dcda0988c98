"""The README's client, run as it stands there, against a real server."""

import re
from pathlib import Path
from typing import Any

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_readme_client_samples_and_ranks(server: Any) -> None:
    (code,) = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(code.replace("localhost:50051", server.address), names)
    assert len(names["sample"].completions) == 4
    assert names["sample"].feedback_token
