"""The canary's rule keeps its word in simulated rollouts, and what it replaces does not."""

import statistics

import pytest

from bench.canary import Crowd, by_rankings, by_z_test, simulate
from deploy.rollout.preference import Verdict

pytestmark = pytest.mark.timeout(300)


def test_a_candidate_that_is_no_better_is_seldom_promoted_where_users_differ() -> None:
    assert simulate(Crowd(0.5), 200).share(Verdict.BETTER) <= 3.5
    for rule in (by_rankings, by_z_test):
        assert simulate(Crowd(0.5), 200, rule).share(Verdict.BETTER) > 10


@pytest.mark.parametrize(("truth", "median", "most"), [(0.6, (120, 160), 450), (0.7, (44, 52), 90)])
def test_a_better_candidate_is_soon_promoted(truth: float, median: tuple[int, int], most: int) -> None:
    decided = simulate(Crowd(truth), 300)
    assert decided.share(Verdict.BETTER) >= 99
    assert median[0] <= statistics.median(decided.lengths) <= median[1]
    assert decided.length(90) <= most


def test_a_worse_candidate_is_rejected() -> None:
    decided = simulate(Crowd(0.45), 200)
    assert decided.share(Verdict.NO_GAIN) >= 97
    assert decided.share(Verdict.BETTER) <= 1
