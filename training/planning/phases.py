"""Predicts what each phase of a run costs: tokens, FLOPs, bytes read, and seconds on this hardware.

Decoding takes max(bytes / bandwidth, FLOPs / matmul rate), and everything else takes FLOPs / matmul rate, both divided
by the share of these roofs that is reached in practice (`Hardware.efficiency`). A backward pass costs twice its forward
pass, and attention's half of its forward pass more. Attention is counted without regard to masks, as it is computed:
in parts, or by all pairs of a row (training.models.attention). The engine's loading of weights,
communication between devices, and Python's own time are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from training.planning.hardware import Hardware
from training.planning.model_size import ModelSize
from training.planning.workload import Workload

_FORWARD_BACKWARD = 3
# The backward pass computes attention's logits again.
_ATTENTION_FORWARD_BACKWARD = 3.5
# The output embedding is frozen: see training.models.logprobs.
FORWARD_SLOPE = 2
# Bytes for each parameter: AdamW reads weight, gradient and two moments, and writes all except the gradient, in fp32.
_ADAMW_BYTES = 7 * 4


@dataclass(frozen=True)
class Phase:
    """The cost of one phase, done once. `plan_round` has the phases of each round, `plan_once` those of each run."""

    name: str
    tokens: float
    """Tokens that are drawn, or that go through a forward pass."""
    flops: float
    bytes: float
    """Bytes read and written, where the time depends on them."""
    seconds: float


def plan_round(work: Workload, hardware: Hardware) -> tuple[Phase, ...]:
    """Returns the phases of one round of PPO."""
    config = work.config.ppo
    phases = (
        _rollouts(work, hardware, "rollouts", config.prompts_per_round, config.rollouts_per_prompt),
        _scoring(work, hardware),
        _update(work, hardware),
    )
    return (*phases, _pretraining(work, hardware)) if work.pretraining_tokens else phases


def plan_once(work: Workload, hardware: Hardware) -> tuple[Phase, ...]:
    """Returns a run's phases besides its rounds: the reward model's refresh, and answers to held-out prompts, before
    and after PPO.

    The first of several devices does them alone. A refresh is assumed to have as many rankings as it may, with
    completions like the rollouts.
    """
    first, config = replace(hardware, num_devices=1), work.config
    asked, each = config.num_evaluation_prompts, config.completions_per_evaluation_prompt
    evaluation = _rollouts(work, first, "evaluation", asked, each)
    twice = {name: 2 * getattr(evaluation, name) for name in ("tokens", "flops", "bytes", "seconds")}
    return _reward_fit(work, first), replace(evaluation, **twice)


def layer_update_flops(work: Workload, tokens: float, context: float) -> float:
    """Returns the FLOPs of a forward and backward pass through the policy's own layers.

    Attention computes the logits of a token to `context` tokens.

    With adapters the gradients of the weights under them are not computed. Checkpointing adds a forward pass.
    """
    model, layers, config = work.model, work.policy_layers, work.config.ppo
    again = 1 if config.gradient_checkpointing else 0
    weights = _FORWARD_BACKWARD - 1 if config.lora.rank else _FORWARD_BACKWARD
    return (
        (weights + again) * model.weight_flops(tokens, layers)
        + (_ATTENTION_FORWARD_BACKWARD + again) * model.attention_flops(tokens, context, layers)
        + (_FORWARD_BACKWARD + again) * 2.0 * tokens * work.lora_parameters
    )


def sequences_at_once(work: Workload, num_rollouts: float) -> float:
    """Returns how many rollouts an engine draws at a time.

    The limits are `max_num_seqs`, the number of rollouts, and the room in the KV cache.
    """
    longest = work.prompt_tokens + work.completion_tokens
    held = (work.config.kv_cache_mib << 20) / (work.cache_bytes * longest)
    return max(1.0, min(work.config.max_num_seqs, num_rollouts, held))


def _rollouts(work: Workload, hardware: Hardware, name: str, num_prompts: int, num_each: int) -> Phase:
    """Predicts the prefill of each prompt, which its rollouts share, and decoding.

    Each decoding step of B sequences reads all weights and B caches. One rollout is assumed to be of the greatest
    length, and at its end fewer than B are still being drawn.
    """
    model, ppo = work.model, work.config.ppo
    rollouts = num_prompts * num_each
    mine = rollouts / hardware.num_devices
    drawn = mine * work.completion_tokens
    steps = max(drawn / sequences_at_once(work, mine), float(ppo.max_tokens))
    context = work.prompt_tokens + work.completion_tokens / 2
    read = steps * work.number_bytes * model.read_per_token + drawn * context * work.cache_bytes
    decode = model.forward_flops(drawn, context, model.num_layers) + model.head_flops(drawn)
    prompts = num_prompts * work.prompt_tokens / hardware.num_devices
    prefill = model.forward_flops(prompts, work.prompt_tokens, model.num_layers)
    bandwidth, flops = hardware.bandwidth_gb_s * 1e9, hardware.matmul_gflop_s * 1e9
    reached = hardware.efficiency
    seconds = max(read / bandwidth, decode / flops) / reached.decode + prefill / flops / reached.scoring
    return Phase(
        name=name,
        tokens=rollouts * work.completion_tokens,
        flops=(decode + prefill) * hardware.num_devices,
        bytes=read * hardware.num_devices,
        seconds=seconds,
    )


def _scoring(work: Workload, hardware: Hardware) -> Phase:
    """Predicts a forward pass through the shared layers and through the own layers of all four models.

    Where the first step's pass is done here, so are its slopes.
    """
    layers = work.shared_layers + 2 * work.policy_layers + 2 * work.reward_layers
    flops = work.model.forward_flops(work.round_tokens, work.context, layers)
    flops += (2 + (FORWARD_SLOPE - 1) * work.kept_share) * work.model.head_flops(work.predicted_tokens)
    return _matmuls("scoring", work.round_tokens, flops, hardware, hardware.efficiency.scoring)


def _update(work: Workload, hardware: Hardware) -> Phase:
    """Predicts forward and backward passes through what is trained, and the optimizer's steps.

    The first step's forward pass may be there already: scoring has done it.
    """
    config, model = work.config.ppo, work.model
    once = layer_update_flops(work, work.round_tokens, work.context)
    once += _trained_flops(model, work.round_tokens, work.context, work.reward_layers)
    once += FORWARD_SLOPE * model.head_flops(work.predicted_tokens)
    layers = work.policy_layers + work.reward_layers
    there = model.forward_flops(work.round_tokens, work.context, layers)
    there += FORWARD_SLOPE * model.head_flops(work.predicted_tokens)
    moved = _ADAMW_BYTES * work.trained_parameters * config.num_epochs * config.num_minibatches
    return _matmuls(
        "update",
        config.num_epochs * work.round_tokens,
        config.num_epochs * once - work.kept_share * there,
        hardware,
        hardware.efficiency.update,
        moved,
    )


def _pretraining(work: Workload, hardware: Hardware) -> Phase:
    """Predicts the update's part on pretraining text: all its tokens need logits, and the lower layers must run too."""
    config, model = work.config.ppo, work.model
    tokens, row = work.pretraining_tokens, float(config.ptx.sequence_tokens)
    flops = model.forward_flops(tokens, row, work.frozen_layers) + layer_update_flops(work, tokens, row)
    flops += FORWARD_SLOPE * model.head_flops(tokens)
    return _matmuls("pretraining mix", tokens, flops, hardware, hardware.efficiency.pretraining)


