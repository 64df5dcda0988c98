"""A refresh refuses a worse reward model, mixes in old rankings, and fits the held-out model to other rankings."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.training.learning import REWARD_MODEL, ranked_examples
from training.config import RewardModelConfig
from training.data.dataset import Dataset, LogRange
from training.data.groups import RankedExample
from training.models.policy import SharedLayers
from training.models.reward import RewardModel, score_groups
from training.rewards.evaluation import evaluate_rewards
from training.rewards.refresh import POINTER_FILE, Fitted, accept, current, fit_held_out_model, mixed, refresh

LAYERED = REWARD_MODEL.model_copy(update={"num_layers": 2, "num_trained_layers": 1, "learning_rate": 1e-3})
Lines = list[tuple[str, dict[str, Any]]]


def dataset(training: list[RankedExample], held_out: list[RankedExample]) -> Dataset:
    seqs = [example.seq for example in training]
    log = (LogRange("rankings", 0, min(seqs), max(seqs)),)
    return Dataset(tuple(training), tuple(held_out), (), (), log, ())


def reversed_ranks(examples: list[RankedExample]) -> list[RankedExample]:
    """Returns the rankings of labelers who like the worst best."""
    return [
        RankedExample(each.group, tuple(len(each.ranks) - 1 - rank for rank in each.ranks), each.labeler, each.seq)
        for each in examples
    ]


def later(examples: list[RankedExample], by: int) -> list[RankedExample]:
    return [RankedExample(each.group, each.ranks, each.labeler, each.seq + by) for each in examples]


def refreshed(
    shared: SharedLayers, data: Dataset, run: Path, config: RewardModelConfig = REWARD_MODEL
) -> tuple[RewardModel, Fitted, Lines]:
    """Refreshes in this run's folder, accepts the result as a run does, and returns it with the lines that it logs."""
    run.mkdir()
    logged: Lines = []
    model, fitted = refresh(
        config, shared, data, run, "digest", seed=0, log=lambda phase, *rest: logged.append((phase, rest[-1]))
    )
    accept(run.parent, fitted)
    return model, fitted, logged


def test_a_worse_reward_model_is_refused_and_its_figures_are_kept(shared: SharedLayers, tmp_path: Path) -> None:
    good, held_out = ranked_examples(shared, 200, seed=1), ranked_examples(shared, 60, seed=2)
    first, fitted, logged = refreshed(shared, dataset(good, held_out), tmp_path / "1")
    assert (fitted.run_id, fitted.seqs, fitted.num_rankings) == ("1", tuple(range(200)), 200)
    assert fitted.rankings == (LogRange("rankings", 0, 0, 199),)
    accuracy = logged[-1][1]["reward_model/held_out_accuracy"]
    assert logged[-1][1]["reward_model/refused"] == 0
    assert "reward_model/parent_accuracy" not in logged[-1][1]

    worse = dataset(reversed_ranks(later(good, 200)), held_out)
    kept, still, logged = refreshed(shared, worse, tmp_path / "2")
    assert still == fitted == current(tmp_path)
    (figures,) = [metrics for phase, metrics in logged if phase == "reward_model_evaluation"]
    assert figures["reward_model/refused"] == 1
    assert figures["reward_model/parent_accuracy"] == accuracy > 0.6
    assert figures["reward_model/held_out_accuracy"] < 0.5
    groups = [example.group for example in held_out]
    for before, after in zip(score_groups(first, groups), score_groups(kept, groups), strict=True):
        torch.testing.assert_close(before, after)


def test_with_nobody_held_out_nothing_is_said_of_accuracy(shared: SharedLayers, tmp_path: Path) -> None:
    for name in ("1", "2"):
        _, fitted, logged = refreshed(shared, dataset(ranked_examples(shared, 12, seed=3), []), tmp_path / name)
        assert {phase for phase, _ in logged} == {"reward_model"}
        assert fitted.run_id == name


def test_a_model_accepted_by_an_earlier_release_is_trained_further(shared: SharedLayers, tmp_path: Path) -> None:
    _, fitted, _ = refreshed(shared, dataset(ranked_examples(shared, 12, seed=3), []), tmp_path / "1")
    pointer = tmp_path / POINTER_FILE
    written = json.loads(pointer.read_text())
    assert Fitted.of_json(written) == fitted
    pointer.write_text(json.dumps({key: written[key] for key in ("run_id", "digest")} | {"last_seq": 11}))
    earlier = current(tmp_path)
    assert earlier is not None
    assert (earlier.run_id, earlier.seqs, earlier.rankings) == ("1", tuple(range(12)), ())


def test_a_better_one_replaces_it(shared: SharedLayers, tmp_path: Path) -> None:
    held_out = ranked_examples(shared, 60, seed=2)
    few, many = ranked_examples(shared, 12, seed=3), ranked_examples(shared, 240, seed=1)
    refreshed(shared, dataset(few, held_out), tmp_path / "1")
    _, fitted, logged = refreshed(shared, dataset(many, held_out), tmp_path / "2")
    figures = logged[-1][1]
    assert figures["reward_model/held_out_accuracy"] > figures["reward_model/parent_accuracy"]
    assert fitted.run_id == "2"
    assert current(tmp_path) == fitted


def test_layers_are_trained_further_on_new_rankings_and_as_many_old(shared: SharedLayers, tmp_path: Path) -> None:
    config = LAYERED.model_copy(update={"max_accuracy_drop": 1.0})
    examples, held_out = ranked_examples(shared, 120, seed=1), ranked_examples(shared, 40, seed=2)
    # The sample of the one left out comes late: by then there are rankings after it.
    refreshed(shared, dataset(examples[:49] + examples[50:101], held_out), tmp_path / "1", config)
    _, fitted, logged = refreshed(shared, dataset(examples, held_out), tmp_path / "2", config)
    steps = [metrics for phase, metrics in logged if phase == "reward_model"]
    assert len(steps) == (20 + 20) / config.batch_size
    assert set(fitted.seqs) == set(range(120))

    again, same, logged = refreshed(shared, dataset(examples, held_out), tmp_path / "3", config)
    assert same == fitted
    assert not logged  # Nothing is new.
    assert evaluate_rewards(again, held_out) is not None


@pytest.mark.parametrize(("share", "old"), [(0.0, 0), (0.5, 10), (0.75, 30), (0.9, 40)])
def test_old_rankings_are_the_share_that_is_asked_for(shared: SharedLayers, share: float, old: int) -> None:
    examples = ranked_examples(shared, 50, seed=1)
    found = mixed(examples, frozenset(range(40)), replay_share=share, seed=0)
    assert [example.seq for example in found[:10]] == list(range(40, 50))
    assert len({example.seq for example in found[10:]}) == len(found) - 10 == old
    assert all(example.seq < 40 for example in found[10:])


def test_the_held_out_model_knows_what_its_labelers_like_and_has_no_layers(shared: SharedLayers) -> None:
    theirs = reversed_ranks(ranked_examples(shared, 200, seed=1))
    held_out_model = fit_held_out_model(LAYERED, shared, tuple(theirs), seed=0)
    evaluated = evaluate_rewards(held_out_model, reversed_ranks(ranked_examples(shared, 60, seed=2)))
    assert evaluated is not None
    assert evaluated.accuracy > 0.6
    assert len(held_out_model.layers) == 0
