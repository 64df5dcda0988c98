"""The reward model: an ensemble of scalar heads on the reference policy's lower layers, some of which it may train.

Up to `first` it uses the layers that policy and reference share. The layers from `first` to `level` are its own copies,
which are trained. Without own layers, scoring costs nothing beyond what PPO computes anyway. The heads read a
completion's hidden states at its last real token and on average: [h_last, mean of h]. The score is the mean over heads;
where the heads differ, the model is unsure. Shapes: see training.data.groups; F is the width of what a head reads, 2 D,
and E is the number of heads.

Every refresh shifts and scales the scores so that completions of the reference policy have mean 0 (InstructGPT, section
3.5) and standard deviation 1. So kl_coef means the same after every refresh.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from training.config import RewardModelConfig
from training.data.groups import Group, PackedGroups, micro_batches, pack
from training.errors import TrainingError
from training.models.anatomy import Angles
from training.models.device import autocast
from training.models.policy import SCORING_TOKENS, SharedLayers, run_layers
from training.models.tensor_file import load_tensors, save_tensors


class RewardModel(nn.Module):
    """Layers and heads, and the shifts and scales that standardize what the heads read and the scores."""

    center_F: Tensor
    spread_F: Tensor
    shift: Tensor
    scale: Tensor

    def __init__(self, shared: SharedLayers, config: RewardModelConfig) -> None:
        super().__init__()
        # SharedLayers is no torch module, so that the reference policy's weights are not in this model's state.
        self.shared = shared
        self.level = min(config.num_layers, shared.num_layers)
        self.first = self.level - min(config.num_trained_layers, self.level)
        self.layers = nn.ModuleList(copy.deepcopy(layer) for layer in shared.parts.layers[self.first : self.level])
        # Above the topmost layer the heads read normed states, as the policy's output embedding does.
        self.norm = copy.deepcopy(shared.parts.norm) if self.level == shared.num_layers else nn.Identity()
        self.norm.requires_grad_(False)
        width = 2 * shared.head_VD.shape[1]
        # Zero, so that a model that has learned nothing prefers no completion.
        self.heads_FE = nn.Parameter(torch.zeros(width, config.num_heads))
        self.register_buffer("center_F", torch.zeros(width))
        self.register_buffer("spread_F", torch.ones(width))
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))
        self.to(shared.device)

    @property
    def head_F(self) -> Tensor:
        """The mean of the heads, which gives the score."""
        return self.heads_FE.mean(1)

    def hidden(self, hidden_GTD: Tensor, packed: PackedGroups, angles: Angles) -> Tensor:
        """Returns the hidden states that the heads read, from those that enter layer `first`."""
        with autocast(hidden_GTD.device):
            read_GTD: Tensor = self.norm(run_layers(self.layers, hidden_GTD, packed, angles, self.first))
        return read_GTD

    def score(self, features: Tensor) -> Tensor:
        """Returns the normalised scores of features [..., F]."""
        return (self.standardized(features) @ self.head_F - self.shift) * self.scale

    def standardized(self, features: Tensor) -> Tensor:
        """Shifts and scales features [..., F] so that those the heads were fitted to have mean 0 and variance 1."""
        return (features - self.center_F) / self.spread_F


def last_features(hidden_GTD: Tensor, packed: PackedGroups) -> Tensor:
    """Returns what a head reads of whole completions, [N, F]."""
    hidden = hidden_GTD.flatten(0, 1).float()
    before_NCD = hidden[packed.before_NC] * packed.mask_NC[..., None]
    last_ND = hidden[packed.last_N]
    num_states_N = packed.mask_NC.sum(1) + 1
    return torch.cat([last_ND, (before_NCD.sum(1) + last_ND) / num_states_N[:, None]], dim=-1)


def running_features(hidden_GTD: Tensor, packed: PackedGroups) -> Tensor:
    """Returns what a head would read if the completion ended before each of its tokens, [N, C, F]."""
    before_NCD = hidden_GTD.flatten(0, 1).float()[packed.before_NC]
    num_states_C = torch.arange(1, before_NCD.shape[1] + 1, device=before_NCD.device)
    return torch.cat([before_NCD, before_NCD.cumsum(1) / num_states_C[:, None]], dim=-1)


def features_of(model: RewardModel, packed: PackedGroups) -> Tensor:
    """Returns what the heads read of each completion, [N, F]. Gradients reach the model's own layers."""
    hidden_GTD = model.shared.encode(packed, [model.first])[model.first]
    return last_features(model.hidden(hidden_GTD, packed, model.shared.angles(packed)), packed)


@torch.no_grad()
def group_features(model: RewardModel, groups: Sequence[Group], on_batch: Any = lambda done: None) -> list[Tensor]:
    """Returns what the heads read of each group's completions, [K, F] each.

    After each batch it calls `on_batch` with the number of groups that are done.
    """
    found: dict[int, Tensor] = {}
    for batch in micro_batches([len(group) for group in groups], SCORING_TOKENS):
        packed = pack([groups[index] for index in batch]).to(model.shared.device)
        features = features_of(model, packed).split(packed.group_sizes)
        found.update(zip(batch, features, strict=True))
        on_batch(len(found))
    return [found[index] for index in range(len(groups))]


@torch.no_grad()
def score_groups(model: RewardModel, groups: Sequence[Group]) -> list[Tensor]:
    """Returns the scores [K] of each group's completions, on the CPU."""
    return [model.score(features).cpu() for features in group_features(model, groups)]


def normalise(model: RewardModel, scores: Tensor) -> float:
    """Shifts and scales the model's scores so that these `scores` get mean 0 and standard deviation 1.

    They are the scores of the reference policy's completions. Returns their standard deviation without any
    normalisation.

    Raises:
        TrainingError: the standard deviation is zero or not finite.
    """
    raw = scores / model.scale.cpu() + model.shift.cpu()
    deviation = float(raw.std())
    if not (math.isfinite(deviation) and deviation > 0):
        raise TrainingError(f"reward model: its scores have standard deviation {deviation}")
    model.shift.fill_(raw.mean())
    model.scale.fill_(1 / raw.std())
    return deviation


def save(model: RewardModel, path: Path, reference_digest: str) -> str:
    """Writes the weights, and returns the file's SHA-256. `reference_digest` names the policy that they stand on."""
    facts = {"first": model.first, "level": model.level, "reference": reference_digest}
    save_tensors(path, model.state_dict(), {"reward_model": json.dumps(facts)})
    return hashlib.sha256(path.read_bytes()).hexdigest()


def load(model: RewardModel, path: Path, reference_digest: str) -> bool:
    """Loads what `save` wrote. Returns False, and loads nothing, if its shape or the layers below it differ."""
    with safe_open(path, "pt") as file:
        facts = json.loads(file.metadata()["reward_model"])
    if facts != {"first": model.first, "level": model.level, "reference": reference_digest}:
        return False
    tensors = load_tensors(path)
    if tensors["heads_FE"].shape != model.heads_FE.shape:
        return False
    model.load_state_dict(tensors)
    return True
