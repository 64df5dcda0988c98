"""Predicts the memory of a training run on each device, part by part, and when each part is needed.

Weights and optimizer state are counted exactly. Activations are what autograd keeps of a layer like Llama's (RMSNorm in
fp32, gated MLP, attention in parts, or SDPA with a mask, of which each layer keeps a copy in its precision), as if
those of the policy and the value model were there at the same time. Those of a round's first step may be there since
its minibatch was scored: that comes last, so there is no more beside them than in a step (training.ppo.experience).
Several devices divide layers, gradients and moments by FSDP, and also a round's rollouts. Each device has its own
embeddings, activations and engine, and layers are gathered in fp32 when they are needed (training.models.parallel). The
first device fits the reward model alone, while the models are not divided yet. Checkpoints and the copy of the policy
to the engine take no more memory on a device, because both go tensor by tensor. A checkpoint goes to the host; where
the host is the device, nothing is copied.

Rows are assumed as long as the configuration allows, except in a round's rollouts, where the mean length counts.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from training.models.logprobs import CHUNK_TOKENS
from training.models.policy import SCORING_TOKENS
from training.planning.workload import Workload
from training.rewards.fit import PROBED_RANKINGS

Moment = Literal["reward model", "start of PPO", "update"]
"""Moments of a run at which most memory may be in use."""

_WHOLE: tuple[Moment, ...] = ("reward model", "start of PPO")
"""The moments before the devices have divided the models."""
PPO: tuple[Moment, ...] = ("update",)
MOMENTS: tuple[Moment, ...] = (*_WHOLE, *PPO)

BF16, _FP32 = 2, 4
_ADAM = 2 * _FP32
# Bytes that a layer's two norms keep for each number of a token's hidden state, by the bytes of a number. With adapters
# the norms' weights need no gradient, and all matrices share the same states.
# bf16: each norm's input in fp32 and its output in bf16, cast to bf16 again for each of q, k and v, or gate and up.
# fp32: the output of the layer's half, the norm's scaled input, and its output; nothing is cast.
# bf16 with copies of the weights in bf16: the input in fp32, the input scaled and the output in bf16.
_NORMS = {BF16: 22, _FP32: 24}
_NORMS_WITH_COPIES = {BF16: 16, _FP32: 24}
_NORMS_UNDER_ADAPTERS = {BF16: 12, _FP32: 16}
# The same for the last norm. In fp32 its input is the last layer's output, and its own output is not kept.
_LAST_NORM = {BF16: 6, _FP32: 4}
# Bytes for each logit of a chunk: the logit and its softmax in fp32, and the softmax's copy in bf16.
_LOGITS = {BF16: 2 * _FP32 + BF16, _FP32: 2 * _FP32}
# Bytes for each logit of attention with a soft cap, in either precision: its tanh, and its softmax in fp32, copied to
# bf16 there.
_CAPPED_LOGITS = 8
# Whole layers that FSDP keeps on each device: two gathered layers with the buffers that they are gathered in, and one
# layer's gradient with the buffer that it is divided from.
_GATHERED_LAYERS = 5
_ROLLOUT_FIELDS = 9
"""Numbers kept of each rollout's token: log-probabilities, values, advantages and the like."""


@dataclass(frozen=True)
class MemoryPart:
    """Bytes on each device, the moments at which they are in use, and the setting that reduces them ("" if none)."""

    name: str
    bytes: float
    moments: tuple[Moment, ...]
    field: str = ""


@dataclass(frozen=True)
class Memory:
    """All parts of a run's memory."""

    parts: tuple[MemoryPart, ...]

    def at(self, moment: Moment) -> tuple[MemoryPart, ...]:
        """Returns the parts that are in use at this moment, the largest first."""
        held = [part for part in self.parts if moment in part.moments and part.bytes]
        return tuple(sorted(held, key=lambda part: -part.bytes))

    def total(self, moment: Moment) -> float:
        """Returns the bytes in use at this moment."""
        return sum(part.bytes for part in self.at(moment))

    @property
    def fullest(self) -> Moment:
        """The moment at which most memory is in use."""
        return max(MOMENTS, key=self.total)

    @property
    def peak(self) -> float:
        """The most bytes that are in use at a moment."""
        return self.total(self.fullest)


