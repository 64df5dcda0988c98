"""The reward model's fit: a convex minimum, weights, warm starts, own layers, and uncertainty."""

import itertools
import math
import random
from collections.abc import Iterable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.training.learning import REWARD_MODEL, fitted, ranked_examples, silent
from training.data.groups import Group, RankedExample, pack
from training.models.policy import SharedLayers
from training.models.reward import RewardModel, last_features, load, running_features, save, score_groups
from training.rewards.evaluation import clustered_share, evaluate_rewards
from training.rewards.fit import bootstrap_weights, cosine_to_tenth, fit, labeler_weights, shuffled_batches
from training.rewards.loss import compare, ranking_losses

LAYERED = REWARD_MODEL.model_copy(update={"num_layers": 2, "num_trained_layers": 1, "learning_rate": 1e-3})


def test_heads_alone_have_one_answer_whatever_the_order(shared: SharedLayers) -> None:
    examples = ranked_examples(shared, 60, seed=3)
    models = []
    for order in (examples, examples[::-1]):
        model = RewardModel(shared, REWARD_MODEL)
        fit(model, order, REWARD_MODEL, seed=0, warm=False, log=silent)
        models.append(model)
    probed = [example.group for example in ranked_examples(shared, 8, seed=4)]
    first, second = (torch.cat(score_groups(model, probed)) for model in models)
    assert float(torch.corrcoef(torch.stack([first, second]))[0, 1]) > 0.999


def test_layers_of_its_own_learn_and_start_warm(shared: SharedLayers, tmp_path: Path) -> None:
    model = fitted(shared, LAYERED)
    held_out = ranked_examples(shared, 40, seed=2)
    cold = evaluate_rewards(model, held_out)
    assert cold is not None
    assert cold.accuracy > 0.6
    own = shared.model.model.layers[1].state_dict()
    assert any(not torch.equal(tensor, own[name]) for name, tensor in model.layers[0].state_dict().items())
    save(model, tmp_path / "m.safetensors", "digest")
    again = RewardModel(shared, LAYERED)
    assert load(again, tmp_path / "m.safetensors", "digest")
    assert not load(RewardModel(shared, REWARD_MODEL), tmp_path / "m.safetensors", "digest")
    assert not load(again, tmp_path / "m.safetensors", "another reference")
    groups = [example.group for example in held_out]
    for a, b in zip(score_groups(model, groups), score_groups(again, groups), strict=True):
        assert torch.equal(a, b)
    fit(again, ranked_examples(shared, 64, seed=9), LAYERED, seed=1, warm=True, log=silent)
    warm = evaluate_rewards(again, held_out)
    assert warm is not None
    assert warm.accuracy > cold.accuracy - 0.05


def test_scores_of_a_group_equal_scores_one_by_one(shared: SharedLayers) -> None:
    model = fitted(shared, count=30)
    shared.model.float()
    for example in ranked_examples(shared, 6, seed=5):
        together = score_groups(model, [example.group])[0]
        alone = [
            float(score_groups(model, [Group(example.group.prompt, (completion,))])[0])
            for completion in example.group.completions
        ]
        assert together.tolist() == pytest.approx(alone, abs=1e-4)


@pytest.mark.parametrize("level", [1, 2])
def test_heads_read_the_last_state_and_the_mean_of_those_that_predict_and_it(shared: SharedLayers, level: int) -> None:
    shared.model.float()
    model = RewardModel(shared, REWARD_MODEL.model_copy(update={"num_layers": level}))
    groups = [Group((1, 5, 9, 300), ((7, 8, 2), (11,))), Group((1, 40), ((200, 201, 202, 203),))]
    packed = pack(groups)
    angles = shared.angles(packed)
    hidden_GTD = model.hidden(shared.encode(packed, [model.first])[model.first], packed, angles)
    whole_NF, running_NCF = last_features(hidden_GTD, packed), running_features(hidden_GTD, packed)
    alone = [(group.prompt, completion) for group in groups for completion in group.completions]
    for row, (prompt, completion) in enumerate(alone):
        states = shared.model(torch.tensor([prompt + completion]), output_hidden_states=True).hidden_states
        read_TD = states[level][0, len(prompt) - 1 :]
        torch.testing.assert_close(whole_NF[row], torch.cat([read_TD[-1], read_TD.mean(0)]), atol=1e-5, rtol=1e-4)
        for place in range(len(completion)):
            expected_F = torch.cat([read_TD[place], read_TD[: place + 1].mean(0)])
            torch.testing.assert_close(running_NCF[row, place], expected_F, atol=1e-5, rtol=1e-4)


