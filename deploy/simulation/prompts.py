"""Reads the prompts that simulated users send: first human turns of HH-RLHF's helpful-base, see PROMPTS.md."""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Literal

Split = Literal["train", "held_out"]


def load_prompts(split: Split) -> list[str]:
    """Returns the prompts of one split. The file has them shuffled, so that the first n are a fair sample of size n."""
    lines = files(__package__).joinpath("prompts.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [record["prompt"] for record in records if record["split"] == split]
