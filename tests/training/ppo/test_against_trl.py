"""Our PPO does what TRL 1.12's PPOTrainer did in one update of tiny models that was recorded, in float32.

    python -m bench.peers.environment
    var/bench/venv-trl-1.12/bin/python -I bench/peers/record_ppo.py \\
        tests/training/ppo/recordings/trl_1_12_ppo.safetensors

made the recording, by TRL's own code on its own models; the script says what is in it. The update has two epochs over
eight episodes in two minibatches. Three episodes ended early, one with the last token allowed, and four did not end.

TRL defines four things otherwise, and the tests say by exactly how much:

- In an episode that ended early it values one more state, the one after the end, and gives the score there. In ours
  that is one more token, or equals a score of γ ((1 - λ) V + λ score) at the last token, where V is that state's value.
- It whitens with the unbiased variance: ours is larger by √(M / (M - 1)) for M tokens.
- Its approximate KL is a mean over padding too.
- It logs scores after the penalty for a missing end.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from training.config import LoraConfig, PpoConfig, RewardModelConfig
from training.models.policy import SharedLayers, UpperLayers, tensors_of
from training.models.reward import RewardModel
from training.ppo import experience, ppo_math
from training.ppo.experience import Experience
from training.ppo.gradients import accumulate_gradients
from training.ppo.learner import Learner, make_learner
from training.ppo.rollouts import Rollout

RECORDING = Path(__file__).with_name("recordings") / "trl_1_12_ppo.safetensors"
NO_LIMIT = 1e9


@dataclass(frozen=True)
class Recording:
    """The recording of TRL. `batch` and `steps` have TRL's names of variables."""

    tensors: dict[str, Tensor]
    job: dict[str, Any]
    sizes: dict[str, Any]
    logged: dict[str, float]

    def under(self, prefix: str) -> dict[str, Tensor]:
        return {name.removeprefix(prefix): each for name, each in self.tensors.items() if name.startswith(prefix)}

    @property
    def batch(self) -> dict[str, Tensor]:
        return self.under("batch/")

    @property
    def steps(self) -> dict[str, Tensor]:
        return self.under("steps/")

    @property
    def mask_NC(self) -> Tensor:
        """True on the tokens drawn."""
        return ~self.tensors["batch/padding_mask"]

    @property
    def states_NC(self) -> Tensor:
        """True on the states that TRL values: before each token, and after an early end."""
        return ~self.tensors["batch/padding_mask_p1"]

    @property
    def finished_N(self) -> Tensor:
        return (self.tensors["batch/responses"] == self.sizes["eos_token_id"]).any(1)

    def config(self) -> PpoConfig:
        job = self.job
        return PpoConfig(
            prompts_per_round=len(self.finished_N), rollouts_per_prompt=1, num_frozen_layers=0,
            num_minibatches=job["num_mini_batches"], learning_rate=job["learning_rate"],
            value_learning_rate=job["learning_rate"], kl_coef=job["kl_coef"],
            missing_eos_penalty=job["missing_eos_penalty"], score_clip=NO_LIMIT, gamma=job["gamma"],
            gae_lambda=job["lam"], clip_range=job["cliprange"], value_clip_range=job["cliprange_value"],
            value_coef=job["vf_coef"],
        )  # fmt: skip


