"""Being online: every arm learns from as many rankings, of the answers that it should."""

from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from bench.learning import answers, online
from bench.learning.experiment import Experiment, Size
from bench.learning.figures import figures_of
from bench.learning.lab import Lab
from bench.learning.online import ARMS, OnlineSize, run_online, stretches
from bench.learning.online_page import ONLINE_HEADINGS, online_rows
from training.config import PpoConfig, SftConfig
from training.ppo.ppo_math import rate_factor
from training.ppo.rollouts import RolloutEngine

pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::UserWarning"),
    pytest.mark.timeout(240),
]

SIZE = Size(
    num_rankings=96, ks=range(2, 4), num_demonstrations=8, best_of=2, num_held_out=6, num_samples=2, num_scored=4,
    tax_tokens=200, tax_items=4,
    ppo=PpoConfig(num_rounds=4, num_decay_rounds=1, prompts_per_round=4),
    sft=SftConfig(num_epochs=1, min_demonstrations=4),
)  # fmt: skip
ONLINE = OnlineSize(32, num_parts=2, num_candidates=2)


def utility(prompt: str, completion: str) -> float:
    return float(len(set(completion)))


def rates(config: PpoConfig) -> list[float]:
    return [
        rate_factor(index, config.num_rounds, config.num_warmup_rounds, config.num_decay_rounds)
        for index in range(config.num_rounds)
    ]


def test_stretches_have_one_schedule_except_that_each_warms_up() -> None:
    config = PpoConfig(num_rounds=12, num_decay_rounds=2)
    found = [rate for each in stretches(config, 3) for rate in rates(each)]
    begins = {0, 4, 8}
    assert [rate for i, rate in enumerate(found) if i not in begins] == [
        rate for i, rate in enumerate(rates(config)) if i not in begins
    ]
    assert all(found[index] == 0.5 for index in begins)
    for wrong in (config.model_copy(update={"num_rounds": 10}), config.model_copy(update={"num_decay_rounds": 5})):
        with pytest.raises(ValueError, match="are not 3 stretches"):
            stretches(wrong, 3)


def test_every_arm_has_as_many_rankings_and_runs_once(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompts = [f"What is number {index}?" for index in range(SIZE.num_rankings)]
    monkeypatch.setattr(online, "train_prompts", lambda count: prompts[:count])
    monkeypatch.setattr(answers, "held_out_prompts", lambda count: [f"Why is {index}?" for index in range(count)])
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    engine = RolloutEngine(
        tiny_model, max_model_len=512, max_num_seqs=64, kv_cache_mib=64, end_token_ids=[tokenizer.eos_token_id], seed=0
    )
    lab = Lab(engine, tokenizer, tiny_model, utility, 8, seed=0)
    fitted: list[tuple[list[int], list[tuple[int, ...]]]] = []
    fit_rewards = online.fit_rewards

    def spy(shared: Any, rankings: Any, num_of_reference: int, seed: int) -> Any:
        fitted.append(([each.seq for each in rankings.examples], [each.group.prompt for each in rankings.examples]))
        assert num_of_reference == (32 if len(fitted) == 1 else 16)
        return fit_rewards(shared, rankings, num_of_reference, seed)

    monkeypatch.setattr(online, "fit_rewards", spy)
    experiment, chat = (Experiment(lab, SIZE, tmp_path / name, tmp_path / "shared") for name in ("online-0", "chat-0"))
    found = run_online(experiment, chat, ONLINE)
    assert [len(seqs) for seqs, _ in fitted] == [32, 16, 32, 16, 32]
    assert all(seqs == list(range(len(seqs))) for seqs, _ in fitted)
    assert all(len(set(asked)) == len(asked) for _, asked in fitted)
    # The first part is the same in all arms.
    assert fitted[0][1][:16] == fitted[1][1] == fitted[3][1]
    for arm in ARMS:
        assert [each["part"] for each in found[arm]["rounds"]] == [0, 0, 1, 1]
        assert [len(part["prompts"]) for part in found[arm]["parts"]] == [16, 16]
        assert len(found[f"answers-{arm}"]["utilities"]) == SIZE.num_held_out
    doubt = found["online-chosen"]["parts"][1]["doubt"]
    assert doubt["chosen"] > doubt["candidates"]
    assert max(found["online-chosen"]["parts"][1]["prompts"]) > 32
    assert found["online"]["parts"][1]["prompts"] == list(range(16, 32))

    def fail(*_: Any) -> dict[str, Any]:
        raise AssertionError("an arm that is done was run again")

    monkeypatch.setattr(online, "_run_arm", fail)
    monkeypatch.setattr(online, "make_sft", fail)
    assert run_online(experiment, chat, ONLINE) == found
    figures = [figure.name for figure in figures_of({"online": [found | {"seed": 0}]})]
    assert figures[-4:] == [
        "online: online-chosen over online", "online: KL of offline", "online: KL of online",
        "online: KL of online-chosen",
    ]  # fmt: skip
    rows = list(online_rows([found | {"seed": 0}]))
    assert {len(row) for row in rows} == {len(ONLINE_HEADINGS)}
    assert [row[0] for row in rows] == [f"{arm}, seed 0" for arm in ARMS]
