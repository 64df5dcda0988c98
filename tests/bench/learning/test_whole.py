"""The learning benchmark from end to end, on a tiny random policy: all of its stages, its figures and its page."""

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from bench.learning import answers, factors, instruct
from bench.learning.__main__ import gathered
from bench.learning.experiment import Experiment, Size
from bench.learning.figures import figures_of
from bench.learning.hh_rlhf import Message
from bench.learning.instruct import run_experiment
from bench.learning.lab import Lab
from bench.learning.page import write_page
from bench.learning.tax import HellaSwagItem
from bench.result import bench_result
from deploy.simulation.labelers import make_labelers
from training.config import PpoConfig, SftConfig
from training.ppo.rollouts import RolloutEngine

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
    pytest.mark.timeout(240),
]

SIZE = Size(
    num_rankings=96, ks=range(2, 4), num_demonstrations=8, best_of=2, num_held_out=6, num_samples=2, num_scored=4,
    tax_tokens=200, tax_items=4, sft=SftConfig(num_epochs=1, min_demonstrations=8),
    ppo=PpoConfig(num_rounds=3, num_decay_rounds=1, prompts_per_round=4),
)  # fmt: skip
PARAGRAPHS = "\n".join(
    f"The garden number {i} wants sun, water and good soil, and a dark and cool room." for i in range(60)
)
ITEMS = [
    HellaSwagItem(f"In the garden {i}", ("we sleep.", "they cook well.", "it rains.", "you see."), i % 4)
    for i in range(6)
]


def utility(prompt: str, completion: str) -> float:
    return float(len(set(completion)))


def prompts(count: int) -> list[str]:
    return [f"What is number {index} of {count}?" for index in range(count)]


