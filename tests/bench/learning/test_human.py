"""What people preferred: every kind of reward model learns it, on the same held-out comparisons, once."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from bench.learning import human
from bench.learning.hh_rlhf import is_held_out, read_comparisons
from bench.learning.human import HEADS, LAYERS, LENGTH, LORA, WORDS, HumanSize, human_preferences
from bench.learning.human_curve import HUMAN_HEADINGS, draw_human, held_out_accuracy, human_figures, human_rows
from bench.learning.low_rank import adapt
from bench.learning.stages import MadeOtherwiseError
from tests.bench.learning.data import write_hh
from training.config import RewardModelConfig
from training.data.groups import Group, RankedExample
from training.models.policy import SharedLayers, load_model
from training.models.reward import RewardModel, group_features, score_groups
from training.rewards.fit import fit

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning")

SIZE = HumanSize(None, {HEADS: (16, 48), LAYERS: (16,), LORA: (16,)})
SEEDS = [
    {
        "held_out": [0, 1, 2],
        "prompts": [0, 0, 2],
        "sources": ["helpful-base", "helpful-online", "harmless-base"],
        "right": {HEADS: {"9": [1.0, 1.0, 0.0]}, WORDS: {"9": [0.0, 1.0, 0.5]}, LENGTH: {"9": [0.0, 0.0, 0.0]}},
    },
    {
        "held_out": [2, 3],
        "prompts": [2, 3],
        "sources": ["harmless-base", "helpful-base"],
        "right": {HEADS: {"9": [1.0, 1.0]}, WORDS: {"9": [0.5, 0.0]}, LENGTH: {"9": [0.0, 0.0]}},
    },
]


def write_people(data: Path) -> None:
    """People want an answer that says yes, longer or shorter than the other."""
    drawn = random.Random(0)
    for source in ("helpful-base", "helpful-online", "harmless-base"):
        records = []
        for index in range(40):
            asked = f"\n\nHuman: Is {source} {index} sweet?\n\nAssistant:"
            long, short = " and so it goes on" * drawn.randint(0, 2), " as it is" * drawn.randint(0, 2)
            records.append((f"{asked} Yes{long}.", f"{asked} No{short}."))
        write_hh(data, source, records)


def test_each_kind_is_fitted_once_and_all_are_measured_on_the_same_comparisons(
    tiny_model: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_people(data)
    folders = tmp_path / "human", tmp_path / "features"
    found = human_preferences(tiny_model, SIZE, 2, *folders)
    first, second = found["seeds"]
    assert first["held_out"] != second["held_out"]
    usable = read_comparisons().comparisons
    shuffled = random.Random(0).sample(usable, len(usable))
    out = [i for i, each in enumerate(shuffled) if is_held_out(each.prompt[0].text, 0.2, salt="0")]
    assert first["held_out"] == out
    assert first["sources"] == [shuffled[index].source for index in out]
    numbers = {kind: list(by_number) for kind, by_number in first["right"].items()}
    both = ["16", "48"]
    assert numbers == {LENGTH: both, WORDS: both, HEADS: both, LAYERS: ["16"], LORA: ["16"]}
    for by_number in first["right"].values():
        assert {len(right) for right in by_number.values()} == {len(out)}
    assert set(first["right"][WORDS]["48"]) == {1.0}
    assert held_out_accuracy(found["seeds"], (HEADS, 48)).value > 0.9

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("a fit that is done was made again")

    monkeypatch.setattr(human, "group_features", fail)
    monkeypatch.setattr(human, "fit", fail)
    assert human_preferences(tiny_model, SIZE, 2, *folders) == found
    with pytest.raises(MadeOtherwiseError):
        human_preferences(tiny_model, HumanSize(None, {HEADS: (16,)}), 1, *folders)


def test_more_comparisons_than_there_are_are_refused(tiny_model: Path, data: Path, tmp_path: Path) -> None:
    write_people(data)
    with pytest.raises(ValueError, match="comparisons to train with, not 40"):
        human_preferences(tiny_model, HumanSize(40, {HEADS: (40,)}), 1, tmp_path / "human", tmp_path / "features")


@pytest.mark.parametrize("in_bf16", [False, True])
def test_adapters_begin_as_nothing_and_are_all_that_is_trained(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch, in_bf16: bool
) -> None:
    monkeypatch.setattr("policies.precision.cpu_multiplies_bf16", lambda: in_bf16)
    shared = SharedLayers(load_model(tiny_model))
    config = RewardModelConfig(num_trained_layers=2, learning_rate=0.01)
    plain, adapted = RewardModel(shared, config), RewardModel(shared, config)
    adapt(adapted, rank=2, alpha=4.0, seed=0)
    groups = [Group((5, 6), ((7 + index, 8), (9, 10 + index))) for index in range(24)]
    before = group_features(plain, groups[:1])[0]
    torch.testing.assert_close(group_features(adapted, groups[:1])[0], before)
    frozen = {name: tensor.clone() for name, tensor in adapted.layers.named_buffers()}
    assert {name.rpartition(".")[2] for name, _ in adapted.layers.named_parameters()} == {"down_RD", "up_OR"}
    examples = [RankedExample(group, (0, 1), f"user {index}", index) for index, group in enumerate(groups)]
    fit(adapted, examples, config, seed=0, warm=False, log=lambda *_: None)
    assert sum(bool(each.any()) for name, each in adapted.layers.named_parameters() if "up_OR" in name) == 14
    for name, tensor in adapted.layers.named_buffers():
        torch.testing.assert_close(tensor, frozen[name].bfloat16().to(tensor))
    assert not torch.allclose(group_features(adapted, groups[:1])[0], before)
    assert all(chosen > rejected for chosen, rejected in score_groups(adapted, groups))


def test_a_comparison_counts_once_whatever_number_of_splits_hold_it_out() -> None:
    ours, difference = (held_out_accuracy(SEEDS, (HEADS, 9), rival) for rival in (None, (WORDS, 9)))
    assert ours.value == pytest.approx((1 + 1 + 0.5 + 1) / 4)
    assert difference.value == pytest.approx((1 + 0 + 0 + 1) / 4)
    assert difference.name == f"HH-RLHF accuracy: {HEADS}, 9 comparisons, less {WORDS}"
    for each in (ours, difference):
        assert each.low is not None
        assert each.high is not None
        assert each.low < each.value < each.high


def test_the_table_and_the_figures_compare_at_equal_numbers(tmp_path: Path) -> None:
    rows = list(human_rows(SEEDS))
    assert [row[:3] for row in rows] == [[HEADS, "9", "87.5"], [WORDS, "9", "37.5"], [LENGTH, "9", "0.0"]]
    assert rows[0][5:8] == ["100.0", "50.0", "50.0"]
    assert {len(row) for row in rows} == {len(HUMAN_HEADINGS)}
    figures = human_figures(SEEDS)
    assert (figures[0].goal, figures[0].met) == (0.5, True)
    assert len(figures) == 5
    draw_human(SEEDS, tmp_path / "human.svg")
    assert (tmp_path / "human.svg").stat().st_size > 5000
