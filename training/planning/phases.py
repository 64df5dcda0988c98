"""What each phase of a run costs: tokens, FLOPs, bytes read, and the seconds that the machine's roofs allow it.

Decoding takes max(bytes / bandwidth, FLOPs / matmul rate), and all else FLOPs / matmul rate, at the share of these
roofs that it reaches in practice (`Hardware.efficiency`). A backward pass costs twice its forward pass; attention is
counted without regard to its mask, as kernels compute it. What the engine takes to load weights is left out, what
devices send each other, and Python's time.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from training.planning.hardware import Hardware
from training.planning.workload import Workload

FORWARD_BACKWARD = 3
# The output embedding is frozen: see training.models.logprobs.
FORWARD_SLOPE = 2
# Per parameter: AdamW reads weight, gradient and two moments, and writes all but the gradient, in fp32.
ADAMW_BYTES = 7 * 4


@dataclass(frozen=True)
class Phase:
    """One phase, once: each round of PPO has those of `plan_round`, and each run those of `plan_once` besides."""

    name: str
    tokens: float
    """Tokens that are drawn, or that a pass is made over."""
    flops: float
    bytes: float
    """Bytes read and written, where they decide."""
    seconds: float


def plan_round(work: Workload, hardware: Hardware) -> tuple[Phase, ...]:
    """The phases of one round of PPO."""
    config = work.config.ppo
    phases = (
        _rollouts(work, hardware, "rollouts", config.prompts_per_round, config.rollouts_per_prompt),
        _scoring(work, hardware),
        _update(work, hardware),
    )
    return (*phases, _pretraining(work, hardware)) if work.pretraining_tokens else phases


def plan_once(work: Workload, hardware: Hardware) -> tuple[Phase, ...]:
    """What a run does once: the reward model's refresh, and held-out prompts asked before and after PPO.

    The first of several devices does it alone. Rankings are taken to be as many as a refresh may have, with completions
    like the rollouts.
    """
    first, asked = replace(hardware, num_devices=1), work.config.num_evaluation_prompts
    evaluation = _rollouts(work, first, "evaluation", asked, 1)
    twice = {name: 2 * getattr(evaluation, name) for name in ("tokens", "flops", "bytes", "seconds")}
    return _reward_fit(work, first), replace(evaluation, **twice)


def layer_update_flops(work: Workload, tokens: float, row: float) -> float:
    """FLOPs of a forward and backward pass through the policy's own layers.

    Adapters leave out the gradients of the weights that they stand on. Checkpointing adds a forward pass.
    """
    model, layers, config = work.model, work.policy_layers, work.config.ppo
    again = 1 if config.gradient_checkpointing else 0
    weights = FORWARD_BACKWARD - 1 if config.lora.rank else FORWARD_BACKWARD
    return (
        (weights + again) * model.weight_flops(tokens, layers)
        + (FORWARD_BACKWARD + again) * model.attention_flops(tokens, row, layers)
        + (FORWARD_BACKWARD + again) * 2.0 * tokens * work.lora_parameters
    )


def sequences_at_once(work: Workload, num_rollouts: float) -> float:
    """Rollouts that an engine draws at a time: what it may, what there is, and what its KV cache holds."""
    longest = work.prompt_tokens + work.completion_tokens
    held = (work.config.kv_cache_mib << 20) / (work.cache_bytes * longest)
    return max(1.0, min(work.config.max_num_seqs, num_rollouts, held))


def _rollouts(work: Workload, hardware: Hardware, name: str, num_prompts: int, num_each: int) -> Phase:
    """Prefill of each prompt, which its rollouts share, and decoding.

    A decoding step of B sequences reads all weights and B caches. One of the rollouts is taken to be as long as may be,
    and fewer than B run at its end.
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
    """The shared layers once; policy, reference, reward model and value model each their own."""
    layers = work.shared_layers + 2 * work.policy_layers + 2 * work.reward_layers
    flops = work.model.forward_flops(work.round_tokens, work.row_tokens, layers)
    flops += 2 * work.model.head_flops(work.predicted_tokens)
    return _matmuls("scoring", work.round_tokens, flops, hardware, hardware.efficiency.scoring)


def _update(work: Workload, hardware: Hardware) -> Phase:
    """Forward and backward through what is trained, and the optimizer's steps."""
    config, model = work.config.ppo, work.model
    once = layer_update_flops(work, work.round_tokens, work.row_tokens)
    once += FORWARD_BACKWARD * model.forward_flops(work.round_tokens, work.row_tokens, work.reward_layers)
    once += FORWARD_SLOPE * model.head_flops(work.predicted_tokens)
    moved = ADAMW_BYTES * work.trained_parameters * config.num_epochs * config.num_minibatches
    return _matmuls(
        "update",
        config.num_epochs * work.round_tokens,
        config.num_epochs * once,
        hardware,
        hardware.efficiency.update,
        moved,
    )


def _pretraining(work: Workload, hardware: Hardware) -> Phase:
    """The same for pretraining text, all of whose tokens need logits, and whose lower layers have not been run yet."""
    config, model = work.config.ppo, work.model
    tokens, row = work.pretraining_tokens, float(config.ptx.sequence_tokens)
    flops = model.forward_flops(tokens, row, work.frozen_layers) + layer_update_flops(work, tokens, row)
    flops += FORWARD_SLOPE * model.head_flops(tokens)
    return _matmuls("pretraining mix", tokens, flops, hardware, hardware.efficiency.pretraining)


def _reward_fit(work: Workload, hardware: Hardware) -> Phase:
    """One epoch over what is learned from; what is held out is read by both reward models."""
    model, row, layers = work.model, work.row_tokens, work.reward_layers
    learned = work.learned_rankings * row
    held_out = 2 * work.config.reward_model.max_rankings * row - 2 * learned
    flops = model.forward_flops(learned, row, work.reward_level - layers)
    flops += FORWARD_BACKWARD * model.forward_flops(learned, row, layers)
    flops += model.forward_flops(held_out, row, work.reward_level)
    return _matmuls("reward model", learned + held_out, flops, hardware, hardware.efficiency.reward_model)


def _matmuls(
    name: str, tokens: float, flops: float, hardware: Hardware, efficiency: float, num_bytes: float = 0.0
) -> Phase:
    """A phase of matrix products, and of bytes that are moved after them."""
    seconds = (flops / hardware.flops + num_bytes / hardware.bandwidth) / efficiency
    return Phase(name, tokens, flops, num_bytes, seconds)
