"""Low-rank adapters (Hu et al. 2021, LoRA) for the layers of a reward model, which the trainer itself trains whole.

D is the width of an input, O that of an output, R the rank.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from training.models.reward import RewardModel


class _Adapted(nn.Module):
    """A linear map whose weights stay, plus a trained one of low rank, which is zero at first."""

    weight_OD: Tensor
    bias_O: Tensor | None

    def __init__(self, whole: nn.Linear, rank: int, alpha: float, noise: torch.Generator) -> None:
        super().__init__()
        self.register_buffer("weight_OD", whole.weight.detach())
        self.register_buffer("bias_O", None if whole.bias is None else whole.bias.detach())
        num_out, num_in = whole.weight.shape
        self.down_RD = nn.Parameter(torch.randn(rank, num_in, generator=noise).to(whole.weight) / math.sqrt(num_in))
        self.up_OR = nn.Parameter(whole.weight.new_zeros(num_out, rank))
        self.factor = alpha / rank

    def forward(self, input_D: Tensor) -> Tensor:
        """Returns the outputs [..., O] of inputs [..., D]."""
        learned = linear(linear(input_D, self.down_RD), self.up_OR)
        return linear(input_D, self.weight_OD, self.bias_O) + self.factor * learned


def adapt(model: RewardModel, rank: int, alpha: float, seed: int) -> None:
    """Puts adapters on all linear maps of the model's own layers. All else in these layers stays as it is."""
    noise = torch.Generator().manual_seed(seed)
    for module in [*model.layers.modules()]:
        for name, child in [*module.named_children()]:
            if isinstance(child, nn.Linear):
                setattr(module, name, _Adapted(child, rank, alpha, noise))
    for module in [*model.layers.modules()]:
        for name, parameter in [*module.named_parameters(recurse=False)]:
            if not isinstance(module, _Adapted):
                # A buffer is not trained, whatever fitting makes of the parameters.
                delattr(module, name)
                module.register_buffer(name, parameter.detach())
