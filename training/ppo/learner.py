"""The models of a PPO run with their optimizer, and the state from which training resumes bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from training.config import PpoConfig
from training.models.device import copy_dtype
from training.models.masters import Weights, keep_masters, placed_weights, set_weights, trained
from training.models.parallel import ALONE, Ranks, placed, shard
from training.models.policy import SharedLayers, UpperLayers, upper_layers_of
from training.models.reward import RewardModel
from training.models.value import ValueModel

ADAM_BETAS = (0.9, 0.95)
ADAM_EPS = 1e-5
MOMENTS = ("exp_avg", "exp_avg_sq", "step")


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


def load_policy(folder: Path, shared: SharedLayers, config: PpoConfig, ranks: Ranks = ALONE) -> UpperLayers:
    """Loads the version in a folder as a configuration has it trained; see training.models.policy.upper_layers_of."""
    first = min(config.num_frozen_layers, shared.num_layers - 1)
    dtype = copy_dtype(shared.device, stochastic_rounding=config.stochastic_rounding)
    return upper_layers_of(folder, shared, first, config.lora, ranks, dtype)


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
    # Several ranks divide the reference's layers apart from the shared ones, and need copies for that.
    reference = UpperLayers(shared.model, policy.first, shared.num_layers, copies=ranks.size > 1)
    shard(ranks, *reference.layers, reference)
    policy.checkpointing = config.gradient_checkpointing
    dtype = copy_dtype(shared.device, stochastic_rounding=config.stochastic_rounding)
    # As in UpperLayers.trainable.
    value = ValueModel(reward_model, torch.float32 if ranks.size > 1 else dtype)
    shard(ranks, *value.layers, dtype=dtype)
    shard(ranks, value)
    if dtype != torch.float32:
        keep_masters(value.layers)
    # Last, because the copies above were made from these. The held-out reward model has no own layers.
    shared.shard(ranks)
    shard(ranks, *reward_model.layers)
    optimizer = torch.optim.AdamW(
        [
            {"params": [*trained(policy).values()], "peak_lr": config.learning_rate},
            {"params": [*trained(value).values()], "peak_lr": config.value_learning_rate},
        ],
        betas=ADAM_BETAS, eps=ADAM_EPS, weight_decay=0.0, fused=True,
    )  # fmt: skip
    frozen = [model.requires_grad_(False) for model in (reward_model, held_out_model)]
    return Learner(reference, policy, value, frozen[0], frozen[1], optimizer, ranks)


@torch.no_grad()
def average(averaged: Weights, module: nn.Module, decay: float) -> None:
    """Moves `averaged` towards the module's weights: w̄ ← decay w̄ + (1 - decay) w (InstructGPT, appendix C.4)."""
    masters = trained(module)
    for name, tensor in averaged.items():
        tensor.lerp_(masters[name], 1 - decay)


def learner_state(learner: Learner) -> Weights:
    """Returns all that training changes: both models' weights, in fp32, and the optimizer's moments.

    The tensors are not copied: save them before the next optimizer step.
    """
    state: Weights = {}
    for prefix, module in (("policy", learner.policy), ("value", learner.value)):
        state |= {f"{prefix}.{name}": each.detach() for name, each in trained(module).items()}
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
