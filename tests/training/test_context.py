"""A run asks both policies for the same prompts with other seeds, and scores stay with their answers in short rows."""

from typing import Any, cast

import pytest
import torch

from training.config import PpoConfig, RewardModelConfig, TrainingConfig
from training.context import Run
from training.data.dataset import Dataset, TokenizedPrompt
from training.data.groups import Group
from training.models.policy import SharedLayers
from training.models.reward import RewardModel, score_groups
from training.ppo.rollouts import Rollout, from_rows, to_rows

NOTHING = cast(Any, None)
CONFIG = TrainingConfig(
    seed=7,
    num_evaluation_prompts=2,
    completions_per_evaluation_prompt=3,
    reward_model=RewardModelConfig(num_layers=1),
    ppo=PpoConfig(rollouts_per_prompt=2, max_tokens=5),
)
PROMPTS = tuple(TokenizedPrompt(f"s{index}", f"Prompt {index}", (1, 5 + index, 9)) for index in range(3))
ANSWERS = [
    [Rollout((40 + 10 * prompt + index, *([7] * index), 2), (-1.0,) * (index + 2), True) for index in range(3)]
    for prompt in range(2)
]


def run_on(shared: SharedLayers) -> Run:
    data = Dataset((), (), (), PROMPTS, (), NOTHING)
    return Run(NOTHING, NOTHING, CONFIG, NOTHING, shared, data)


def test_each_answer_keeps_its_score_in_rows_no_longer_than_ppos(shared: SharedLayers) -> None:
    run = run_on(shared)
    model = RewardModel(shared, CONFIG.reward_model)
    torch.nn.init.normal_(model.heads_FE, generator=torch.Generator().manual_seed(0))
    assert [len(group.completions) for group in run.groups(ANSWERS)] == [2, 1, 2, 1]
    alone = [
        [float(score_groups(model, [Group(prompt.token_ids, (each.token_ids,))])[0]) for each in answers]
        for prompt, answers in zip(PROMPTS, ANSWERS, strict=False)
    ]
    assert len({score for each in alone for score in each}) == 6
    assert run.scores(model, ANSWERS) == [pytest.approx(each, rel=0.02) for each in alone]


def test_no_two_completions_of_the_evaluation_share_a_seed(shared: SharedLayers) -> None:
    first, second = (run_on(shared).ask({}, again=again) for again in (False, True))
    assert first.prompts == second.prompts == [(1, 5, 9), (1, 6, 9)]
    assert (first.num_completions, first.max_tokens) == (3, 5)
    # The seeds of a request go up by one with each completion.
    assert second.seed == first.seed + 6


def test_rollouts_are_read_as_they_were_written() -> None:
    assert from_rows(to_rows(ANSWERS)) == ANSWERS