@given(st.lists(st.sampled_from("abcd"), min_size=1, max_size=60), st.floats(0.05, 1.0))
def test_no_labeler_weighs_more_than_the_share(labelers: list[str], share: float) -> None:
    weights = labeler_weights(labelers, share)
    for labeler in set(labelers):
        total = sum(weight for weight, name in zip(weights, labelers, strict=True) if name == labeler)
        assert total <= share * len(labelers) + 1e-9 or total == labelers.count(labeler)
    assert all(0 < weight <= 1 for weight in weights)


def test_a_head_with_even_weights_has_the_plain_loss() -> None:
    ranks, scores_N = [[0, 1, 2], [1, 0]], torch.tensor([0.5, 1.0, -1.0, 2.0, 0.1])
    losses_E = ranking_losses(scores_N[:, None].expand(-1, 2), compare(ranks), torch.ones(2, 2))
    one_by_one = [
        ranking_losses(scores[:, None], compare([each]), torch.ones(1, 1))
        for scores, each in zip(scores_N.split([3, 2]), ranks, strict=True)
    ]
    assert losses_E.tolist() == pytest.approx([float(sum(one_by_one)) / 2] * 2)


def test_heads_weigh_rankings_differently_and_evenly_on_average(shared: SharedLayers) -> None:
    weights_RE = bootstrap_weights(ranked_examples(shared, 400, seed=0), 3, seed=0)
    assert weights_RE.mean(0).tolist() == pytest.approx([1.0] * 3, abs=0.2)
    assert float(torch.corrcoef(weights_RE.T)[0, 1]) < 0.2


def test_batches_hold_every_ranking_once() -> None:
    lengths = [random.Random(1).randrange(5, 90) for _ in range(133)]
    batches = shuffled_batches(lengths, 8, seed=0)
    assert sorted(index for batch in batches for index in batch) == list(range(133))
    assert batches != shuffled_batches(lengths, 8, seed=1)


def test_the_evaluation_counts_what_it_says(shared: SharedLayers) -> None:
    found = evaluate_rewards(fitted(shared), ranked_examples(shared, 30, seed=6))
    assert found is not None
    assert found.low < found.accuracy < found.high
    for table in (found.by_k, found.by_labeler, found.by_length_difference, found.calibration, found.uncertainty):
        assert sum(int(row[-1] or 0) for row in table) == found.num_comparisons
    assert [row[0] for row in found.by_labeler] == ["l0", "l1", "l2", "l3"]
    assert all(0.5 <= float(row[0] or 0) <= 1 for row in found.calibration)


