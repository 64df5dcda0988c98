"""The whole learner on a tiny policy: a preference is learned from rankings, and PPO moves the policy towards it."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.training.learning import (
    PPO,
    PROMPTS,
    REWARD_MODEL,
    fitted,
    hooks_of,
    learner_of,
    ranked_examples,
    request_of,
    silent,
    worths,
)
from training.config import LoraConfig, PtxConfig
from training.data.groups import Group
from training.errors import TrainingError
from training.models.masters import Weights, trained, trained_weights
from training.models.policy import SharedLayers, load_model, merged_tensors, merged_weights
from training.models.reward import RewardModel, normalise, score_groups
from training.ppo import ptx
from training.ppo import rounds as ppo
from training.ppo.experience import gather
from training.ppo.gradients import accumulate_gradients
from training.ppo.learner import load_policy
from training.ppo.rollouts import Rollout
from training.rewards.evaluation import evaluate_rewards

Gradients = list[list[Tensor]]


def mean_worth(shared: SharedLayers, rollouts: list[list[Rollout]]) -> float:
    worth = worths(shared)
    tokens = [token for group in rollouts for rollout in group for token in rollout.token_ids]
    return sum(worth[token] for token in tokens) / len(tokens)


def kept(seen: list[dict[str, Any]]) -> ppo.Log:
    return lambda index, count, metrics: seen.append(metrics)


@pytest.mark.parametrize("lora", [LoraConfig(), LoraConfig(rank=8)], ids=["full weights", "LoRA"])
def test_reward_model_learns_a_preference_and_ppo_follows_it(
    shared: SharedLayers, tiny_folder: Path, lora: LoraConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    beats: list[None] = []
    monkeypatch.setattr("feedback.heartbeat.beat", lambda: beats.append(None))
    rewards = fitted(shared)
    assert len(beats) > 3, "fitting shows its progress from within"
    evaluated = evaluate_rewards(rewards, ranked_examples(shared, 40, seed=2))
    assert evaluated is not None
    assert evaluated.num_comparisons > 150
    # The random layers drown most of the embedding: the same head finds 0.74 here, and chance is 0.5.
    assert evaluated.accuracy > 0.65

    seen: list[dict[str, Any]] = []
    rate = {"learning_rate": 1e-2} if lora.rank else {}
    config = PPO.model_copy(update={"lora": lora, **rate})
    hooks, sampler = hooks_of(tiny_folder, config, kept(seen))
    before = sampler.draw(request_of(config, 7))
    references = [Group(p, tuple(r.token_ids for r in drawn)) for p, drawn in zip(PROMPTS, before, strict=True)]
    normalise(rewards, torch.cat(score_groups(rewards, references)))
    scores = torch.cat(score_groups(rewards, references))
    assert float(scores.mean()) == pytest.approx(0, abs=1e-4)
    assert float(scores.std()) == pytest.approx(1, abs=1e-4)

    learner = learner_of(shared, tiny_folder, config, rewards)
    beats.clear()
    assert ppo.train(learner, config, hooks, seed=0) is None
    assert len(beats) >= config.num_rounds * config.num_minibatches * (1 + config.num_epochs)
    assert len(seen) == config.num_rounds == sampler.num_draws - 1
    assert seen[0]["objective/kl"] == pytest.approx(0, abs=1e-6)
    assert seen[-1]["objective/score"] > seen[0]["objective/score"] + 0.5
    assert seen[-1]["objective/kl"] > 0
    assert (
        mean_worth(shared, sampler.draw(request_of(config, 8, merged_tensors(shared, learner.policy))))
        > mean_worth(shared, before) + 0.2
    )


def test_ppo_stops_at_the_kl_budget_and_keeps_the_last_good_policy(shared: SharedLayers, tiny_folder: Path) -> None:
    seen: list[dict[str, Any]] = []
    rounds: list[Weights] = []
    config = PPO.model_copy(update={"max_kl": 0.5})
    learner = learner_of(shared, tiny_folder, config, fitted(shared))
    hooks, _ = hooks_of(tiny_folder, config, kept(seen))
    hooks = replace(hooks, between_rounds=lambda: rounds.append(trained_weights(learner.policy)))
    reason = ppo.train(learner, config, hooks, seed=0)
    assert reason is not None
    assert "ppo.max_kl = 0.5" in reason
    assert 2 < len(seen) == len(rounds) < config.num_rounds
    assert seen[-1]["objective/kl"] > 0.5 > seen[-2]["objective/kl"]
    assert seen[-1]["stopped/reason"] == reason
    for name, tensor in trained_weights(learner.policy).items():
        assert torch.equal(tensor, rounds[-2][name])


def test_ppo_that_makes_nothing_within_bounds_keeps_nothing(shared: SharedLayers, tiny_folder: Path) -> None:
    """Otherwise the policy that it began from would be registered as a new one."""
    config = PPO.model_copy(update={"max_kl": 1e-4, "learning_rate": 1e-2})
    hooks, _ = hooks_of(tiny_folder, config)
    with pytest.raises(TrainingError, match=r"stopped in round 2 with nothing better to keep: .*ppo.max_kl"):
        ppo.train(learner_of(shared, tiny_folder, config, fitted(shared)), config, hooks, seed=0)


def test_what_is_not_finite_stops_the_run_and_changes_nothing(shared: SharedLayers, tiny_folder: Path) -> None:
    rewards = fitted(shared)
    with torch.no_grad():
        rewards.heads_FE[0] = torch.nan
    learner = learner_of(shared, tiny_folder, PPO, rewards)
    hooks, _ = hooks_of(tiny_folder, PPO)
    before = trained_weights(learner.policy)
    with pytest.raises(TrainingError, match="not finite: objective/score, objective/held_out_score"):
        ppo.train(learner, PPO, hooks, seed=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in trained_weights(learner.policy).items())


def test_a_loss_that_is_not_finite_is_an_error(shared: SharedLayers, tiny_folder: Path) -> None:
    learner = learner_of(shared, tiny_folder, PPO, fitted(shared))
    with torch.no_grad():
        learner.value.head_F[0] = torch.nan
    hooks, _ = hooks_of(tiny_folder, PPO)
    with pytest.raises(TrainingError, match="must be finite"):
        ppo.train(learner, PPO, hooks, seed=0)


def test_a_loss_that_is_not_finite_later_leaves_the_last_good_policy(shared: SharedLayers, tiny_folder: Path) -> None:
    learner = learner_of(shared, tiny_folder, PPO, fitted(shared))
    seen: list[dict[str, Any]] = []
    good: list[Weights] = []

    def poison() -> None:
        if len(seen) == 2:
            good.append(trained_weights(learner.policy))
            with torch.no_grad():
                learner.value.head_F[0] = torch.nan

    hooks, _ = hooks_of(tiny_folder, PPO, kept(seen))
    reason = ppo.train(learner, PPO, replace(hooks, between_rounds=poison), seed=0)
    assert reason is not None
    assert "must be finite" in reason
    assert len(seen) == 3
    assert seen[-1]["stopped/reason"] == reason
    assert all(torch.equal(tensor, good[0][name]) for name, tensor in trained_weights(learner.policy).items())


def test_rates_warm_up_and_the_result_is_the_average_of_weights(shared: SharedLayers, tiny_folder: Path) -> None:
    config = PPO.model_copy(update={"num_rounds": 3, "ema_decay": 0.6, "num_warmup_rounds": 1})
    learner = learner_of(shared, tiny_folder, config, fitted(shared, count=20))
    rates: list[list[float]] = []
    learner.optimizer.register_step_pre_hook(
        lambda optimizer, *_: rates.append([group["lr"] for group in optimizer.param_groups])
    )
    weights = [trained_weights(learner.policy)]
    hooks, _ = hooks_of(tiny_folder, config, lambda *_: weights.append(trained_weights(learner.policy)))
    assert ppo.train(learner, config, hooks, seed=0) is None
    peaks = [config.learning_rate, config.value_learning_rate]
    assert rates == [pytest.approx([peak * factor for peak in peaks]) for factor in (0.5, 0.5, 1, 1, 1, 1)]
    for name, found in trained_weights(learner.policy).items():
        expected = weights[0][name]
        for each in weights[1:]:
            expected = 0.6 * expected + 0.4 * each[name]
        torch.testing.assert_close(found, expected)


def test_rollouts_follow_steps_too_small_for_bf16_where_fp32_is_computed(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("policies.precision.cpu_multiplies_bf16", lambda: False)
    shared = SharedLayers(load_model(tiny_folder))
    config = PPO.model_copy(update={"num_rounds": 2, "learning_rate": 1e-6})
    learner = learner_of(shared, tiny_folder, config, fitted(shared, count=20))
    seen: list[dict[str, Any]] = []
    hooks, _ = hooks_of(tiny_folder, config, kept(seen))
    assert ppo.train(learner, config, hooks, seed=0) is None
    assert seen[1]["rollout/sampler_gap"] < 1e-5
    tensors = merged_tensors(shared, learner.policy, torch.float32)
    lost = [name for name, tensor in tensors if not torch.equal(tensor, tensor.bfloat16().float())]
    assert lost


def test_scores_are_clipped(shared: SharedLayers, tiny_folder: Path) -> None:
    learner = learner_of(shared, tiny_folder, PPO, fitted(shared, count=60))
    _, sampler = hooks_of(tiny_folder, PPO)
    rows = list(zip(PROMPTS, sampler.draw(request_of(PPO, 1)), strict=True))
    free, clipped = (
        torch.cat([
            each.scores_N
            for minibatch in gather(learner, PPO.model_copy(update={"score_clip": clip}), rows, 0.02, seed=3)[0]
            for each in minibatch
        ])
        for clip in (100.0, 0.5)
    )  # fmt: skip
    assert float(free.max()) > 0.5 > -0.5 > float(free.min())
    assert torch.equal(clipped, free.clamp(-0.5, 0.5))


def stepped_gradients(shared: SharedLayers, folder: Path, mix: PtxConfig, text: Iterator[tuple[int, ...]]) -> Gradients:
    """Returns the policy's gradients at each optimizer step of one round."""
    config = PPO.model_copy(update={"num_rounds": 1, "max_grad_norm": 1e9, "ptx": mix})
    learner = learner_of(shared, folder, config, fitted(shared, count=20))
    found: Gradients = []

    def keep(*_: Any) -> None:
        found.append([p.grad.clone() for p in [*trained(learner.policy).values()] if p.grad is not None])

    learner.optimizer.register_step_pre_hook(keep)
    hooks, _ = hooks_of(folder, config, pretraining=text if mix.data else None)
    assert ppo.train(learner, config, hooks, seed=0) is None
    return found


