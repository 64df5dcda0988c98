"""A phase is made once, however often its run is attempted, and operators are heard before it."""

from pathlib import Path
from typing import Any, cast

import pytest

from training.context import TrainerContext
from training.errors import RunAbortedError
from training.models.parallel import ALONE
from training.phases.runner import Phase, perform

NOBODY = cast(Any, None)


def context_of(asked: list[str]) -> TrainerContext:
    return TrainerContext(NOBODY, NOBODY, NOBODY, Path(), NOBODY, asked.append, ALONE)


def test_what_an_earlier_attempt_made_is_read_back_and_not_made_again(tmp_path: Path) -> None:
    made, kept = [], tmp_path / "kept"

    def make() -> str:
        made.append("made")
        kept.write_text("result")
        return "result"

    phase = Phase("rewards", make, load=lambda: kept.read_text() if kept.exists() else None)
    asked: list[str] = []
    for _ in range(2):
        assert perform(context_of(asked), "run", phase) == "result"
    assert made == ["made"]
    assert asked == ["run", "run"]


@pytest.mark.parametrize("collective", [False, True])
def test_a_phase_that_leaves_nothing_is_made_in_each_attempt(collective: bool) -> None:
    results = iter([1, 2])
    phase = Phase("policy", lambda: next(results), collective=collective)
    assert [perform(context_of([]), "run", phase) for _ in range(2)] == [1, 2]


def test_a_phase_is_not_begun_where_operators_end_the_run() -> None:
    def abort(run_id: str) -> None:
        raise RunAbortedError(run_id)

    context = TrainerContext(NOBODY, NOBODY, NOBODY, Path(), NOBODY, abort, ALONE)
    phase: Phase[None] = Phase("policy", lambda: pytest.fail("the phase was made"))
    with pytest.raises(RunAbortedError, match="run-7"):
        perform(context, "run-7", phase)