@pytest.fixture(scope="module")
def trl() -> Recording:
    with safe_open(RECORDING, "pt") as file:
        about = json.loads(file.metadata()["recording"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - it is no mapping
    assert about["trl"] == "1.12.0"
    return Recording(tensors, about["job"], about["sizes"], about["logged"])


def language_model(trl: Recording, name: str) -> LlamaForCausalLM:
    model = LlamaForCausalLM(LlamaConfig(**trl.sizes))
    model.load_state_dict(trl.under(f"{name}/"))
    return model.requires_grad_(False).eval()


def reward_model(trl: Recording, name: str, shared: SharedLayers) -> RewardModel:
    """Returns the recorded reward model as ours: it owns all layers, and its head does not read the mean state."""
    num_layers, weights = trl.sizes["num_hidden_layers"], trl.under(f"{name}/")
    model = RewardModel(shared, RewardModelConfig(num_layers=num_layers, num_trained_layers=num_layers))
    model.layers.load_state_dict(
        {key.removeprefix("model.layers."): each for key, each in weights.items() if key.startswith("model.layers.")}
    )
    model.norm.load_state_dict({"weight": weights["model.norm.weight"]})
    width = trl.sizes["hidden_size"]
    with torch.no_grad():
        model.heads_FE[:width] = weights["score.weight"].T
        model.spread_F[width:] = torch.inf
    return model


@pytest.fixture
def learner(trl: Recording, in_fp32: None) -> Learner:
    """Returns our learner with the recorded weights."""
    shared = SharedLayers(language_model(trl, "reference"))
    policy = UpperLayers(language_model(trl, "policy"), 0, shared.num_layers).trainable(LoraConfig())
    rewards, values = (reward_model(trl, name, shared) for name in ("reward", "value"))
    learner = make_learner(policy, values, values, trl.config())
    for group in learner.optimizer.param_groups:
        group["lr"] = group["peak_lr"]
    return replace(learner, reward_model=rewards.requires_grad_(False))


def encoded(learner: Learner, trl: Recording, rows: Tensor, mask_NC: Tensor) -> Experience:
    """Encodes these episodes, as many tokens of each as the mask has."""
    batch, found = trl.batch, []
    for row in rows.tolist():
        length = int(mask_NC[row].sum())
        prompt = tuple(token for token in batch["queries"][row].tolist() if token != trl.sizes["pad_token_id"])
        tokens, logprobs = (tuple(batch[name][row, :length].tolist()) for name in ("responses", "logprobs"))
        found.append((prompt, [Rollout(tokens, logprobs, bool(trl.finished_N[row]))]))
    return experience.encode(learner, trl.config(), found)[0]


def whole_batch(learner: Learner, trl: Recording) -> Experience:
    return encoded(learner, trl, torch.arange(len(trl.mask_NC)), trl.mask_NC)


def same(ours: Any, theirs: Any, mask: Tensor | None = None) -> None:
    ours, theirs = torch.as_tensor(ours), torch.as_tensor(theirs)
    if mask is not None:
        ours, theirs = ours[mask], theirs[mask]
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=2e-6)


def trained(learner: Learner) -> dict[str, Tensor]:
    """Returns the trained weights, by the names in the recording."""
    return {f"policy/{name}": each for name, each in tensors_of(learner.policy)} | {
        "value/score.weight": learner.value.head_F,
        **{f"value/model.layers.{name}": each for name, each in learner.value.layers.named_parameters()},
    }


def same_weights(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """Asserts that weights differ by little of their norm: rounding adds up over steps. Half of our head is 0."""
    assert ours.keys() == theirs.keys()
    for name, their in theirs.items():
        our = ours[name].detach()
        if name == "value/score.weight":
            seeing, blind = our.chunk(2)
            our = seeing[None]
            assert not blind.any()
        assert float((our - their).norm()) < 2e-5 * float(their.norm()), name


def test_the_same_tokens_have_the_same_logprobs_values_and_scores(trl: Recording, learner: Learner) -> None:
    ours, batch = whole_batch(learner, trl), trl.batch
    same(ours.old_logprobs_NC, batch["logprobs"], trl.mask_NC)
    same(ours.ref_logprobs_NC, batch["ref_logprobs"], trl.mask_NC)
    same(ours.old_values_NC, batch["values"], trl.mask_NC)
    penalty_N = trl.job["missing_eos_penalty"] * (~trl.finished_N).float()
    same(ours.scores_N - penalty_N, batch["scores"])
    seen = experience.observe([[ours]])
    same(seen["objective/kl"], trl.logged["objective/kl"])
    same(seen["objective/score"] - float(penalty_N.mean()), trl.logged["objective/scores"])


def test_rewards_are_the_same_except_for_where_the_score_of_an_early_end_is(trl: Recording) -> None:
    batch, kl_coef = trl.batch, trl.job["kl_coef"]
    inputs = batch["scores"], batch["logprobs"], batch["ref_logprobs"]
    same(ppo_math.rewards(*inputs, trl.states_NC, kl_coef), batch["rewards"])
    moved_NC = ppo_math.rewards(*inputs, trl.mask_NC, kl_coef) - batch["rewards"]
    expected_NC = torch.zeros_like(moved_NC)
    for row, length in enumerate(trl.mask_NC.sum(1).tolist()):
        if trl.states_NC[row].sum() > length:
            expected_NC[row, length - 1], expected_NC[row, length] = batch["scores"][row], -batch["scores"][row]
    assert expected_NC.count_nonzero() == 6
    same(moved_NC, expected_NC)


def test_advantages_and_returns_are_the_same_over_the_same_states(trl: Recording) -> None:
    batch, gamma, gae_lambda = trl.batch, trl.job["gamma"], trl.job["lam"]
    ours_NC = ppo_math.advantages(batch["rewards"], batch["values"], trl.states_NC, gamma, gae_lambda)
    same(ours_NC, batch["advantages"])
    same(ours_NC + batch["values"], batch["returns"])


def test_a_round_has_the_same_returns_and_whitened_advantages_once_scores_of_early_ends_are_mixed(
    trl: Recording, learner: Learner
) -> None:
    batch, gamma, gae_lambda = trl.batch, trl.job["gamma"], trl.job["lam"]
    ours, num_tokens = whole_batch(learner, trl), trl.mask_NC.sum()
    early_N, last_N = trl.states_NC.sum(1) > trl.mask_NC.sum(1), trl.states_NC.sum(1) - 1
    after_N = batch["values"].gather(1, last_N[:, None])[:, 0]
    mixed_N = gamma * ((1 - gae_lambda) * after_N + gae_lambda * ours.scores_N)
    ours = replace(ours, scores_N=torch.where(early_N, mixed_N, ours.scores_N))
    [[ours]] = experience.with_advantages([[ours]], trl.config(), trl.job["kl_coef"])
    same(ours.returns_NC, batch["returns"], trl.mask_NC)
    same(ours.advantages_NC * ((num_tokens - 1) / num_tokens).sqrt(), batch["whitened"])


def test_losses_and_clip_fractions_of_every_step_are_the_same(trl: Recording) -> None:
    batch, steps, job = trl.batch, trl.steps, trl.job
    for step, rows in enumerate(steps["micro_batch_inds"]):
        mask_NC, states_NC = trl.mask_NC[rows], trl.states_NC[rows]
        policy = ppo_math.policy_loss(
            steps["new_logprobs"][step], batch["logprobs"][rows], batch["whitened"][rows], mask_NC, job["cliprange"]
        )
        value = ppo_math.value_loss(
            steps["vpred"][step], batch["values"][rows], batch["returns"][rows], states_NC, job["cliprange_value"]
        )
        same(policy.value, steps["pg_loss_stats"][step])
        same(value.value, steps["vf_loss_stats"][step])
        same(policy.value + job["vf_coef"] * value.value, steps["loss"][step])
        same(policy.clipped_share, float(steps["pg_clipfrac_stats"][step]))
        same(value.clipped_share, float(steps["vf_clipfrac_stats"][step]))
    assert (steps["pg_clipfrac_stats"] > 0).sum() > 1
    assert (steps["vf_clipfrac_stats"] > 0).sum() > 1


def test_gradients_of_every_step_and_the_weights_after_all_are_the_same(trl: Recording, learner: Learner) -> None:
    batch, steps, config, minibatches = trl.batch, trl.steps, trl.config(), []
    for rows in steps["micro_batch_inds"]:
        drawn, valued = encoded(learner, trl, rows, trl.mask_NC), encoded(learner, trl, rows, trl.states_NC)
        drawn = replace(drawn, advantages_NC=batch["whitened"][rows])
        minibatches.append((drawn, replace(valued, returns_NC=batch["returns"][rows])))
    for step, (drawn, valued) in enumerate(minibatches):
        learner.optimizer.zero_grad()
        # Policy and values by themselves, since TRL values more states: without advantages the policy has no gradient.
        seen = accumulate_gradients(learner, config, [drawn])
        learner.value.zero_grad()
        valued_seen = accumulate_gradients(learner, config, [valued])
        same(seen["policy/loss"], float(steps["pg_loss_stats"][step]))
        same(seen["policy/clipfrac"], float(steps["pg_clipfrac_stats"][step]))
        same(valued_seen["val/loss"], float(steps["vf_loss_stats"][step]))
        same(valued_seen["val/clipfrac"], float(steps["vf_clipfrac_stats"][step]))
        share_of_tokens = float(drawn.packed.mask_NC.float().mean())
        same(seen["policy/approx_kl"] * share_of_tokens, float(steps["approxkl_stats"][step]))
        gradients = {name: each.grad for name, each in trained(learner).items() if each.grad is not None}
        same_weights(gradients, {name: each[step] for name, each in trl.under("gradients/").items()})
        learner.optimizer.step()
    same_weights(trained(learner), trl.under("after/"))
