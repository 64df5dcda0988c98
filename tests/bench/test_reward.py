"""TRL's side of the reward benchmark gets the same comparisons, in equal batches that fit."""

import pytest

from bench.reward import MAX_TRL_BATCH, trl_batch, trl_padding
from training.data.groups import Group, RankedExample


@pytest.mark.parametrize(("num_pairs", "size"), [(6, 6), (15, 5), (36, 12), (13, 1)])
def test_batches_are_equal_and_make_up_a_ranking(num_pairs: int, size: int) -> None:
    assert trl_batch(num_pairs) == size <= MAX_TRL_BATCH
    assert num_pairs % size == 0


def test_padding_is_to_the_longest_row_of_a_batch() -> None:
    group = Group((1, 2), ((3,), (4, 5), (6, 7, 8, 9)))
    # Rows of 3, 4 and 6 tokens, each in two of the three pairs, and all six padded to 6.
    assert trl_padding([RankedExample(group, (0, 1, 2), "l", 0)]) == pytest.approx(1 - 26 / 36)
