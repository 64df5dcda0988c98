"""The learning benchmark from end to end, on a tiny random policy: all of its stages, its figures and its page."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from bench.learning import instruct
from bench.learning.__main__ import gathered
from bench.learning.figures import figures_of
from bench.learning.hh_rlhf import Message
from bench.learning.instruct import Experiment, Size, run_experiment
from bench.learning.lab import Lab
from bench.learning.page import write_page
from bench.learning.tax import HellaSwagItem
from bench.result import bench_result
from deploy.simulation.labelers import make_labelers
from training.ppo.rollouts import RolloutEngine

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
    pytest.mark.timeout(240),
]

SIZE = Size(
    num_rankings=96, ks=range(2, 4), num_demonstrations=8, best_of=2, num_rounds=3, num_held_out=6, tax_tokens=200,
    tax_items=4,
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
def small_world(monkeypatch: pytest.MonkeyPatch) -> None:
    """Data sets that need no download, and enough tokens for a window of text."""
    shots = [Message("user", "Why?"), Message("assistant", "Because.")]
    monkeypatch.setattr(instruct, "train_prompts", prompts)
    monkeypatch.setattr(instruct, "held_out_prompts", lambda count: [f"Why is {index}?" for index in range(count)])
    monkeypatch.setattr(instruct, "few_shot_prefix", lambda: shots)
    monkeypatch.setattr(instruct, "read_wikitext", lambda part: PARAGRAPHS)
    monkeypatch.setattr(instruct, "read_hellaswag", lambda: ITEMS)
    monkeypatch.setattr(instruct, "TAX_WINDOW", 64)
    monkeypatch.setattr(instruct, "SFT", instruct.SFT.model_copy(update={"num_epochs": 1}))


@pytest.mark.usefixtures("small_world")
def test_every_stage_runs_once_and_the_page_tells_of_it(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    engine = RolloutEngine(
        tiny_model, max_model_len=512, max_num_seqs=64, kv_cache_mib=64, eos_token_id=tokenizer.eos_token_id, seed=0
    )
    lab = Lab(engine, tokenizer, tiny_model, utility, 8, seed=0)
    lab.load(tiny_model)
    labelers = make_labelers(7, 0, 1.0)
    ranked = lab.rank(lab.ask(prompts(9)), labelers, SIZE.ks, salt=5, first_seq=3)
    # The labeler who ranked the last prompt of one part does not rank the first of the next.
    assert [each.labeler for each in ranked] == [labelers[seq % 7].user_id for seq in range(3, 12)]
    assert [each.seq for each in ranked] == list(range(3, 12))

    experiment = Experiment(lab, SIZE, tmp_path / "chat-0")
    found = run_experiment(experiment)
    assert [len(found[name]["rounds"]) for name in ("ppo", "ppo-ptx", "online")] == [3, 3, 3]
    assert "ptx/loss" in found["ppo-ptx"]["rounds"][0]
    assert "ptx/loss" not in found["ppo"]["rounds"][0]
    assert [each["part"] for each in found["online"]["rounds"]] == [0, 1, 2]

    def fail(*_: Any) -> dict[str, Any]:
        raise AssertionError("a stage that is done was run again")

    for stage in ("make_sft", "make_rewards", "optimise", "optimise_online", "answer", "tax"):
        monkeypatch.setattr(instruct, stage, fail)
    assert run_experiment(experiment) == found

    human: Sequence[dict[str, Any]] = [
        {"held_out": [3, 5], "prompts": [0, 5], "reward model": [1, 1], "bag of words": [1, 0], "length": [0, 0.5]}
    ]
    everything = gathered({"chat-0": found, "human": {"seeds": human}})
    assert list(everything) == ["human", "chat"]
    figures = {figure.name: figure for figure in figures_of(everything)}
    assert figures["HH-RLHF accuracy: reward model"].met
    assert 0 <= figures["chat: ppo-ptx over base"].value <= 1
    on = {"commit": "abc1234", "computes_in": "bf16", "cpu": "a CPU", "cores": 2}
    ran = {"chat-0": found | {"on": on}, "human": {"on": on, "seconds": 5400.0}}
    result = bench_result("learning", list(figures.values()))
    page = write_page(everything, ran, result, tmp_path / "results")
    assert "Not finished" not in page.read_text()
    assert "| chat-0 | abc1234 | bf16 | a CPU | 2 | 0.0 |" in page.read_text()
    assert "| human | abc1234 | bf16 | a CPU | 2 | 1.5 |" in page.read_text()
    assert "chat: ppo over sft" in page.read_text()
    assert "| chat, online, seed 0 | 3 |" in page.read_text()
    assert (tmp_path / "results" / "learning-chat.svg").stat().st_size > 5000

    alone = gathered({"chat-2": found})
    assert [figure.name for figure in figures_of(alone)] == [name for name in figures if name.startswith("chat")]
    page = write_page(alone, ran, result, tmp_path / "results", missing=["chat-0", "human"])
    assert "**Not finished.** Missing: chat-0, human." in page.read_text()
    assert "| chat, online, seed 2 | 3 |" in page.read_text()
