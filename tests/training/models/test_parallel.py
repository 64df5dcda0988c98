"""Two processes, on the CPU over gloo, do together what one does: the same steps, the same decisions, the same run."""

import json
import signal
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from policies import precision
from tests.training import ranks as work
from tests.training.learning import EOS, PPO, fitted, hooks_of, learner_of
from tests.training.ranks import left, on_two_ranks
from tests.training.sampling import PlainSampler
from training.config import LoraConfig, PtxConfig
from training.data.groups import micro_batches
from training.errors import TrainingError
from training.models.parallel import ALONE, Ranks, join, micro_batches_in_step
from training.models.policy import SharedLayers
from training.ppo import rounds as ppo
from training.ppo.rollouts import Request, Rollout
from training.runs.checkpoint import newest_checkpoint

PTX = PtxConfig(data="given by the test", sequence_tokens=12, num_calibration_steps=1)
UPDATE = PPO.model_copy(
    update={"num_rounds": 1, "prompts_per_round": 8, "num_minibatches": 1, "num_epochs": 2, "micro_batch_tokens": 24}
)
# bf16 rounds a row differently beside a longer one, or where weights differ in their last bits. So each row is alone,
# and there is one optimizer step.
BF16 = {"micro_batch_tokens": 1, "num_epochs": 1, "ptx": PTX.model_copy(update={"gamma": 0.5})}
# The first rank packs rows of these lengths into fewer micro-batches than the second.
LENGTHS = (1, 2, 2, 5, 5, 5, 6, 6)


@pytest.fixture(scope="module")
def drawn(tiny_folder: Path) -> dict[ppo.Prompt, list[Rollout]]:
    """Draws rollouts of eight prompts, of 1 to 6 tokens."""
    return {
        (1, 50 + index, 90, 17): PlainSampler(tiny_folder, EOS).draw(
            Request((), [(1, 50 + index, 90, 17)], 2, length, index)
        )[0]
        for index, length in enumerate(LENGTHS)
    }


def distance(ours: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> float:
    """Returns the largest difference of two weights of the same name."""
    assert ours.keys() == theirs.keys()
    return max(float((tensor - theirs[name]).abs().max()) for name, tensor in ours.items())


@pytest.mark.parametrize(
    ("changes", "fp32"),
    [
        pytest.param({}, True, id="PPO"),
        pytest.param({"ptx": PTX, "gradient_checkpointing": True}, True, id="PPO-ptx, checkpointing"),
        pytest.param(BF16, False, id="PPO-ptx, bf16"),
        pytest.param(BF16 | {"lora": LoraConfig(rank=4)}, False, id="LoRA, bf16"),
    ],
)
def test_two_ranks_take_the_steps_that_one_takes(
    tiny_folder: Path,
    tmp_path: Path,
    drawn: dict[ppo.Prompt, list[Rollout]],
    changes: dict[str, Any],
    fp32: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = UPDATE.model_copy(update=changes)
    assert on_two_ranks(work.one_update, tiny_folder, tmp_path, config, drawn, fp32) == [0, 0]
    (first, (first_saw,)), (second, (second_saw,)) = left(tmp_path, 0), left(tmp_path, 1)
    assert distance(first, second) == 0
    assert first_saw == second_saw
    # So that the change that the update makes is undone.
    monkeypatch.setattr("policies.precision.cpu_multiplies_bf16", precision.cpu_multiplies_bf16)
    work.one_update(ALONE, tiny_folder, tmp_path, config, drawn, fp32)
    alone, (alone_saw,) = left(tmp_path, 0)
    # A step of AdamW moves a weight by up to 2e-3.
    assert distance(first, alone) < 1e-5
    assert first_saw == pytest.approx(alone_saw, rel=1e-4, abs=1e-6)


def test_the_ranks_of_the_update_would_not_have_had_equally_many_micro_batches(
    drawn: dict[ppo.Prompt, list[Rollout]],
) -> None:
    lengths = sorted(len(prompt) + sum(len(each.token_ids) for each in found) for prompt, found in drawn.items())
    first, second = (len(micro_batches(lengths[rank::2], UPDATE.micro_batch_tokens)) for rank in (0, 1))
    assert (first, second) == (3, 4)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=12), st.integers(1, 4), st.integers(1, 100))
def test_ranks_have_each_row_once_and_equally_many_micro_batches(times: list[int], size: int, max_tokens: int) -> None:
    lengths = [length for length in times for _ in range(size)]
    dealt = [micro_batches_in_step(Ranks(rank, size), lengths, max_tokens) for rank in range(size)]
    assert len({len(batches) for batches in dealt}) == 1
    assert sorted(index for batches in dealt for batch in batches for index in batch) == list(range(len(lengths)))
    for batch in (batch for batches in dealt for batch in batches):
        assert batch
        assert len(batch) == 1 or len(batch) * max(lengths[index] for index in batch) <= max_tokens
    assert micro_batches_in_step(ALONE, lengths, max_tokens) == micro_batches(lengths, max_tokens)


