"""Chooses what to label next: the unranked samples on whose order the reward model's heads differ most.

The heads were fitted to the same rankings with different random weights. Where they differ most, more rankings would
teach most.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from feedback.store.stored import StoredSample
from training.data.dataset import text_of
from training.data.groups import Group
from training.data.rendering import NotRenderedError, rendered_sample
from training.models.reward import RewardModel, group_features
from training.runs.folder import Unranked

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@torch.no_grad()
def label_next(
    model: RewardModel,
    tokenizer: PreTrainedTokenizerBase,
    samples: Sequence[StoredSample],
    *,
    max_prompt_tokens: int,
    max_group_tokens: int,
) -> list[Unranked]:
    """Returns the samples, the most uncertain first.

    Without those that have an empty completion, are too long, or cannot be rendered.
    """
    groups = [(sample, _group(tokenizer, sample)) for sample in samples]
    readable = [
        (sample, group)
        for sample, group in groups
        if group and len(group) <= max_group_tokens and len(group.prompt) <= max_prompt_tokens
    ]
    features = group_features(model, [group for _, group in readable])
    found = [
        Unranked(
            sample.sample_id,
            uncertainty(model.standardized(features_KF) @ model.heads_FE),
            text_of(sample.prompt),
            tuple(each.text for each in sample.completions),
        )
        for (sample, _), features_KF in zip(readable, features, strict=True)
    ]
    return sorted(found, key=lambda sample: -sample.uncertainty)


def uncertainty(scores_KE: Tensor) -> float:
    """Returns the mean, over pairs of completions, of the standard deviation over heads of their score difference."""
    pairs = list(itertools.combinations(range(len(scores_KE)), 2))
    differences_ME = torch.stack([scores_KE[one] - scores_KE[other] for one, other in pairs])
    return float(differences_ME.std(1).mean())


def _group(tokenizer: PreTrainedTokenizerBase, sample: StoredSample) -> Group | None:
    try:
        prompt, completions = rendered_sample(tokenizer, sample.prompt, sample.completions)
    except NotRenderedError:
        return None
    return Group(prompt, tuple(completions)) if all(completions) else None