def plan_memory(work: Workload, num_devices: int = 1) -> Memory:
    """Counts the memory of each of `num_devices` devices; where they differ, that of the first."""
    parts = (
        *engine_parts(work),
        *_frozen(work, num_devices),
        *_trained(work, num_devices),
        *_reward_fit(work),
        *_passes(work, num_devices),
    )
    return Memory(parts)


def activation_bytes(
    work: Workload,
    num_layers: int,
    tokens: float,
    row: float,
    *,
    checkpointing: bool = False,
    adapters: bool = False,
    copies: bool = False,
    masked: bool = False,
) -> float:
    """Returns the bytes that autograd keeps for `tokens` tokens, in rows of `row` tokens, in some trained layers.

    `masked`: attention is transformers' own, with a mask of all pairs of a row, not in parts.
    `copies`: the layers compute with copies of their weights (training.models.masters), and not by autocast.

    With checkpointing these are the states that enter each layer, and one layer's activations while they are computed
    again.
    """
    model, number = work.model, work.number_bytes
    kept = _NORMS_UNDER_ADAPTERS if adapters else _NORMS_WITH_COPIES if copies else _NORMS
    norms = kept[number] * model.normed / 2
    attention: float = 2 * number * (model.attention + model.key_value)  # q, the result, k and v.
    if masked:
        # Keys and values are repeated for each query head; the result's logsumexp; the mask.
        attention = 4 * number * model.attention + _FP32 * model.num_heads + number * row
        attention += _CAPPED_LOGITS * model.num_heads * row if model.soft_capped else 0
    gated = 4 * number * model.intermediate  # gate, its activation, up, and their product.
    layer = tokens * (norms + attention + gated + 2 * _FP32)
    if checkpointing and num_layers:
        return tokens * num_layers * number * model.hidden + layer
    return num_layers * layer


def last_norm_bytes(work: Workload, tokens: float) -> float:
    """Returns the bytes kept of the states that leave the last layer, and of the slopes of the log-probabilities."""
    return (_LAST_NORM[work.number_bytes] + _FP32) * tokens * work.model.hidden


def logit_bytes(work: Workload, tokens: float) -> float:
    """Returns the bytes of one chunk's logits, and of what is computed from them."""
    # A soft cap has a slope of its own.
    number = _LOGITS[work.number_bytes] + (_FP32 if work.model.soft_capped else 0)
    return number * min(CHUNK_TOKENS, tokens) * work.model.vocabulary


def engine_parts(work: Workload) -> tuple[MemoryPart, ...]:
    """Counts the rollout engine, which is there from start to end."""
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
        MemoryPart("reference", number * work.model.total, _WHOLE),
        MemoryPart("policy as it is loaded", number * loaded, ("start of PPO",), "ppo.num_frozen_layers"),
        MemoryPart("reference in PPO", number * divided, PPO),
        # One device alone runs them where they are.
        MemoryPart(
            "reference: its upper layers again", upper if num_devices > 1 else 0, PPO, "ppo.num_frozen_layers"
        ),
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
    own = work.reward_layers * work.model.layer / num_devices
    few = "ppo.num_frozen_layers" if work.lora_parameters else "ppo.num_frozen_layers or ppo.lora.rank"
    calibrates = bool(config.ptx.data) and config.ptx.gamma is None
    layers = "reward_model.num_trained_layers"
    return (
        MemoryPart("policy: trained weights, fp32", _FP32 * policy, PPO, few),
        MemoryPart("policy: their copies", work.copied_bytes * policy, PPO, few),
        MemoryPart("policy: gradients, fp32", _FP32 * policy, PPO, few),
        MemoryPart("policy: Adam's moments, fp32", _ADAM * policy, PPO, few),
        MemoryPart("policy: last good weights", _FP32 * policy, PPO, few),
        MemoryPart("policy: average of weights", _FP32 * policy if config.ema_decay else 0, PPO, "ppo.ema_decay"),
        MemoryPart(
            "policy: PPO's gradient set apart", _FP32 * policy if calibrates else 0, ("update",), "ppo.ptx.gamma"
        ),
        MemoryPart("value model: weights, fp32", _FP32 * value, PPO, layers),
        MemoryPart("value model: their copies", work.copied_bytes * own, PPO, layers),
        MemoryPart("value model: gradients and moments", (_FP32 + _ADAM) * value, PPO, layers),
    )  # fmt: skip