def test_rows_that_ranks_cannot_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="3 cannot be divided evenly among 2 processes"):
        micro_batches_in_step(Ranks(0, 2), [1, 2, 3], 10)


EVERYTHING = PPO.model_copy(
    update={
        "num_rounds": 4, "prompts_per_round": 8, "rollouts_per_prompt": 2, "max_tokens": 6, "num_epochs": 2,
        "ema_decay": 0.8, "target_kl": 0.5, "micro_batch_tokens": 40,
        "ptx": PTX.model_copy(update={"num_calibration_steps": 6}),
    }
)  # fmt: skip


def test_a_run_whose_ranks_were_killed_ends_bit_for_bit_as_one_that_was_not(tiny_folder: Path, tmp_path: Path) -> None:
    for name in ("alive", "killed"):
        (tmp_path / name).mkdir()
    assert on_two_ranks(work.several_rounds, tiny_folder, tmp_path / "alive", EVERYTHING, None) == [0, 0]
    killed = [-signal.SIGKILL, -signal.SIGKILL]
    assert on_two_ranks(work.several_rounds, tiny_folder, tmp_path / "killed", EVERYTHING, 2) == killed
    found = newest_checkpoint(tmp_path / "killed" / "checkpoints")
    assert found is not None
    assert found.round == 2
    assert on_two_ranks(work.several_rounds, tiny_folder, tmp_path / "killed", EVERYTHING, None) == [0, 0]
    expected, all_figures = left(tmp_path / "alive", 0)
    assert len(all_figures) == 4
    for rank in (0, 1):
        weights, figures = left(tmp_path / "killed", rank)
        assert distance(weights, expected) == 0
        assert figures == all_figures[2:]


def test_a_run_resumes_with_another_number_of_ranks(tiny_folder: Path, tmp_path: Path) -> None:
    killed = [-signal.SIGKILL, -signal.SIGKILL]
    assert on_two_ranks(work.several_rounds, tiny_folder, tmp_path, EVERYTHING, 3) == killed
    found = newest_checkpoint(tmp_path / "checkpoints")
    assert found is not None
    work.several_rounds(ALONE, tiny_folder, tmp_path, EVERYTHING, None)
    weights, figures = left(tmp_path, 0)
    assert len(figures) == 1
    assert {name: tensor.shape for name, tensor in weights.items() if name.startswith("policy.")} == {
        name.removeprefix("learner/"): tensor.shape
        for name, tensor in found.tensors.items()
        if name.startswith("learner/policy.")
    }


def test_all_ranks_stop_at_the_same_round_and_keep_the_same_policy(tiny_folder: Path, tmp_path: Path) -> None:
    config = PPO.model_copy(update={"max_kl": 0.7, "rollouts_per_prompt": 2})
    assert on_two_ranks(work.several_rounds, tiny_folder, tmp_path, config, None) == [0, 0]
    (first, first_saw), (second, second_saw) = left(tmp_path, 0), left(tmp_path, 1)
    assert first_saw == second_saw
    assert 2 < len(first_saw) < config.num_rounds
    assert "ppo.max_kl = 0.7" in first_saw[-1]["stopped/reason"]
    assert distance(first, second) == 0


def test_what_the_first_rank_does_alone_all_know_and_its_failure_too(tmp_path: Path) -> None:
    assert on_two_ranks(work.first_decides, tmp_path) == [0, 0]
    first, second = (json.loads((tmp_path / f"said-{rank}.json").read_text()) for rank in (0, 1))
    assert first[0] == second[0] == "{'rank': 0}"
    assert (first[1], second[1]) == ("FileNotFoundError", "TrainingError")
    assert "/no/such/file" in second[2]
    assert first[3:] == second[3:] == ["rank 0", "rank 1"]


def test_a_rank_that_dies_takes_the_other_with_it() -> None:
    first, second = on_two_ranks(work.one_dies)
    assert (first, second) == (1, -signal.SIGKILL)


def test_another_number_of_processes_than_configured_is_refused() -> None:
    with pytest.raises(TrainingError, match=r"training\.num_processes is 8, but 1 were started"):
        join(8)


def test_prompts_that_ranks_cannot_divide_end_the_run(shared: SharedLayers, tiny_folder: Path) -> None:
    learner = replace(learner_of(shared, tiny_folder, PPO, fitted(shared, count=20)), ranks=Ranks(0, 3))
    hooks, _ = hooks_of(tiny_folder, PPO)
    with pytest.raises(TrainingError, match=r"ppo\.prompts_per_round: 16 is not a multiple of 6"):
        ppo.train(learner, PPO, hooks, seed=0)
