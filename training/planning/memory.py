"""What a training run holds in memory, part by part, on each device, and when.

Weights and optimizer state are counted exactly. Activations are what autograd keeps of a layer of Llama's kind (RMSNorm
in fp32, gated MLP, SDPA with a mask, which each layer keeps in its precision), as if both models' were there at once.
Several devices divide layers, gradients and moments by FSDP, and a round of rollouts; embeddings, activations and the
engine are each device's own, and layers are gathered in fp32 as they are needed (training.models.parallel). The first
device fits the reward model alone, on models that are not divided yet. A checkpoint takes nothing more on a device, nor
does the policy on its way to the engine: both go tensor by tensor, the one to the host, where there is no copy if the
host is the device.

Rows are as long as the configuration allows, but for a round of rollouts, where the mean decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from training.models.logprobs import CHUNK_TOKENS
from training.planning.workload import Workload
from training.rewards.fit import PROBED_RANKINGS

Moment = Literal["reward model", "start of PPO", "update"]
"""The moments of a run at which memory may be fullest."""

WHOLE: tuple[Moment, ...] = ("reward model", "start of PPO")
"""Those before the devices have divided the models."""
PPO: tuple[Moment, ...] = ("update",)
MOMENTS: tuple[Moment, ...] = (*WHOLE, *PPO)

BF16, FP32 = 2, 4
ADAM = 2 * FP32
# Bytes of a token's hidden state that two norms keep, by the bytes of a number. Under adapters their weights need no
# gradient, and all matrices take the same states.
# bf16: each norm's input in fp32 and its output in bf16, cast to bf16 anew for each of q, k and v, or gate and up.
# fp32: what leaves the layer's half, the norm's input scaled, and its output; nothing is cast.
NORMS = {BF16: 22, FP32: 24}
NORMS_UNDER_ADAPTERS = {BF16: 12, FP32: 16}
# The same of the last norm. In fp32 its input is what leaves the last layer, and its output goes as it is made.
LAST_NORM = {BF16: 6, FP32: 4}
# A chunk's logits and their softmax, and its copy in bf16.
LOGITS = {BF16: 2 * FP32 + BF16, FP32: 2 * FP32}
# Layers that FSDP holds whole on each device: two that are gathered and what they are gathered in, the gradient of one
# and what it is divided from.
GATHERED_LAYERS = 5
ROLLOUT_FIELDS = 9
"""Numbers kept of each rollout's token: log-probabilities, values, advantages and the like."""


@dataclass(frozen=True)
class MemoryPart:
    """Bytes on each device, the moments at which they are held, and the field that makes them fewer ("" if none)."""

    name: str
    bytes: float
    moments: tuple[Moment, ...]
    field: str = ""


@dataclass(frozen=True)
class Memory:
    """All parts."""

    parts: tuple[MemoryPart, ...]

    def at(self, moment: Moment) -> tuple[MemoryPart, ...]:
        """What is held then, the largest first."""
        held = [part for part in self.parts if moment in part.moments and part.bytes]
        return tuple(sorted(held, key=lambda part: -part.bytes))

    def total(self, moment: Moment) -> float:
        """Bytes held then."""
        return sum(part.bytes for part in self.at(moment))

    @property
    def fullest(self) -> Moment:
        """The moment at which most is held."""
        return max(MOMENTS, key=self.total)

    @property
    def peak(self) -> float:
        """Most bytes held at a moment."""
        return self.total(self.fullest)


def plan_memory(work: Workload, num_devices: int = 1) -> Memory:
    """Counts what each of `num_devices` holds, the first of them where they differ."""
    parts = (
        *_engine(work),
        *_frozen(work, num_devices),
        *_trained(work, num_devices),
        *_reward_fit(work),
        *_passes(work, num_devices),
    )
    return Memory(parts)


def activation_bytes(
    work: Workload, num_layers: int, tokens: float, row: float, *, checkpointing: bool = False, adapters: bool = False
) -> float:
    """Bytes that autograd keeps of `tokens` tokens, in rows of `row`, in some layers that are trained.

    With checkpointing: the states that enter each layer, and one layer's activations while they are computed again.
    """
    model, number = work.model, work.number_bytes
    norms = (NORMS_UNDER_ADAPTERS if adapters else NORMS)[number] * model.hidden
    attention = 4 * number * model.attention + FP32 * model.num_heads  # q, k, v, the result with its logsumexp.
    gated = 4 * number * model.intermediate  # gate, its activation, up, and their product.
    layer = tokens * (norms + attention + gated + 2 * FP32 + number * row)
    if checkpointing and num_layers:
        return tokens * num_layers * number * model.hidden + layer
    return num_layers * layer


def last_norm_bytes(work: Workload, tokens: float) -> float:
    """Bytes kept of the states that leave the last layer, and of the slopes of the log-probabilities."""
    return (LAST_NORM[work.number_bytes] + FP32) * tokens * work.model.hidden


def logit_bytes(work: Workload, tokens: float) -> float:
    """Bytes of the logits that are there at one time, and of what is made of them."""
    return LOGITS[work.number_bytes] * min(CHUNK_TOKENS, tokens) * work.model.vocabulary


def _engine(work: Workload) -> tuple[MemoryPart, ...]:
    return (
        MemoryPart("engine: weights", work.number_bytes * work.model.total, MOMENTS),
        MemoryPart("engine: KV cache", float(work.config.kv_cache_mib << 20), MOMENTS, "kv_cache_mib"),
    )