def _reward_fit(work: Workload) -> tuple[MemoryPart, ...]:
    """Counts the memory of fitting the reward model: there is no policy yet, but there is the previous reward model."""
    config, model, layers = work.config.reward_model, work.model, work.reward_layers
    own = layers * model.layer
    rankings = min(work.learned_rankings, PROBED_RANKINGS) if layers else work.learned_rankings
    features = 2 * _FP32 * rankings * work.config.ppo.rollouts_per_prompt * work.features
    row = config.micro_batch_tokens
    moment: tuple[Moment, ...] = ("reward model",)
    # Without gradients, of each token: the residual with its norm and the attention's parts, and the gated product's.
    scored = SCORING_TOKENS * work.number_bytes * (4 * model.hidden + 3 * model.intermediate)
    return (
        MemoryPart("reward model: trained", (2 * _FP32 + _ADAM) * own, moment, "reward_model.num_trained_layers"),
        MemoryPart("reward model: the one before", work.number_bytes * own, moment),
        MemoryPart("reward model: weights as used", work.number_bytes * own, moment),
        MemoryPart("reward model: a scored batch", scored, moment),
        MemoryPart("reward model: what the heads read", features, moment, "reward_model.max_rankings"),
        MemoryPart(
            "reward model: activations",
            activation_bytes(work, layers, row, row, copies=work.number_bytes == BF16, masked=work.masked),
            moment,
            "reward_model.micro_batch_tokens",
        ),
    )  # fmt: skip


def _passes(work: Workload, num_devices: int) -> tuple[MemoryPart, ...]:
    """Counts what the update's forward and backward passes need besides the models."""
    config, model = work.config.ppo, work.model
    row = work.longest_row
    tokens = max(config.micro_batch_tokens, row)
    checkpointing = config.gradient_checkpointing
    copies = bool(work.copied_bytes)
    policy = activation_bytes(
        work, work.policy_layers, tokens, row,
        checkpointing=checkpointing, adapters=bool(work.lora_parameters), copies=copies, masked=work.masked,
    )  # fmt: skip
    value = activation_bytes(work, work.reward_layers, tokens, row, copies=copies, masked=work.masked)
    value += _FP32 * tokens * work.features
    fewer = "ppo.micro_batch_tokens" if checkpointing else "ppo.micro_batch_tokens or ppo.gradient_checkpointing"
    at_once = model.layer if checkpointing else work.upper_parameters
    autocast = work.number_bytes == BF16 and not copies
    cast = (0 if work.lora_parameters else at_once) + work.value_parameters
    stored = work.number_bytes if work.lora_parameters or copies else _FP32
    gathered = _GATHERED_LAYERS * stored * model.layer if num_devices > 1 else 0
    return (
        MemoryPart("trained weights, cast to bf16", BF16 * cast if autocast else 0, ("update",)),
        MemoryPart("layers gathered from all devices", gathered, ("update",)),
        MemoryPart("policy: activations", policy + last_norm_bytes(work, tokens), ("update",), fewer),
        MemoryPart("value model: activations", value, ("update",), "ppo.micro_batch_tokens"),
        MemoryPart("logits of a chunk", logit_bytes(work, tokens), ("update",)),
        MemoryPart(
            "rollouts of a round", round_bytes(work) / num_devices, ("update",), "ppo.prompts_per_round"
        ),
    )  # fmt: skip


def round_bytes(work: Workload) -> float:
    """Returns the bytes of a round's rollouts with all figures computed for them, kept until the update is done.

    They are the states that enter the trained layers, tokens with positions and segments, rotations, and several
    numbers for each rollout token.
    """
    model = work.model
    reward_first = work.reward_level - work.reward_layers
    states = 1 if reward_first == work.frozen_layers else 2
    number = work.number_bytes
    row = states * number * model.hidden + 2 * number * model.head_width + 3 * 8
    return work.round_tokens * row + work.predicted_tokens * (_FP32 * _ROLLOUT_FIELDS + 2 * 8 + 1)
