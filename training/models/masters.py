"""Trains weights in fp32 while models compute with bf16 copies of them, made once a step by stochastic rounding.

bf16 has 8 significant bits. If each pass rounded to the nearest, then steps smaller than half the distance to the next
bf16 number would change nothing that is computed. Stochastic rounding takes the upper of the two neighbours with such a
probability that the copy is right on average (Gupta et al. 2015, "Deep Learning with Limited Numerical Precision").
All passes of a step use one copy, and so does the engine that draws rollouts: the policy that drew them is the one that
learns from them.

A parameter without a copy is its own master. Under FSDP both are in shards, the copy has bf16 numbers in fp32, and the
noise is the same as without.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from training.models.parallel import local, placed

Weights = dict[str, Tensor]

_MASTER, _HOOK = "master", "master_hook"
_LOST_BITS = 16
"""fp32 has the same exponent as bf16, and 16 bits more of the fraction."""


def keep_masters(module: nn.Module) -> None:
    """Gives the module's parameters that take gradients a master each. Gradients then add up there, in fp32."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            setattr(parameter, _MASTER, nn.Parameter(parameter.detach().to(torch.float32, copy=True)))
            setattr(parameter, _HOOK, parameter.register_post_accumulate_grad_hook(_pass_on))


def drop_masters(module: nn.Module) -> None:
    """Leaves the module with its copies alone."""
    for parameter in module.parameters():
        if hasattr(parameter, _MASTER):
            getattr(parameter, _HOOK).remove()
            delattr(parameter, _HOOK)
            delattr(parameter, _MASTER)


def trained(module: nn.Module) -> dict[str, nn.Parameter]:
    """Returns what an optimizer moves: the masters of the parameters that take gradients, by the parameters' names."""
    return {name: _master(each) for name, each in module.named_parameters() if each.requires_grad}


def trained_weights(module: nn.Module) -> Weights:
    """Returns copies of the masters, by the names of their parameters."""
    return {name: master.detach().clone() for name, master in trained(module).items()}


@torch.no_grad()
def copy_weights(module: nn.Module, weights: Weights) -> None:
    """Sets `weights`, which `trained_weights` returned earlier, to what it would return now."""
    for name, master in trained(module).items():
        weights[name].copy_(master)


def placed_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> Weights:
    """Moves whole weights, as checkpoints have them, to the module's device, and divides them as its parameters are."""
    masters = trained(module)
    return {name: placed(tensor, masters[name]) for name, tensor in weights.items()}


@torch.no_grad()
def set_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Sets the masters to what `trained_weights` returned. They must be cast before the module computes."""
    masters = trained(module)
    for name, tensor in weights.items():
        masters[name].copy_(tensor)


@torch.no_grad()
def cast(module: nn.Module, seed: int) -> None:
    """Makes the module's copies of its masters. What is random depends on the seed alone."""
    copies = [each for each in module.parameters() if hasattr(each, _MASTER)]
    if not copies:
        return
    source = noise_source(copies[0].device, seed)
    for parameter in copies:
        local(parameter).copy_(rounded(_master(parameter), source))


def noise_source(device: torch.device, seed: int) -> torch.Generator:
    """Returns where `rounded` takes its noise from, for several tensors one after the other."""
    return torch.Generator(device).manual_seed(seed)


@torch.no_grad()
def rounded(values: Tensor, source: torch.Generator) -> Tensor:
    """Returns finite fp32 values in bf16, rounded up or down at random. What is a bf16 number already stays.

    Of a tensor in shards it returns this rank's shard. Every rank draws the noise of the whole tensor, so that the
    result does not depend on the number of ranks.
    """
    noise = torch.randint(1 << _LOST_BITS, values.shape, dtype=torch.int32, device=source.device, generator=source)
    # A float's bits, read as an integer, grow with its magnitude. Noise added to the bits that are lost makes a carry
    # into those that are kept as often as the lost ones are worth.
    bits = local(placed(noise, values)).add_(local(values).view(torch.int32)).bitwise_right_shift_(_LOST_BITS)
    return bits.to(torch.int16).view(torch.bfloat16)


def _master(parameter: nn.Parameter) -> nn.Parameter:
    master: nn.Parameter = getattr(parameter, _MASTER, parameter)
    return master


def _pass_on(parameter: Tensor) -> None:
    """Adds the gradient of a backward pass to the master's, where parts of a minibatch add up without rounding."""
    master: nn.Parameter = getattr(parameter, _MASTER)
    assert parameter.grad is not None
    gradient, parameter.grad = parameter.grad.float(), None
    master.grad = gradient if master.grad is None else master.grad.add_(gradient)
