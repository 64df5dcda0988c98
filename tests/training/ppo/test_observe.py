"""The figures of a round: what counts as one observation."""

import math
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from training.ppo.experience import observe


def seen(scores: list[float], sizes: list[int]) -> dict[str, float]:
    """Returns the figures of rollouts with these scores by the held-out reward model, so many a prompt."""
    count = len(scores)
    one_NC, one_N = torch.ones(count, 1), torch.ones(count)
    packed = SimpleNamespace(mask_NC=torch.ones(count, 1, dtype=torch.bool), group_sizes=tuple(sizes))
    experience = SimpleNamespace(
        packed=packed, old_logprobs_NC=one_NC, ref_logprobs_NC=one_NC, sampler_logprobs_NC=one_NC, entropy_NC=one_NC,
        old_values_NC=one_NC, returns_NC=one_NC, scores_N=one_N, finished_N=one_N,
        held_out_scores_N=torch.tensor(scores),
    )  # fmt: skip
    return observe([[cast(Any, experience)]])


def test_rollouts_of_a_prompt_are_one_observation_of_the_held_out_score() -> None:
    alone = seen([0.0, 1.0, 2.0, 5.0], [1, 1, 1, 1])
    four_alike = seen([0.0] * 4 + [1.0] * 4 + [2.0] * 4 + [5.0] * 4, [4, 4, 4, 4])
    assert four_alike["objective/held_out_error"] == pytest.approx(alone["objective/held_out_error"])
    assert alone["objective/held_out_error"] == pytest.approx(2.160 / 2, abs=1e-3)
    assert four_alike["objective/held_out_score"] == alone["objective/held_out_score"] == 2.0


def test_one_prompt_says_nothing_of_others() -> None:
    assert seen([0.0, 1.0, 2.0], [3])["objective/held_out_error"] == math.inf
