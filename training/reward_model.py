"""The reward model: a scalar head on the reference policy's lower layers, fitted to rankings.

The layers are the ones that policy and reference share, so scoring costs nothing beside what PPO computes anyway. The
head reads a completion at its last real token and on average: [h_last, mean of h]. The layers themselves stay as they
are: from a few hundred rankings the head alone learns more than layers that are trained with it, which soon learn the
noise (docs/architecture.md). With all K completions of a prompt in one term of the loss (InstructGPT, eq. 1) and an L2
penalty the fit is convex: it has one answer, which neither order nor seed nor an earlier fit can change.

Scores are shifted and scaled so that completions of the reference policy have mean 0 and standard deviation 1, anew at
every refresh, which gives kl_coef one meaning for all of them. Shapes: see training.groups; F is the width of what the
head reads, 2 D.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from training.config import RewardModelConfig
from training.errors import TrainingError
from training.groups import Group, PackedGroups, pack
from training.policy_model import SharedLayers
from training.ranking_loss import num_correct, ranking_loss

Log = Callable[[int, int, dict[str, float]], None]

MAX_ITERATIONS = 200
LEAST_SPREAD = 1e-4


@dataclass(frozen=True)
class RankedExample:
    """One ranking: completions of a prompt and the rank of each, 0 the best, equal for a tie."""

    group: Group
    ranks: tuple[int, ...]


class RewardModel(nn.Module):
    """A head, and how what it reads is brought to unit variance; what lies below is the reference policy's."""

    center_F: Tensor
    spread_F: Tensor
    shift: Tensor
    scale: Tensor

    def __init__(self, shared: SharedLayers, config: RewardModelConfig) -> None:
        super().__init__()
        self.level = min(config.num_layers, shared.num_layers)
        width = 2 * shared.head_VD.shape[1]
        # Zero: before it has learned anything it prefers nothing.
        self.head_F = nn.Parameter(torch.zeros(width))
        self.register_buffer("center_F", torch.zeros(width))
        self.register_buffer("spread_F", torch.ones(width))
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    def score(self, features: Tensor) -> Tensor:
        """Normalised scores of features [..., F]."""
        return (self.standardized(features) @ self.head_F - self.shift) * self.scale

    def standardized(self, features: Tensor) -> Tensor:
        """Features [..., F] with mean 0 and variance 1 over what the head was fitted to."""
        return (features - self.center_F) / self.spread_F


def last_features(hidden_GTD: Tensor, packed: PackedGroups) -> Tensor:
    """What the head reads of whole completions, [N, F]."""
    hidden = hidden_GTD.flatten(0, 1).float()
    before_NCD = hidden[packed.before_NC] * packed.mask_NC[..., None]
    last_ND = hidden[packed.last_N]
    num_states_N = packed.mask_NC.sum(1) + 1
    return torch.cat([last_ND, (before_NCD.sum(1) + last_ND) / num_states_N[:, None]], dim=-1)


def running_features(hidden_GTD: Tensor, packed: PackedGroups) -> Tensor:
    """What the head would read were the completion to end before each of its tokens, [N, C, F]."""
    before_NCD = hidden_GTD.flatten(0, 1).float()[packed.before_NC]
    num_states_C = torch.arange(1, before_NCD.shape[1] + 1)
    return torch.cat([before_NCD, before_NCD.cumsum(1) / num_states_C[:, None]], dim=-1)


@torch.no_grad()
def score_groups(
    model: RewardModel, shared: SharedLayers, groups: Sequence[Group], batch_size: int = 8
) -> list[Tensor]:
    """Scores [K] of each group's completions."""
    scores: list[Tensor] = []
    for start in range(0, len(groups), batch_size):
        packed = pack(groups[start : start + batch_size])
        scores += model.score(_encode(model, shared, packed)).split(packed.group_sizes)
    return scores