@pytest.fixture
def small_world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets that need no download, and enough tokens for a window of text."""
    shots = [Message("user", "Why?"), Message("assistant", "Because.")]
    monkeypatch.setattr(instruct, "train_prompts", prompts)
    monkeypatch.setattr(factors, "train_prompts", prompts)
    monkeypatch.setattr(answers, "held_out_prompts", lambda count: [f"Why is {index}?" for index in range(count)])
    monkeypatch.setattr(answers, "few_shot_prefix", lambda: shots)
    monkeypatch.setattr(instruct, "read_wikitext", lambda part: PARAGRAPHS)
    monkeypatch.setattr(instruct, "read_hellaswag", lambda: ITEMS)
    monkeypatch.setattr(instruct, "TAX_WINDOW", 64)
    mix = tmp_path / "data" / "gsm8k" / "train.jsonl.gz"
    mix.parent.mkdir(parents=True)
    item = {
        "question": "What is the sum of the numbers\nin the garden?",
        "answer": "It is the sun and the water. " * 20,
    }
    with gzip.open(mix, "wt") as file:
        file.writelines(f"{json.dumps(item)}\n" for _ in range(20))
    monkeypatch.setenv("ALIGND_TEST_DATA", str(tmp_path / "data"))


@pytest.mark.usefixtures("small_world")
def test_every_stage_runs_once_and_the_page_tells_of_it(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    engine = RolloutEngine(
        tiny_model, max_model_len=512, max_num_seqs=64, kv_cache_mib=64, end_token_ids=[tokenizer.eos_token_id], seed=0
    )
    lab = Lab(engine, tokenizer, tiny_model, utility, 8, seed=0)
    lab.load(tiny_model)
    labelers = make_labelers(7, 0, 1.0)
    ranked = lab.rank(lab.ask(prompts(9)), labelers, SIZE.ks, salt=5, first_seq=3)
    # The labeler who ranked the last prompt of one part does not rank the first of the next.
    assert [each.labeler for each in ranked] == [labelers[seq % 7].user_id for seq in range(3, 12)]
    assert [each.seq for each in ranked] == list(range(3, 12))

    experiment = Experiment(lab, SIZE, tmp_path / "chat-0", tmp_path / "shared")
    found = run_experiment(experiment)
    assert [len(found[name]["rounds"]) for name in ("ppo", "ppo-ptx")] == [3, 3]
    assert "ptx/loss" in found["ppo-ptx"]["rounds"][0]
    assert "ptx/loss" not in found["ppo"]["rounds"][0]
    # Labelers demonstrate the best.
    shown = found["sft"]["demonstrations"]
    assert shown["utility"] > shown["utility of the base"]
    sizes = {name: [len(each) for each in found[f"answers-{name}"]["utilities"]] for name in ("base", "sft", "ppo")}
    assert sizes == {"base": [2] * 6, "sft": [4] * 6, "ppo": [2] * 6}
    assert [len(each) for each in found["scores-sft"]["scores"]] == [4] * 6
    monkeypatch.setitem(
        factors.FACTORS, "fewer-rounds", {"num_rounds": 2, "prompts_per_round": 6, "num_minibatches": 2}
    )
    tried = factors.try_factor(experiment, "fewer-rounds")
    assert len(tried["run"]["rounds"]) == 2
    monkeypatch.setitem(factors.FACTORS, "cheaper", {"num_rounds": 2})
    with pytest.raises(ValueError, match="another number of prompts"):
        factors.try_factor(experiment, "cheaper")

    def fail(*_: Any) -> dict[str, Any]:
        raise AssertionError("a stage that is done was run again")

    for module, stage in (
        (instruct, "make_sft"), (instruct, "make_rewards"), (instruct, "optimise"), (instruct, "score_answers"),
        (instruct, "tax"), (answers, "_answer"),
    ):  # fmt: skip
        monkeypatch.setattr(module, stage, fail)
    assert run_experiment(experiment) == found
    # Another utility draws nothing anew of the base.
    other = Experiment(lab, SIZE, tmp_path / "plain-0", tmp_path / "shared")
    assert answers.evaluate(other, "base") == found["answers-base"]

    everything = gathered({"chat-0": found, "factor-fewer-rounds-0": tried})
    assert list(everything) == ["chat", "factor-fewer-rounds"]
    figures = {figure.name: figure for figure in figures_of(everything)}
    assert 0 <= figures["fewer-rounds over the recipe"].value <= 1
    best = [figure for name, figure in figures.items() if name.startswith("chat: best of ")]
    assert [figure.name for figure in best] == [
        f"chat: best of {n} over base, at {kl} nats" for n, kl in ((1, "0.00"), (2, "0.19"), (4, "0.64"))
    ]
    assert 0 <= figures["chat: ppo-ptx over base"].value <= 1
    on = {"commit": "abc1234", "computes_in": "bf16", "cpu": "a CPU", "cores": 2}
    ran = {"chat-0": found | {"on": on}, "factor-fewer-rounds-0": tried | {"on": on}}
    result = bench_result("learning", list(figures.values()))
    page = write_page(everything, ran, result, tmp_path / "results")
    assert "Not finished" not in page.read_text()
    assert "| chat-0 | abc1234 | bf16 | a CPU | 2 | 0.0 |" in page.read_text()
    assert "| factor-fewer-rounds-0 | abc1234 | bf16 | a CPU | 2 | 0.0 |" in page.read_text()
    tried["run"]["seconds"] = 5400.0
    assert write_page(everything, ran, result, tmp_path / "results").read_text().count("| 2 | 1.5 |") == 1
    assert "chat: ppo over sft" in page.read_text()
    assert "| chat, ppo-ptx, seed 0 | 3 |" in page.read_text()
    assert (tmp_path / "results" / "learning-chat.svg").stat().st_size > 5000

    alone = gathered({"chat-2": found})
    assert [figure.name for figure in figures_of(alone)] == [name for name in figures if name.startswith("chat")]
    page = write_page(alone, ran, result, tmp_path / "results", missing=["chat-0", "human"])
    assert "**Not finished.** Missing: chat-0, human." in page.read_text()
    assert "| chat, ppo, seed 2 | 3 |" in page.read_text()
