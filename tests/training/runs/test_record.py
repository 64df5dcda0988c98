"""metrics.jsonl has one schema: a name that is not in it is neither written nor read."""

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from training.runs.record import METRICS, PHASES, append, last_of, of_phase, read_lines, rewind
from training.sft_run import SCORE

ROOT = Path(__file__).parents[3]
NAME = re.compile(
    r"(objective|policy|val|reward_model|rollout|completion|seconds|ptx|sft|stopped|rankings|prompts|demonstrations)"
    r"/[a-z_/]+"
)


def literals(room: str) -> Iterator[str]:
    """Names of figures in the code of a folder or a file."""
    place = ROOT / room
    for path in place.rglob("*.py") if place.is_dir() else [place]:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and NAME.fullmatch(node.value):
                yield node.value


def test_all_that_is_written_or_read_is_in_the_schema_and_nothing_else_is() -> None:
    named = {name for name in METRICS if "/" in name}
    assert {*literals("training"), *literals("deploy")} - {SCORE} == named
    assert {*literals("bench/learning"), *literals("bench/ppo_ours.py"), *literals("bench/gpu.py")} <= named


@pytest.mark.parametrize(
    ("phase", "metrics"), [("pop", {}), ("ppo", {"objective/score": 1.0, "objective/scores": 1.0})]
)
def test_what_has_no_name_is_not_written(tmp_path: Path, phase: str, metrics: dict[str, float]) -> None:
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(ValueError, match=r"nothing called (pop|objective/scores):"):
        append(path, phase, 0, 1, metrics)
    assert not path.exists()


def test_lines_are_read_as_they_were_written_and_removed_from_an_index_on(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for index in range(3):
        append(path, "ppo", index, 3, {"objective/score": float(index)})
    append(path, "evaluate", 0, 1, {})
    with path.open("a") as file:
        file.write('{"phase": "regis')  # killed while it was written
    records = read_lines(path).found
    assert [record["index"] for record in of_phase(records, "ppo")] == [0, 1, 2]
    assert last_of(records, "ppo")["objective/score"] == 2.0
    assert last_of(records, "sft") == {}
    rewind(path, "ppo", 1)
    assert [json.loads(line)["objective/score"] for line in path.read_text().splitlines()] == [0.0]


def test_every_phase_and_figure_says_what_it_is() -> None:
    assert all(words for words in (*PHASES.values(), *METRICS.values()))