def test_the_tables_are_those_of_a_plain_count(shared: SharedLayers) -> None:
    model, examples = fitted(shared), ranked_examples(shared, 30, seed=6)
    drawn = random.Random(0)
    # Some tied, some of three completions of other lengths.
    examples = [
        RankedExample(
            Group(
                each.group.prompt, tuple(c[: drawn.randrange(1, 9)] for c in each.group.completions[: 3 + index % 2])
            ),
            ((0, 1, 1, 2) if index % 3 else each.ranks)[: 3 + index % 2], each.labeler, each.seq,
        )
        for index, each in enumerate(examples)
    ]  # fmt: skip
    rows: list[tuple[int, str, int, float, float]] = []
    for example in examples:
        (scores_K,) = score_groups(model, [example.group])
        lengths = [len(completion) for completion in example.group.completions]
        for a, b in itertools.permutations(range(len(lengths)), 2):
            if example.ranks[a] < example.ranks[b]:
                margin = float(scores_K[a] - scores_K[b])
                rows.append((len(lengths), example.labeler, lengths[a] - lengths[b], margin > 0, abs(margin)))
    found = evaluate_rewards(model, examples)
    assert found is not None

    def share(chosen: Iterable[tuple[int, str, int, float, float]]) -> list[float]:
        right = [row[3] for row in chosen]
        return [pytest.approx(sum(right) / len(right)), len(right)]

    assert [found.accuracy, found.num_comparisons] == share(rows)
    assert found.by_k == [[k, *share(row for row in rows if row[0] == k)] for k in (3, 4)]
    assert sorted(found.by_labeler, key=str) == [
        [name, *share(row for row in rows if row[1] == name)] for name in ("l0", "l1", "l2", "l3")
    ]
    edges = [(None, -20), (-20, -5), (-5, 5), (5, 20), (20, None)]
    assert found.by_length_difference == [
        [low, high, *share(chosen)]
        for low, high in edges
        if (chosen := [row for row in rows if (-99 if low is None else low) <= row[2] < (99 if high is None else high)])
    ]
    fifth = sorted(rows, key=lambda row: row[4])[: found.calibration[0][-1]]
    sure = sum(1 / (1 + math.exp(-row[4])) for row in fifth) / len(fifth)
    assert found.calibration[0] == [pytest.approx(sure, abs=1e-4), *share(fifth)]


def test_passes_of_few_tokens_change_memory_and_not_what_is_learned(in_fp32: None, shared: SharedLayers) -> None:
    examples, found = ranked_examples(shared, 24, seed=7), []
    for tokens in (4096, 1):
        config = LAYERED.model_copy(update={"micro_batch_tokens": tokens, "batch_size": 6})
        model = RewardModel(shared, config)
        fit(model, examples, config, seed=0, warm=False, log=silent)
        found.append(torch.cat(score_groups(model, [example.group for example in examples])))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("l2", [0.0, 0.1])
def test_the_penalty_draws_heads_to_zero_where_layers_are_trained_too(shared: SharedLayers, l2: float) -> None:
    # Ties alone: no comparison moves anything, so what moves is the penalty's work.
    tied = [RankedExample(each.group, (0,) * len(each.ranks)) for each in ranked_examples(shared, 24, seed=7)]
    model = fitted(shared, LAYERED)
    heads_FE, layers = model.heads_FE.detach().clone(), deepcopy(model.layers.state_dict())
    fit(model, tied, LAYERED.model_copy(update={"l2": l2}), seed=0, warm=True, log=silent)
    moved_FE = heads_FE.abs() - model.heads_FE.abs()
    assert bool((moved_FE > 0).all() if l2 else (moved_FE == 0).all())
    for name, tensor in model.layers.state_dict().items():
        assert torch.equal(tensor, layers[name])


def test_no_comparison_no_evaluation(shared: SharedLayers) -> None:
    tied = [RankedExample(Group((1, 2), ((3,), (4,))), (0, 0))]
    assert evaluate_rewards(RewardModel(shared, REWARD_MODEL), tied) is None


def test_the_interval_counts_rankings_not_comparisons() -> None:
    # Ten rankings of six comparisons each, all right or all wrong: as if there were ten observations.
    right_M = torch.tensor([1.0] * 36 + [0.0] * 24)
    share, low, high = clustered_share(right_M, torch.arange(60) // 6)
    by_hand = 1.96 * (0.6 * 0.4 / 9) ** 0.5
    assert share == pytest.approx(0.6)
    assert high - low == pytest.approx(2 * by_hand, rel=1e-3)


def test_a_cosine_falls_from_the_peak_to_a_tenth() -> None:
    assert [cosine_to_tenth(step, 5) for step in range(5)] == pytest.approx([1.0, 0.868198, 0.55, 0.231802, 0.1])
    assert cosine_to_tenth(0, 1) == 1.0