def test_one_step_is_taken_on_the_sum_of_both_gradients(shared: SharedLayers, tiny_folder: Path) -> None:
    mix = PtxConfig(data="given by the test", gamma=0.5)
    plain = stepped_gradients(shared, tiny_folder, PtxConfig(), iter(()))
    mixed = stepped_gradients(shared, tiny_folder, mix, endless_text())
    # As many sequences as a minibatch has rollouts.
    drawn = list(itertools.islice(endless_text(), PPO.prompts_per_round * PPO.rollouts_per_prompt // 2))
    policy = load_policy(tiny_folder, shared, PPO)
    ptx.add_gradient(policy, shared, drawn, gamma=0.5, max_tokens=PPO.micro_batch_tokens)
    text = [p.grad for p in [*trained(policy).values()] if p.grad is not None]
    assert len(mixed) == len(plain) == PPO.num_minibatches
    # Only the first step is from the same weights.
    for both, one, other in zip(mixed[0], plain[0], text, strict=True):
        torch.testing.assert_close(both, one + other, rtol=1e-3, atol=1e-6)


class KilledError(Exception):
    """Stands for kill -9 between two rounds."""


EVERYTHING = PPO.model_copy(
    update={
        "num_rounds": 5, "num_epochs": 2, "ema_decay": 0.8, "target_kl": 0.5, "micro_batch_tokens": 100,
        "ptx": PtxConfig(data="given by the test", sequence_tokens=12, num_calibration_steps=6),
    }
)  # fmt: skip


def endless_text() -> Iterator[tuple[int, ...]]:
    return itertools.cycle([tuple(range(i + 3, i + 15)) for i in range(40)])


@pytest.mark.parametrize("killed_after", [1, 3])
def test_a_resumed_run_ends_bit_for_bit_as_one_that_was_never_killed(
    shared: SharedLayers, tiny_folder: Path, tmp_path: Path, killed_after: int
) -> None:
    rewards, found, histories = fitted(shared), [], []
    for kills in (0, 1):
        seen: list[dict[str, Any]] = []
        rounds = itertools.count()

        def between(rounds: "itertools.count[int]" = rounds, kills: int = kills) -> None:
            if next(rounds) == killed_after and kills:
                raise KilledError

        for attempt in range(kills + 1):
            learner = learner_of(shared, tiny_folder, EVERYTHING, rewards)
            hooks, _ = hooks_of(tiny_folder, EVERYTHING, kept(seen), pretraining=endless_text())
            hooks = replace(hooks, checkpoints=tmp_path / str(kills), between_rounds=between)
            if attempt < kills:
                with pytest.raises(KilledError):
                    ppo.train(learner, EVERYTHING, hooks, seed=5)
            else:
                assert ppo.train(learner, EVERYTHING, hooks, seed=5) is None
        found.append(merged_weights(shared, learner.policy))
        histories.append([{k: v for k, v in each.items() if not k.startswith("seconds/")} for each in seen])
    assert histories[0] == histories[1]
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def gradients(shared: SharedLayers, folder: Path, micro_batch_tokens: int, *, checkpointing: bool) -> list[Tensor]:
    config = PPO.model_copy(update={"micro_batch_tokens": micro_batch_tokens, "gradient_checkpointing": checkpointing})
    learner = learner_of(shared, folder, config, fitted(shared, count=20))
    _, sampler = hooks_of(folder, config)
    drawn = sampler.draw(request_of(PPO, 1))
    (minibatch, _), outputs = gather(learner, config, list(zip(PROMPTS, drawn, strict=True)), 0.02, seed=3)
    assert (outputs is not None) == (micro_batch_tokens > 1000 and not checkpointing)
    assert len(minibatch) == (1 if micro_batch_tokens > 1000 else 8)
    accumulate_gradients(learner, config, minibatch)
    return [p.grad.clone() for p in [*trained(learner.policy).values()] if p.grad is not None]


def test_micro_batches_and_checkpointing_change_memory_and_not_the_gradient(
    shared: SharedLayers, tiny_folder: Path
) -> None:
    whole = gradients(shared, tiny_folder, 4096, checkpointing=False)
    parts = gradients(shared, tiny_folder, 1, checkpointing=False)
    again = gradients(shared, tiny_folder, 4096, checkpointing=True)
    assert len(whole) > 10
    for a, b, c in zip(whole, parts, again, strict=True):
        torch.testing.assert_close(a, c, atol=0, rtol=0)
        assert float((a - b).norm()) < 0.02 * float(a.norm()) + 1e-6  # bf16 rows of other lengths round otherwise


@pytest.mark.parametrize("trained_layers", [0, 1])
@pytest.mark.parametrize("in_bf16", [False, True])
def test_the_first_step_learns_from_the_pass_that_scored(
    tiny_folder: Path, monkeypatch: pytest.MonkeyPatch, in_bf16: bool, trained_layers: int
) -> None:
    monkeypatch.setattr("policies.precision.cpu_multiplies_bf16", lambda: in_bf16)
    shared = SharedLayers(load_model(tiny_folder))
    rewards = RewardModel(shared, REWARD_MODEL.model_copy(update={"num_trained_layers": trained_layers}))
    learner = learner_of(shared, tiny_folder, PPO, rewards, held_out_model=fitted(shared, count=20))
    _, sampler = hooks_of(tiny_folder, PPO)
    rows = list(zip(PROMPTS, sampler.draw(request_of(PPO, 1)), strict=True))
    (minibatch, _), outputs = gather(learner, PPO, rows, 0.02, seed=3)
    assert outputs is not None
    assert torch.equal(outputs.logprobs_NC, minibatch[0].old_logprobs_NC)
    assert torch.equal(outputs.values_NC, minibatch[0].old_values_NC)
    found = []
    for given in (outputs, None):
        learner.optimizer.zero_grad()
        assert accumulate_gradients(learner, PPO, minibatch, given)["policy/approx_kl"] == 0
        weights = [*trained(learner.policy).values(), *trained(learner.value).values()]
        found.append([each.grad.clone() for each in weights if each.grad is not None])
    assert len(found[0]) > 10
    assert all(torch.equal(kept, again) for kept, again in zip(*found, strict=True))
    assert any(each.any() for each in found[0])


def test_a_round_runs_the_policy_once_for_its_first_step(shared: SharedLayers, tiny_folder: Path) -> None:
    config = PPO.model_copy(update={"num_rounds": 1, "num_epochs": 2})
    learner = learner_of(shared, tiny_folder, config, fitted(shared, count=20))
    passes: list[bool] = []
    learner.policy.register_forward_hook(lambda *_: passes.append(torch.is_grad_enabled()))
    hooks, _ = hooks_of(tiny_folder, config)
    assert ppo.train(learner, config, hooks, seed=0) is None
    # The second minibatch is scored, and the first is scored and learned from. Then there are three more steps.
    assert passes == [False, True, True, True, True]


def test_between_rounds_may_end_the_run(shared: SharedLayers, tiny_folder: Path) -> None:
    def abort() -> None:
        raise TrainingError("aborted")

    hooks, sampler = hooks_of(tiny_folder, PPO)
    learner = learner_of(shared, tiny_folder, PPO, fitted(shared, count=20))
    with pytest.raises(TrainingError, match="aborted"):
        ppo.train(learner, PPO, replace(hooks, log=silent, between_rounds=abort), seed=0)
    assert sampler.num_draws == 0
