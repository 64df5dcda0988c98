"""Data sets of a few lines, in the form of the real ones."""

import gzip
import json
from pathlib import Path

from bench.learning.hh_rlhf import Comparison, Message

ASKED = "\n\nHuman: Is honey sweet?\n\nAssistant:"


def write_hh(data: Path, source: str, records: list[tuple[str, str]]) -> None:
    path = data / "hh-rlhf" / f"{source}.test.jsonl.gz"
    path.parent.mkdir(exist_ok=True)
    lines = [json.dumps({"chosen": chosen, "rejected": rejected}) + "\n" for chosen, rejected in records]
    path.write_bytes(gzip.compress("".join(lines).encode()))


def write_self_instruct(data: Path, name: str, tasks: list[dict[str, object]]) -> None:
    path = data / "self-instruct" / f"{name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(task) + "\n" for task in tasks))


def task(instruction: str, output: str, given: str = "", *, is_classification: bool = False) -> dict[str, object]:
    instances = [{"input": given, "output": output}]
    return {"instruction": instruction, "instances": instances, "is_classification": is_classification}


def comparison(chosen: str, rejected: str, prompt: str = "Say something.") -> Comparison:
    return Comparison((Message("user", prompt),), chosen, rejected, "test")
