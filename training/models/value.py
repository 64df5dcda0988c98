"""The value model: predicts a completion's score at each of its tokens.

It starts as the reward model (InstructGPT, appendix C.4): at first the value of an unfinished completion is the score
that it would have if it ended there. Shapes: see training.data.groups and training.models.reward.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from training.data.groups import PackedGroups
from training.models.anatomy import Angles
from training.models.device import autocast
from training.models.policy import run_layers
from training.models.reward import RewardModel, running_features


class ValueModel(nn.Module):
    """Trainable copies of the reward model's own layers and of its mean head, which reads every token."""

    center_F: Tensor
    spread_F: Tensor
    offset: Tensor

    def __init__(self, reward_model: RewardModel, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = reward_model.first
        self.layers = copy.deepcopy(reward_model.layers).to(dtype).requires_grad_(True)
        self.norm = copy.deepcopy(reward_model.norm).requires_grad_(False)
        self.head_F = nn.Parameter((reward_model.head_F * reward_model.scale).detach().clone())
        self.register_buffer("center_F", reward_model.center_F.clone())
        self.register_buffer("spread_F", reward_model.spread_F.clone())
        self.register_buffer("offset", (reward_model.shift * reward_model.scale).clone())

    def forward(self, hidden_GTD: Tensor, packed: PackedGroups, angles: Angles) -> Tensor:
        """Returns the value of the state before each token, [N, C], from the hidden states that enter layer `first`."""
        with autocast(hidden_GTD.device):
            hidden_GTD = self.norm(run_layers(self.layers, hidden_GTD, packed, angles, self.first))
        features_NCF = (running_features(hidden_GTD, packed) - self.center_F) / self.spread_F
        return features_NCF @ self.head_F - self.offset
