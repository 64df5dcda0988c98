"""The value model: what a completion's score will be, told at each of its tokens.

It starts as the reward model (InstructGPT, appendix C.4): the value of an unfinished completion starts as its score
were it to end there. Shapes: see training.data.groups and training.models.reward.
"""

from __future__ import annotations

import copy

from torch import Tensor, nn

from training.data.groups import PackedGroups
from training.models.device import autocast
from training.models.policy import run_layers
from training.models.reward import RewardModel, running_features


class ValueModel(nn.Module):
    """The reward model's own layers and mean head, copied to be trained, read at every token."""

    center_F: Tensor
    spread_F: Tensor
    offset: Tensor

    def __init__(self, reward_model: RewardModel) -> None:
        super().__init__()
        self.first = reward_model.first
        self.layers = copy.deepcopy(reward_model.layers).float().requires_grad_(True)
        self.norm = copy.deepcopy(reward_model.norm).requires_grad_(False)
        self.head_F = nn.Parameter((reward_model.head_F * reward_model.scale).detach().clone())
        self.register_buffer("center_F", reward_model.center_F.clone())
        self.register_buffer("spread_F", reward_model.spread_F.clone())
        self.register_buffer("offset", (reward_model.shift * reward_model.scale).clone())

    def forward(self, hidden_GTD: Tensor, packed: PackedGroups, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Values [N, C] of the states before each token, from the hidden states that enter layer `first`."""
        with autocast(hidden_GTD.device):
            hidden_GTD = self.norm(run_layers(self.layers, hidden_GTD, packed, angles))
        features_NCF = (running_features(hidden_GTD, packed) - self.center_F) / self.spread_F
        return features_NCF @ self.head_F - self.offset