def _frozen(work: Workload, num_devices: int) -> tuple[MemoryPart, ...]:
    number = work.number_bytes
    upper = number * work.upper_parameters / num_devices
    layers, own = work.model.num_layers * work.model.layer, work.reward_layers * work.model.layer
    divided = work.model.total - layers + layers / num_devices
    loaded = work.model.total + work.upper_parameters
    return (
        MemoryPart("reference", number * work.model.total, WHOLE),
        MemoryPart("policy as it is loaded", number * loaded, ("start of PPO",), "ppo.num_frozen_layers"),
        MemoryPart("reference in PPO", number * divided, PPO),
        MemoryPart("reference: its upper layers again", upper, PPO, "ppo.num_frozen_layers"),
        MemoryPart(
            "reward model: own layers", number * own / num_devices, PPO, "reward_model.num_trained_layers"
        ),
        MemoryPart(
            "policy under its adapters", upper if work.lora_parameters else 0, PPO, "ppo.num_frozen_layers"
        ),
    )  # fmt: skip


def _trained(work: Workload, num_devices: int) -> tuple[MemoryPart, ...]:
    config = work.config.ppo
    policy, value = work.policy_parameters / num_devices, work.value_parameters / num_devices
    few = "ppo.num_frozen_layers" if work.lora_parameters else "ppo.num_frozen_layers or ppo.lora.rank"
    calibrates = bool(config.ptx.data) and config.ptx.gamma is None
    layers = "reward_model.num_trained_layers"
    return (
        MemoryPart("policy: trained weights, fp32", FP32 * policy, PPO, few),
        MemoryPart("policy: gradients, fp32", FP32 * policy, PPO, few),
        MemoryPart("policy: Adam's moments, fp32", ADAM * policy, PPO, few),
        MemoryPart("policy: last good weights", FP32 * policy, PPO, few),
        MemoryPart("policy: average of weights", FP32 * policy if config.ema_decay else 0, PPO, "ppo.ema_decay"),
        MemoryPart(
            "policy: PPO's gradient set apart", FP32 * policy if calibrates else 0, ("update",), "ppo.ptx.gamma"
        ),
        MemoryPart("value model: weights, fp32", FP32 * value, PPO, layers),
        MemoryPart("value model: gradients and moments", (FP32 + ADAM) * value, PPO, layers),
    )  # fmt: skip


def _reward_fit(work: Workload) -> tuple[MemoryPart, ...]:
    """While the reward model is fitted there is no policy yet, but the reward model before."""
    config, model, layers = work.config.reward_model, work.model, work.reward_layers
    own = layers * model.layer
    rankings = min(work.learned_rankings, PROBED_RANKINGS) if layers else work.learned_rankings
    features = 2 * FP32 * rankings * work.config.ppo.rollouts_per_prompt * work.features
    row = config.micro_batch_tokens
    moment: tuple[Moment, ...] = ("reward model",)
    return (
        MemoryPart("reward model: trained", (2 * FP32 + ADAM) * own, moment, "reward_model.num_trained_layers"),
        MemoryPart("reward model: the one before", work.number_bytes * own, moment),
        MemoryPart("reward model: weights as used", work.number_bytes * own, moment),
        MemoryPart("reward model: what the heads read", features, moment, "reward_model.max_rankings"),
        MemoryPart(
            "reward model: activations", activation_bytes(work, layers, row, row), moment,
            "reward_model.micro_batch_tokens",
        ),
    )  # fmt: skip


def _passes(work: Workload, num_devices: int) -> tuple[MemoryPart, ...]:
    """What the update's passes need, beside the models."""
    config, model = work.config.ppo, work.model
    row = work.longest_row
    tokens = max(config.micro_batch_tokens, row)
    checkpointing = config.gradient_checkpointing
    policy = activation_bytes(
        work, work.policy_layers, tokens, row, checkpointing=checkpointing, adapters=bool(work.lora_parameters)
    )
    value = activation_bytes(work, work.reward_layers, tokens, row) + FP32 * tokens * work.features
    fewer = "ppo.micro_batch_tokens" if checkpointing else "ppo.micro_batch_tokens or ppo.gradient_checkpointing"
    at_once = model.layer if checkpointing else work.upper_parameters
    cast = (0 if work.lora_parameters else at_once) + work.value_parameters
    stored = work.number_bytes if work.lora_parameters else FP32
    gathered = GATHERED_LAYERS * stored * model.layer if num_devices > 1 else 0
    return (
        MemoryPart("trained weights, cast to bf16", BF16 * cast if work.number_bytes == BF16 else 0, ("update",)),
        MemoryPart("layers gathered from all devices", gathered, ("update",)),
        MemoryPart("policy: activations", policy + last_norm_bytes(work, tokens), ("update",), fewer),
        MemoryPart("value model: activations", value, ("update",), "ppo.micro_batch_tokens"),
        MemoryPart("logits of a chunk", logit_bytes(work, tokens), ("update",)),
        MemoryPart(
            "rollouts of a round", round_bytes(work) / num_devices, ("update",), "ppo.prompts_per_round"
        ),
    )  # fmt: skip


def round_bytes(work: Workload) -> float:
    """Bytes of a round's rollouts and what was found out about them, kept until the update is done.

    States that enter the trained layers, masks, rotations, and numbers for each token of a rollout.
    """
    model = work.model
    reward_first = work.reward_level - work.reward_layers
    states = 1 if reward_first == work.frozen_layers else 2
    number = work.number_bytes
    row = states * number * model.hidden + work.row_tokens + 2 * number * model.head_width + 2 * 8
    return work.round_tokens * row + work.predicted_tokens * (FP32 * ROLLOUT_FIELDS + 2 * 8 + 1)