def _reward_fit(work: Workload, hardware: Hardware) -> Phase:
    """Predicts one epoch over the rankings that are learned from, and both reward models' scoring of held-out ones."""
    model, row, context, layers = work.model, work.row_tokens, work.context, work.reward_layers
    learned = work.learned_rankings * row
    held_out = 2 * work.config.reward_model.max_rankings * row - 2 * learned
    flops = model.forward_flops(learned, context, work.reward_level - layers)
    flops += _trained_flops(model, learned, context, layers)
    flops += model.forward_flops(held_out, context, work.reward_level)
    return _matmuls("reward model", learned + held_out, flops, hardware, hardware.efficiency.reward_model)


def _trained_flops(model: ModelSize, tokens: float, context: float, num_layers: int) -> float:
    """Returns the FLOPs of a forward and backward pass through layers that are trained."""
    attention = _ATTENTION_FORWARD_BACKWARD * model.attention_flops(tokens, context, num_layers)
    return _FORWARD_BACKWARD * model.weight_flops(tokens, num_layers) + attention


def _matmuls(
    name: str, tokens: float, flops: float, hardware: Hardware, efficiency: float, num_bytes: float = 0.0
) -> Phase:
    """Returns a phase that computes matrix products and then moves bytes."""
    seconds = (flops / hardware.flops + num_bytes / hardware.bandwidth) / efficiency
    return Phase(name, tokens, flops, num_bytes, seconds)
