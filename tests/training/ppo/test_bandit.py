"""The whole of PPO on a bandit whose best policy is known."""

from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from policies.precision import compute_dtype
from tests.training.learning import EOS, PPO, fitted, learner_of, silent
from training.data.groups import PackedGroups
from training.models.policy import SharedLayers, load_model, merged_tensors
from training.ppo import experience
from training.ppo import rounds as ppo
from training.ppo.rollouts import Request, Rollout

PROMPT = (1, 50, 90, 17)
BETA = 0.5
CONFIG = PPO.model_copy(
    update={
        "num_rounds": 40, "prompts_per_round": 1, "rollouts_per_prompt": 1024, "max_tokens": 1, "num_minibatches": 1,
        "num_epochs": 2, "kl_coef": BETA, "ema_decay": 0.9,
    }
)  # fmt: skip


class OneToken:
    """Draws completions of one token each."""

    def __init__(self, folder: Path) -> None:
        self.model = load_model(folder)

    def load(self, weights: Iterable[tuple[str, Tensor]]) -> None:
        self.model.load_state_dict(dict(weights), strict=False)

    @torch.no_grad()
    def logprobs_V(self) -> Tensor:
        return self.model(torch.tensor([PROMPT])).logits[0, -1].float().log_softmax(-1)

    def draw(self, request: Request) -> list[list[Rollout]]:
        self.load(request.weights)
        logprobs_V, generator = self.logprobs_V(), torch.Generator().manual_seed(request.seed)
        count = len(request.prompts) * request.num_completions
        drawn = torch.multinomial(logprobs_V.exp(), count, replacement=True, generator=generator).tolist()
        rollouts = [Rollout((token,), (float(logprobs_V[token]),), token == EOS) for token in drawn]
        return [rollouts]


def noisy_logprobs_V(folder: Path) -> Tensor:
    """Log-probabilities [V] of the same model with noise on its layers."""
    other, generator = OneToken(folder), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in other.model.model.layers.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return other.logprobs_V()


@pytest.mark.timeout(400)
def test_ppo_reaches_the_best_policy_of_a_bandit(
    shared: SharedLayers, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With one token, reward r(a) and KL at β, it is π ∝ π_ref exp(r / β) (Ziegler et al. 2019)."""
    sampler = OneToken(tiny_folder)
    reference_V = sampler.logprobs_V()
    # A reward whose best policy the model can have, since it is that of other weights.
    worth_V = BETA * (noisy_logprobs_V(tiny_folder) - reference_V)
    best_V = (reference_V + worth_V / BETA).softmax(0)

    def last_features(hidden_GTD: Tensor, packed: PackedGroups) -> Tensor:
        features_NF = torch.zeros(len(packed.mask_NC), 2 * hidden_GTD.shape[-1])
        features_NF[:, 0] = worth_V[packed.labels_NC[:, 0]]
        return features_NF

    monkeypatch.setattr(experience, "last_features", last_features)
    rewards = fitted(shared, count=20)
    with torch.no_grad():
        for name, value in (("center_F", 0.0), ("spread_F", 1.0), ("shift", 0.0), ("scale", 1.0), ("heads_FE", 0.0)):
            getattr(rewards, name).fill_(value)
        rewards.heads_FE[0] = 1.0
    learner = learner_of(shared, tiny_folder, CONFIG, rewards)
    hooks = ppo.PpoHooks([PROMPT], sampler.draw, silent)
    assert ppo.train(learner, CONFIG, hooks, seed=0) is None

    sampler.load(merged_tensors(shared, learner.policy, compute_dtype(shared.device)))
    before, after = (
        0.5 * float((policy_V.exp() - best_V).abs().sum()) for policy_V in (reference_V, sampler.logprobs_V())
    )
    assert before > 0.15
    assert after < 0.02
