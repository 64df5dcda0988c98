"""The models of a PPO run with their optimizer, and the state from which training resumes bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from training.config import PpoConfig
from training.models.parallel import ALONE, Ranks, placed, shard
from training.models.policy import SharedLayers, UpperLayers
from training.models.reward import RewardModel
from training.models.value import ValueModel

ADAM_BETAS = (0.9, 0.95)
ADAM_EPS = 1e-5
MOMENTS = ("exp_avg", "exp_avg_sq", "step")

Weights = dict[str, Tensor]


@dataclass(frozen=True)
class Learner:
    """All models of a PPO run. `policy` and `value` are trained, the others are not."""

    reference: UpperLayers
    policy: UpperLayers
    value: ValueModel
    reward_model: RewardModel
    held_out_model: RewardModel
    """Fitted to the rankings of held-out labelers; it enters no reward and only guards."""
    optimizer: torch.optim.Optimizer
    ranks: Ranks = ALONE

    @property
    def shared(self) -> SharedLayers:
        """The layers that all these models stand on."""
        return self.reward_model.shared


def make_learner(
    policy: UpperLayers,
    reward_model: RewardModel,
    held_out_model: RewardModel,
    config: PpoConfig,
    ranks: Ranks = ALONE,
) -> Learner:
    """Puts the models together, with an AdamW over the trained parameters.

    Several ranks divide all weights except embeddings and heads; the policy's were divided when it was loaded.
    """
    shared = reward_model.shared
    reference = UpperLayers(shared.model, policy.first, shared.num_layers)
    shard(ranks, *reference.layers, reference)
    policy.checkpointing = config.gradient_checkpointing
    value = ValueModel(reward_model)
    shard(ranks, *value.layers, value)
    # Last, because the copies above were made from these. The held-out reward model has no own layers.
    shared.shard(ranks)
    shard(ranks, *reward_model.layers)
    optimizer = torch.optim.AdamW(
        [
            {"params": trained_parameters(policy), "peak_lr": config.learning_rate},
            {"params": trained_parameters(value), "peak_lr": config.value_learning_rate},
        ],
        betas=ADAM_BETAS, eps=ADAM_EPS, weight_decay=0.0, fused=True,
    )  # fmt: skip
    frozen = [model.requires_grad_(False) for model in (reward_model, held_out_model)]
    return Learner(reference, policy, value, frozen[0], frozen[1], optimizer, ranks)


def trained_parameters(module: nn.Module) -> list[nn.Parameter]:
    """Returns the parameters that take gradients, in order."""
    return [parameter for parameter in module.parameters() if parameter.requires_grad]


def trained_weights(module: nn.Module) -> Weights:
    """Returns copies of the parameters that take gradients, by name."""
    return {name: each.detach().clone() for name, each in module.named_parameters() if each.requires_grad}


def placed_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> Weights:
    """Moves whole weights, as checkpoints have them, to the module's device, and divides them as its parameters are."""
    parameters = dict(module.named_parameters())
    return {name: placed(tensor, parameters[name]) for name, tensor in weights.items()}


@torch.no_grad()
def set_weights(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Sets the parameters to what `trained_weights` returned."""
    parameters = dict(module.named_parameters())
    for name, tensor in weights.items():
        parameters[name].copy_(tensor)


@torch.no_grad()
def average(averaged: Weights, module: nn.Module, decay: float) -> None:
    """Moves `averaged` towards the module's weights: w̄ ← decay w̄ + (1 - decay) w (InstructGPT, appendix C.4)."""
    parameters = dict(module.named_parameters())
    for name, tensor in averaged.items():
        tensor.lerp_(parameters[name], 1 - decay)


def learner_state(learner: Learner) -> Weights:
    """Returns all that training changes: both models' weights and the optimizer's moments.

    The tensors are not copied: save them before the next optimizer step.
    """
    state: Weights = {}
    for prefix, module in (("policy", learner.policy), ("value", learner.value)):
        state |= {f"{prefix}.{name}": each.detach() for name, each in module.named_parameters() if each.requires_grad}
    for index, moments in learner.optimizer.state_dict()["state"].items():
        state |= {f"optimizer.{index}.{name}": moments[name] for name in MOMENTS}
    return state


def restore_learner(learner: Learner, state: Mapping[str, Tensor]) -> None:
    """Restores the whole state that `learner_state` returned."""
    for prefix, module in (("policy.", learner.policy), ("value.", learner.value)):
        weights = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
        set_weights(module, placed_weights(module, weights))
    optimizer = learner.optimizer.state_dict()
    parameters = [parameter for group in learner.optimizer.param_groups for parameter in group["params"]]
    moments: dict[int, Weights] = {}
    for index in sorted({int(name.split(".")[1]) for name in state if name.startswith("optimizer.")}):
        saved = {name: state[f"optimizer.{index}.{name}"] for name in MOMENTS}
        # The optimizer itself moves its step counts to the right device when it loads them.
        moments[index] = {n: t if n == "step" else placed(t, parameters[index]) for n, t in saved.items()}
    learner.optimizer.load_state_dict({"state": moments, "param_groups": optimizer["param_groups"]})