def fit(
    model: RewardModel, shared: SharedLayers, examples: Sequence[RankedExample], config: RewardModelConfig, log: Log
) -> None:
    """Fits the head to all rankings, a ranking being one term of the loss.

    Raises TrainingError if the loss is not finite.
    """
    examples = sorted(examples, key=lambda example: len(example.group))  # like lengths together: little padding
    features = [each for batch in _batches(examples, config) for each in _log_encoded(model, shared, batch, log)]
    ranks = [torch.tensor(example.ranks) for example in examples]
    sizes = [len(each) for each in features]
    all_features = torch.cat(features)
    model.center_F.copy_(all_features.mean(0))
    model.spread_F.copy_(all_features.std(0).clamp_min(LEAST_SPREAD))
    standardized = model.standardized(all_features)

    def loss() -> Tensor:
        scores = (standardized @ model.head_F).split(sizes)
        terms = [ranking_loss(s, r) for s, r in zip(scores, ranks, strict=True)]
        return torch.stack(terms).mean() + config.l2 / 2 * model.head_F.square().sum()

    reached = _minimize(loss, model.head_F)
    if not math.isfinite(reached):
        raise TrainingError(f"reward model: the loss is {reached}")
    scores = [s.detach() for s in (standardized @ model.head_F).split(sizes)]
    metrics = {"reward_model/loss": reached, "reward_model/accuracy": _accuracy(scores, ranks)[0]}
    log(len(examples) - 1, len(examples), metrics)


def accuracy(
    model: RewardModel, shared: SharedLayers, examples: Sequence[RankedExample], batch_size: int
) -> tuple[float, int]:
    """Share of comparisons that the scores order as the labeler did, and how many comparisons there are."""
    scores = score_groups(model, shared, [example.group for example in examples], batch_size)
    return _accuracy(scores, [torch.tensor(example.ranks) for example in examples])


def normalise(model: RewardModel, shared: SharedLayers, references: Sequence[Group], batch_size: int = 8) -> float:
    """Makes the scores of the reference policy's completions have mean 0 and standard deviation 1.

    Returns what the standard deviation was. Raises TrainingError if it is zero or not finite.
    """
    scores = torch.cat(score_groups(model, shared, references, batch_size))
    raw = scores / model.scale + model.shift
    deviation = float(raw.std())
    if not (math.isfinite(deviation) and deviation > 0):
        raise TrainingError(f"reward model: its scores have standard deviation {deviation}")
    model.shift.copy_(raw.mean())
    model.scale.copy_(1 / raw.std())
    return deviation


def save(model: RewardModel, path: Path) -> str:
    """Writes the weights as safetensors, and returns their SHA-256."""
    tensors = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save_file(tensors, path, metadata={"reward_model": json.dumps({"num_layers": model.level})})
    return hashlib.sha256(path.read_bytes()).hexdigest()


@torch.no_grad()
def _encode(model: RewardModel, shared: SharedLayers, packed: PackedGroups) -> Tensor:
    return last_features(shared.encode(packed, [model.level])[model.level], packed)


def _log_encoded(
    model: RewardModel, shared: SharedLayers, batch: tuple[int, int, list[RankedExample]], log: Log
) -> list[Tensor]:
    """Features [K, F] of each ranking of a batch; says how many rankings have been read."""
    done, total, examples = batch
    packed = pack([example.group for example in examples])
    features = _encode(model, shared, packed).split(packed.group_sizes)
    log(done - 1, total, {})
    return list(features)


def _batches(
    examples: Sequence[RankedExample], config: RewardModelConfig
) -> list[tuple[int, int, list[RankedExample]]]:
    """Batches, each with how many rankings are read after it, and of how many."""
    ends = range(config.batch_size, len(examples) + config.batch_size, config.batch_size)
    total = len(examples)
    return [(min(end, total), total, list(examples[end - config.batch_size : end])) for end in ends]


def _minimize(loss: Callable[[], Tensor], parameter: nn.Parameter) -> float:
    """Brings a convex loss to its minimum; returns it."""
    optimizer = torch.optim.LBFGS([parameter], max_iter=MAX_ITERATIONS, line_search_fn="strong_wolfe")

    def closure() -> float:
        optimizer.zero_grad()
        value = loss()
        value.backward()
        return value.item()

    optimizer.step(closure)
    return loss().item()


def _accuracy(scores: Sequence[Tensor], ranks: Sequence[Tensor]) -> tuple[float, int]:
    counts = [num_correct(s, r) for s, r in zip(scores, ranks, strict=True)]
    total = sum(count for _, count in counts)
    return sum(correct for correct, _ in counts) / max(1, total), total
