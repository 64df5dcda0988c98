"""The reward model: a scalar head on the reference policy's layers, fitted to rankings.

Its score is read at a completion's last real token. It is shifted and scaled so that completions of the reference
policy have mean 0 and standard deviation 1, anew at every refresh, which gives kl_coef one meaning for all of them.
Shapes: see training.groups.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from training.config import RewardModelConfig
from training.errors import TrainingError
from training.groups import Group, PackedGroups, pack
from training.policy_model import SharedLayers, UpperLayers
from training.ranking_loss import num_correct, ranking_loss

Log = Callable[[int, int, dict[str, float]], None]


@dataclass(frozen=True)
class RankedExample:
    """One ranking: completions of a prompt and the rank of each, 0 the best, equal for a tie."""

    group: Group
    ranks: tuple[int, ...]


class RewardModel(nn.Module):
    """Upper layers and a scalar head; what lies below is the reference policy's."""

    shift: Tensor
    scale: Tensor

    def __init__(self, shared: SharedLayers, config: RewardModelConfig) -> None:
        super().__init__()
        last = min(config.num_layers, shared.num_layers)
        self.upper = UpperLayers(shared.model, min(config.num_frozen_layers, last), last).trainable()
        # Zero: before it has learned anything it prefers nothing.
        self.head_D = nn.Parameter(torch.zeros(shared.head_VD.shape[1]))
        self.register_buffer("shift", torch.zeros(()))
        self.register_buffer("scale", torch.ones(()))

    @property
    def level(self) -> int:
        """The shared layer whose input this model takes."""
        return self.upper.first

    def hidden(self, hidden_GTD: Tensor, packed: PackedGroups, angles: tuple[Tensor, Tensor]) -> Tensor:
        """Last hidden states, [G * T, D], in fp32."""
        normed_GTD: Tensor = self.upper(hidden_GTD, packed, angles)
        return normed_GTD.flatten(0, 1).float()

    def score(self, hidden: Tensor) -> Tensor:
        """Normalised scores of hidden states [..., D]."""
        return (hidden @ self.head_D - self.shift) * self.scale


@torch.no_grad()
def score_groups(
    model: RewardModel, shared: SharedLayers, groups: Sequence[Group], batch_size: int = 8
) -> list[Tensor]:
    """Scores [K] of each group's completions."""
    scores: list[Tensor] = []
    for start in range(0, len(groups), batch_size):
        scores += _scores(model, shared, pack(groups[start : start + batch_size]))
    return scores


def fit(
    model: RewardModel,
    shared: SharedLayers,
    examples: Sequence[RankedExample],
    config: RewardModelConfig,
    seed: int,
    log: Log,
) -> None:
    """Trains for one epoch, a ranking being one batch element. Raises TrainingError if the loss is not finite."""
    optimizer = torch.optim.AdamW(
        [
            {"params": model.upper.parameters(), "lr": config.learning_rate},
            {"params": [model.head_D], "lr": config.head_learning_rate},
        ],
        betas=(0.9, 0.95), eps=1e-5, weight_decay=0.0,
    )  # fmt: skip
    batches = _batches(examples, config.batch_size, seed)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _cosine(step / max(1, len(batches))))
    for step, batch in enumerate(batches):
        scores = _scores(model, shared, pack([example.group for example in batch]))
        ranks = [torch.tensor(example.ranks) for example in batch]
        loss = torch.stack([ranking_loss(s, r) for s, r in zip(scores, ranks, strict=True)]).mean()
        if not torch.isfinite(loss):
            raise TrainingError(f"reward model: the loss is {loss.item()} at step {step}")
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
        optimizer.step()
        schedule.step()
        log(step, len(batches), {"reward_model/loss": loss.item(), "reward_model/accuracy": _accuracy(scores, ranks)})


def accuracy(
    model: RewardModel, shared: SharedLayers, examples: Sequence[RankedExample], batch_size: int
) -> tuple[float, int]:
    """Share of comparisons that the scores order as the labeler did, and how many comparisons there are."""
    scores = score_groups(model, shared, [example.group for example in examples], batch_size)
    counts = [num_correct(s, torch.tensor(example.ranks)) for s, example in zip(scores, examples, strict=True)]
    total = sum(count for _, count in counts)
    return sum(correct for correct, _ in counts) / max(1, total), total


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
    built_on = {"first": model.upper.first, "num_layers": len(model.upper.layers)}
    save_file(
        {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path,
        metadata={"reward_model": json.dumps(built_on)},
    )  # fmt: skip
    return hashlib.sha256(path.read_bytes()).hexdigest()


def warm_start(model: RewardModel, path: Path) -> bool:
    """Takes over the weights at `path`. False, and nothing changed, if they were built on other layers."""
    built_on = {"first": model.upper.first, "num_layers": len(model.upper.layers)}
    with safe_open(path, framework="pt") as file:
        if json.loads((file.metadata() or {}).get("reward_model", "{}")) != built_on:
            return False
        model.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118 (not a dict)
    return True


def _scores(model: RewardModel, shared: SharedLayers, packed: PackedGroups) -> list[Tensor]:
    angles = shared.angles(packed)
    encoded_GTD = shared.encode(packed, [model.level])[model.level]
    with torch.autocast("cpu", torch.bfloat16):
        hidden = model.hidden(encoded_GTD, packed, angles)
    return list(model.score(hidden[packed.last_N]).split(packed.group_sizes))


def _batches(examples: Sequence[RankedExample], batch_size: int, seed: int) -> list[list[RankedExample]]:
    """Batches in random order, of rankings of like length, so that little of a batch is padding."""
    shuffled = random.Random(seed)
    ordered = sorted(examples, key=lambda example: len(example.group))
    batches = [ordered[start : start + batch_size] for start in range(0, len(ordered), batch_size)]
    shuffled.shuffle(batches)
    return batches


def _cosine(progress: float) -> float:
    """From 1 to 0.1."""
    return 0.55 + 0.45 * math.cos(math.pi * min(1.0, progress))


def _accuracy(scores: Sequence[Tensor], ranks: Sequence[Tensor]) -> float:
    counts = [num_correct(s.detach(), r) for s, r in zip(scores, ranks, strict=True)]
    return sum(correct for correct, _ in counts) / max(1, sum(total for _, total in counts))
